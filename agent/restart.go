package agent

import (
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// The restart policies by the names of the manifest.
const (
	restartNever     = "never"
	restartAlways    = "always"
	restartOnFailure = "on-failure"
)

// What an unset field of a RestartPolicy means.
const (
	defaultMaxRetries = 5
	defaultBackoff    = time.Second
	defaultMaxBackoff = 30 * time.Second
	defaultResetAfter = 60 * time.Second
)

// jitterShare is the largest part that jitter takes off a backoff.
const jitterShare = 0.2

// restartPolicy is a RestartPolicy with its defaults filled in.
type restartPolicy struct {
	kind       string
	maxRetries int // negative: no limit
	backoff    time.Duration
	maxBackoff time.Duration
	resetAfter time.Duration
}

func restartPolicyOf(p *pb.RestartPolicy) restartPolicy {
	out := restartPolicy{
		kind:       p.GetPolicy(),
		maxRetries: int(p.GetMaxRetries()),
		backoff:    p.GetBackoff().AsDuration(),
		maxBackoff: p.GetMaxBackoff().AsDuration(),
		resetAfter: p.GetResetAfter().AsDuration(),
	}
	if out.kind == "" {
		out.kind = restartOnFailure
	}
	if out.maxRetries == 0 {
		out.maxRetries = defaultMaxRetries
	}
	if out.backoff <= 0 {
		out.backoff = defaultBackoff
	}
	if out.maxBackoff <= 0 {
		out.maxBackoff = max(defaultMaxBackoff, out.backoff)
	}
	if out.resetAfter <= 0 {
		out.resetAfter = defaultResetAfter
	}
	return out
}

// verdict is what follows from the end of an attempt.
type verdict struct {
	// phase is phaseWaiting, phaseStopped or phaseDone.
	phase phase
	// crashed: the end counts as a crash.
	crashed bool
	// retries is the number of restarts in a row, the coming one included.
	retries int
	// delay is the wait before the next attempt in phaseWaiting.
	delay time.Duration
}

// after decides what follows when an attempt that served for ran has ended.
// retries is the number of restarts in a row so far, jitter a random number in
// [0,1).
//
// A command that completed is no failure: with the policy always it starts again
// after the base backoff, and the row of retries begins anew. A module that
// cannot run is never tried again.
func (p restartPolicy) after(exit runtime.Exit, ran time.Duration, retries int, jitter float64) verdict {
	switch exit.Reason {
	case runtime.Stopped:
		return verdict{phase: phaseStopped}
	case runtime.Completed:
		if p.kind == restartAlways {
			return verdict{phase: phaseWaiting, delay: p.delay(1, jitter)}
		}
		return verdict{phase: phaseDone}
	case runtime.InvalidGuest:
		return verdict{phase: phaseDone, crashed: true, retries: retries}
	default:
	}
	if ran >= p.resetAfter {
		retries = 0
	}
	if p.kind == restartNever || p.maxRetries >= 0 && retries >= p.maxRetries {
		return verdict{phase: phaseDone, crashed: true, retries: retries}
	}
	return verdict{phase: phaseWaiting, crashed: true, retries: retries + 1, delay: p.delay(retries+1, jitter)}
}

// delay returns the wait before restart number n in a row, counted from 1.
func (p restartPolicy) delay(n int, jitter float64) time.Duration {
	d := p.backoff
	for range n - 1 {
		if d >= p.maxBackoff {
			break
		}
		d *= 2
	}
	d = min(d, p.maxBackoff)
	return d - time.Duration(jitterShare*jitter*float64(d))
}
