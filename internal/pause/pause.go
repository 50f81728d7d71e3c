// Package pause waits for time to pass, unless something ends first. It is a leaf.
package pause

import (
	"context"
	"time"
)

// For waits for d. It reports false when ctx ended first, true at once when d is
// not positive and ctx lives.
func For(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
