package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

const (
	// stopSlack is how much longer than its grace a stop may take before the
	// guest is closed by force.
	stopSlack = 10 * time.Second
	// exitPatience is how long a failed start may take to tell how it failed.
	exitPatience = time.Second
)

// fetchBackoff paces the fetching of a module that no peer delivers.
var fetchBackoff = restartPolicy{backoff: 500 * time.Millisecond, maxBackoff: 15 * time.Second}

// executor runs attempts: it has all that an attempt needs from its node.
type executor struct {
	modules  *moduleStore
	runtimes map[string]runtime.Runtime
	offers   []*pb.RuntimeInfo // of runtimes, as the control plane was told
	hosts    func(inst *pb.Instance, log *instanceLog) guestHost
	grace    time.Duration
	log      *slog.Logger
}

// guestHost is a guest's way out, which is closed behind it.
type guestHost interface {
	runtime.Host
	end()
	settle(ctx context.Context) error
}

// attempt is one try to run an instance, from fetching its module to its end.
type attempt struct {
	inst  *pb.Instance
	log   *instanceLog
	calls *callTracker
	// served is when it began to serve; zero before. Guarded by the supervisor's mutex.
	served time.Time

	asked context.Context //nolint:containedctx // it is the request to stop: done when one was made
	ask   context.CancelFunc
	grace time.Duration // set before ask is called

	// host is the guest's way out; nil before there is a guest. It belongs to the
	// goroutine that runs the attempt.
	host guestHost
}

func newAttempt(ctx context.Context, inst *pb.Instance, log *instanceLog) *attempt {
	a := &attempt{inst: inst, log: log, calls: &callTracker{start: inst.GetCorrelationId(), ids: map[*byte]string{}}}
	a.asked, a.ask = context.WithCancel(correlation.With(context.WithoutCancel(ctx), inst.GetCorrelationId()))
	return a
}

// stop asks the attempt to end within grace. Only the first call counts.
func (a *attempt) stop(grace time.Duration) {
	if a.asked.Err() == nil {
		a.grace = grace
		a.ask()
	}
}

// observer is told how far an attempt has come.
type observer interface {
	// unfetched: the module could not be fetched; the next try is at retry.
	unfetched(err error, retry time.Time)
	// starting: the module is compiled.
	starting()
	// serving: guest runs.
	serving(guest runtime.Instance)
}

// run carries out an attempt and returns how it ended. When a stop was asked for
// before the guest had ended by itself, the reason is Stopped.
func (x *executor) run(a *attempt, on observer) runtime.Exit {
	in := x.runtimeOf(a.inst)
	rt := x.runtimes[in.GetName()]
	if rt == nil {
		return runtime.Exit{Reason: runtime.Internal, Message: fmt.Sprintf("this node has no runtime %q", in.GetName())}
	}
	module, ok := x.module(a, on)
	if !ok {
		return stoppedBefore("its module was there")
	}
	stdout, stderr := a.writer(pb.LogStream_LOG_STREAM_STDOUT), a.writer(pb.LogStream_LOG_STREAM_STDERR)
	defer stdout.flush()
	defer stderr.flush()
	spec, err := runtimeSpec(a.inst, module, stdout, stderr)
	if err != nil {
		return runtime.Exit{Reason: runtime.InvalidGuest, Message: err.Error()}
	}
	a.host = x.hosts(a.inst, a.log)
	guest, err := rt.Prepare(a.asked, spec, a.host)
	switch {
	case err == nil:
	case a.asked.Err() != nil:
		return stoppedBefore("it was compiled")
	case errors.Is(err, runtime.ErrModuleInvalid):
		return runtime.Exit{Reason: runtime.InvalidGuest, Message: err.Error()}
	default:
		return runtime.Exit{Reason: runtime.Internal, Message: err.Error()}
	}
	return x.runGuest(a, on, guest)
}

func stoppedBefore(what string) runtime.Exit {
	return runtime.Exit{Reason: runtime.Stopped, Message: "it ended before " + what}
}

// runtimeOf returns the runtime that the instance asks for, else the node's default.
func (x *executor) runtimeOf(inst *pb.Instance) *pb.RuntimeInfo {
	return chosenRuntime(x.offers, inst.GetSpec().GetRuntime())
}

// module gets the module, trying until it is there; it reports false when the
// attempt is asked to stop first. A module that cannot be fetched is not the
// guest's fault, so it uses up no retry of the restart policy.
func (x *executor) module(a *attempt, on observer) (moduleFile, bool) {
	for try := 1; ; try++ {
		module, err := x.modules.get(a.asked, a.inst.GetSpec().GetModule())
		if err == nil {
			return module, true
		}
		if a.asked.Err() != nil {
			return moduleFile{}, false
		}
		delay := fetchBackoff.delay(try, rand.Float64())
		on.unfetched(err, time.Now().Add(delay))
		select {
		case <-a.asked.Done():
			return moduleFile{}, false
		case <-time.After(delay):
		}
	}
}

// runGuest starts a prepared guest and waits for its end.
func (x *executor) runGuest(a *attempt, on observer, guest runtime.Instance) runtime.Exit {
	ctx := context.WithoutCancel(a.asked)
	log := x.log.With("instance", a.inst.GetId(), "generation", a.inst.GetPlacement().GetGeneration())
	ended := make(chan struct{})
	unwatch := context.AfterFunc(a.asked, func() {
		defer close(ended)
		bounded, cancel := context.WithTimeout(ctx, a.grace+stopSlack)
		defer cancel()
		if err := guest.Stop(bounded, a.grace); err != nil {
			log.ErrorContext(ctx, "a stop failed; the guest is closed by force", "error", err)
			closeGuest(ctx, log, guest)
		}
	})
	defer func() {
		if !unwatch() {
			<-ended
		}
		closeGuest(ctx, log, guest)
		a.host.end()
	}()
	on.starting()
	if err := guest.Start(ctx); err != nil {
		return startFailure(ctx, a, guest, err)
	}
	on.serving(guest)
	exit, err := guest.Wait(ctx)
	asked := a.asked.Err() != nil
	switch {
	case err != nil:
		return runtime.Exit{Reason: runtime.Internal, Message: err.Error()}
	case exit.Reason == runtime.Stopped && !asked:
		return runtime.Exit{Reason: runtime.Internal, Message: "the executor ended it without being asked"}
	case exit.Reason == runtime.Stopped:
		return runtime.Exit{Reason: runtime.Stopped}
	case exit.Reason != runtime.Completed && asked:
		return runtime.Exit{Reason: runtime.Stopped, Message: "it ended with: " + exit.Message}
	}
	return exit
}

func closeGuest(ctx context.Context, log *slog.Logger, guest runtime.Instance) {
	if err := guest.Close(ctx); err != nil {
		log.ErrorContext(ctx, "closing a guest failed", "error", err)
	}
}

// startFailure says how a guest ended that did not start: by its own account,
// which may tell more than the error, unless the two contradict each other.
func startFailure(ctx context.Context, a *attempt, guest runtime.Instance, failure error) runtime.Exit {
	if a.asked.Err() != nil {
		return stoppedBefore("it served")
	}
	if errors.Is(failure, runtime.ErrModuleInvalid) {
		return runtime.Exit{Reason: runtime.InvalidGuest, Message: failure.Error()}
	}
	reason := runtime.Internal
	switch {
	case errors.Is(failure, runtime.ErrTimeLimit):
		reason = runtime.TimeLimit
	case errors.Is(failure, runtime.ErrCrashed):
		reason = runtime.Trap
	}
	ctx, cancel := context.WithTimeout(ctx, exitPatience)
	defer cancel()
	exit, err := guest.Wait(ctx)
	told := err == nil && exit.Reason != runtime.Stopped && exit.Reason != runtime.Completed
	if told && (reason == runtime.Internal || exit.Reason != runtime.InvalidGuest) {
		return exit
	}
	return runtime.Exit{Reason: reason, Message: failure.Error()}
}

func (a *attempt) writer(stream pb.LogStream) *lineWriter {
	return &lineWriter{
		log: a.log, stream: stream, correlationID: a.calls.current,
		generation: a.inst.GetPlacement().GetGeneration(),
	}
}

// callTracker knows the correlation ids of the calls that an instance works on,
// so that its plain output can be told apart by call where that is certain.
type callTracker struct {
	start string

	mu  sync.Mutex
	ids map[*byte]string
}

// enter records a call; the returned function records its end.
func (t *callTracker) enter(id string) func() {
	key := new(byte)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ids[key] = id
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.ids, key)
	}
}

// current returns the id of the one call under way, that of the start when there
// is none, and "" when there are several.
func (t *callTracker) current() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch len(t.ids) {
	case 0:
		return t.start
	case 1:
		for _, id := range t.ids {
			return id
		}
	}
	return ""
}
