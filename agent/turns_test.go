package agent

import (
	"context"
	"testing"
	"time"
)

// TestTurnsAreGivenBack lets one message after another into an instance that
// handles one at a time, and forgets the instance when nobody wants it any more.
func TestTurnsAreGivenBack(t *testing.T) {
	var all turns
	for range 3 {
		leave, ok := all.enter(t.Context(), "a", 1)
		if !ok {
			t.Fatal("a free slot was not given")
		}
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		if _, ok := all.enter(cancelled, "a", 1); ok {
			t.Error("a second message was let in beside the first")
		}
		left := make(chan struct{})
		go func() {
			defer close(left)
			leave()
		}()
		select {
		case <-left:
		case <-time.After(10 * time.Second):
			t.Fatal("the slot was not given back")
		}
	}
	if len(all.gone) != 0 {
		t.Errorf("%d instances are remembered, want none", len(all.gone))
	}
}
