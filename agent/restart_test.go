package agent

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

func TestRestartPolicyDefaults(t *testing.T) {
	want := restartPolicy{
		kind: "on-failure", maxRetries: 5, backoff: time.Second, maxBackoff: 30 * time.Second, resetAfter: time.Minute,
	}
	if got := restartPolicyOf(nil); got != want {
		t.Fatalf("an empty policy is %+v, want %+v", got, want)
	}
	got := restartPolicyOf(&pb.RestartPolicy{Policy: "always", MaxRetries: -1, Backoff: durationpb.New(time.Minute)})
	if got.maxBackoff != time.Minute || got.maxRetries != -1 || got.kind != "always" {
		t.Fatalf("got %+v: the longest wait must not be under the first", got)
	}
}

func TestRestartPolicyAfter(t *testing.T) {
	trap, failed := runtime.Exit{Reason: runtime.Trap}, runtime.Exit{Reason: runtime.ExitCode, Code: 2}
	completed, invalid := runtime.Exit{Reason: runtime.Completed}, runtime.Exit{Reason: runtime.InvalidGuest}
	never := &pb.RestartPolicy{Policy: "never"}
	always := &pb.RestartPolicy{Policy: "always"}
	unlimited := &pb.RestartPolicy{MaxRetries: -1}
	for _, c := range []struct {
		name    string
		policy  *pb.RestartPolicy
		exit    runtime.Exit
		ran     time.Duration
		retries int
		want    verdict
	}{
		{"a crash is retried", nil, trap, 0, 0, verdict{phaseWaiting, true, 1, time.Second}},
		{"a bad exit code is a crash", nil, failed, 0, 0, verdict{phaseWaiting, true, 1, time.Second}},
		{"the second wait is twice as long", nil, trap, 0, 1, verdict{phaseWaiting, true, 2, 2 * time.Second}},
		{"the fifth is the last", nil, trap, 0, 4, verdict{phaseWaiting, true, 5, 16 * time.Second}},
		{"then it has failed", nil, trap, 0, 5, verdict{phaseDone, true, 5, 0}},
		{"a long run begins a new row", nil, trap, time.Minute, 5, verdict{phaseWaiting, true, 1, time.Second}},
		{"a shorter one does not", nil, trap, time.Minute - 1, 5, verdict{phaseDone, true, 5, 0}},
		{"without a limit it goes on", unlimited, trap, 0, 99, verdict{phaseWaiting, true, 100, 30 * time.Second}},
		{"never means never", never, trap, 0, 0, verdict{phaseDone, true, 0, 0}},
		{"never, also after a long run", never, trap, time.Hour, 0, verdict{phaseDone, true, 0, 0}},
		{"a completed command is done", nil, completed, 0, 3, verdict{phaseDone, false, 0, 0}},
		{"with always it runs again", always, completed, 0, 3, verdict{phaseWaiting, false, 0, time.Second}},
		{"always retries crashes within the limit", always, trap, 0, 5, verdict{phaseDone, true, 5, 0}},
		{"an invalid module is never retried", always, invalid, 0, 0, verdict{phaseDone, true, 0, 0}},
		{"a stop is no crash", always, runtime.Exit{Reason: runtime.Stopped}, 0, 2, verdict{phase: phaseStopped}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := restartPolicyOf(c.policy).after(c.exit, c.ran, c.retries, 0); got != c.want {
				t.Fatalf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestBackoffDoublesWithJitterUnderItsBound(t *testing.T) {
	p := restartPolicyOf(nil)
	plain := time.Second
	for n := 1; n <= 40; n++ {
		longest, shortest := p.delay(n, 0), p.delay(n, 0.999999)
		if longest != plain {
			t.Fatalf("wait %d without jitter is %s, want %s", n, longest, plain)
		}
		if low := time.Duration(0.8 * float64(plain)); shortest < low || shortest >= longest {
			t.Fatalf("wait %d with the most jitter is %s, want from %s to %s", n, shortest, low, longest)
		}
		plain = min(2*plain, 30*time.Second)
	}
}
