package fsm_test

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
)

// FuzzRestore: no input panics, a refused one changes nothing, and what is
// accepted is a state that can be written and read again.
func FuzzRestore(f *testing.F) {
	f.Add([]byte{})
	f.Add(dump(f, fsm.New()))
	f.Add(dump(f, furnished(f).s))
	f.Add([]byte{0xff, 0xff, 0xff, 0x1f, 0x0a})
	f.Fuzz(func(t *testing.T, data []byte) {
		s := fsm.New()
		b := &bed{t: t, s: s}
		b.module()
		before := dump(t, s)
		if err := s.Restore(bytes.NewReader(data)); err != nil {
			if !bytes.Equal(before, dump(t, s)) {
				t.Fatal("a refused snapshot changed the state")
			}
			return
		}
		restoreInto(t, fsm.New(), dump(t, s))
	})
}

// FuzzCommand: no bytes of a log entry panic, whatever the state, and the state
// afterwards can be written and read again.
func FuzzCommand(f *testing.F) {
	seed := uint64(7)
	gen := &generator{roll: func(n int) int {
		seed = seed*6364136223846793005 + 1442695040888963407
		return int((seed >> 33) % uint64(n))
	}}
	v := furnished(f).s.View()
	for range 100 {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(gen.next(v))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		// The checksum would keep nearly everything out.
		_, _ = fsm.DecodeCommand(message)
		data := sealed(message)
		cmd, err := fsm.DecodeCommand(data)
		if err != nil {
			return
		}
		again, err := fsm.DecodeCommand(data)
		if err != nil {
			t.Fatal(err)
		}
		b := furnished(t)
		twin := fsm.New()
		restoreInto(t, twin, dump(t, b.s))
		b.index++
		res := b.s.Apply(b.index, cmd)
		if other := twin.Apply(b.index, again); other.String() != res.String() && res.GetError() == nil {
			t.Fatalf("two states answer %v and %v", res, other)
		}
		if b.s.View().Hash() != twin.View().Hash() {
			t.Fatal("two states differ after the same command")
		}
		restoreInto(t, fsm.New(), dump(t, b.s))
	})
}
