package pause

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestForEndsWithTimeOrContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if !For(t.Context(), time.Minute) || time.Since(began) != time.Minute {
			t.Errorf("waited %s", time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if For(ctx, time.Minute) || time.Since(began) != time.Second {
			t.Errorf("waited %s for a context of a second", time.Since(began))
		}
		if For(ctx, -time.Second) {
			t.Error("an ended context was not seen")
		}
	})
}
