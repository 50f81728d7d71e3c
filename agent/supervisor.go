package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// supervisor keeps one instance as it is wanted. Its goroutine asks step what to
// do and does that; an attempt has a goroutine of its own, which the supervisor
// outlives.
type supervisor struct {
	id     string
	worker *worker
	log    *instanceLog
	wake   chan struct{}

	mu      sync.Mutex
	inst    *pb.Instance // as assigned; shared, never modified
	gone    bool
	have    have
	retries int
	status  *pb.InstanceStatus // replaced, never modified
	attempt *attempt           // nil without one
	cause   cause              // why attempt was asked to stop
	guest   runtime.Instance   // set while it takes calls
}

// newSupervisor takes up an instance with what the registry, or the journal,
// recorded of it: what has ended for good in this generation stays ended.
func newSupervisor(w *worker, inst *pb.Instance) *supervisor {
	s := &supervisor{
		id: inst.GetId(), worker: w, inst: inst, wake: make(chan struct{}, 1),
		log: w.logs.open(inst.GetId(), inst.GetName()),
	}
	generation := inst.GetPlacement().GetGeneration()
	s.have = have{generation: generation, restartEpoch: inst.GetRestartEpoch()}
	s.status = &pb.InstanceStatus{
		State: pb.InstanceState_INSTANCE_STATE_ASSIGNED, Generation: generation,
		CrashCount: inst.GetStatus().GetCrashCount(), Retries: inst.GetStatus().GetRetries(),
	}
	s.retries = int(s.status.GetRetries())
	recorded := inst.GetStatus()
	if recorded.GetGeneration() != generation {
		return s
	}
	s.status.Attempt = recorded.GetAttempt()
	switch recorded.GetState() {
	case pb.InstanceState_INSTANCE_STATE_FAILED:
		s.have.phase = phaseDone
	case pb.InstanceState_INSTANCE_STATE_COMPLETED:
		if inst.GetSpec().GetRestart().GetPolicy() == restartAlways {
			return s
		}
		s.have.phase = phaseDone
	case pb.InstanceState_INSTANCE_STATE_STOPPED:
		s.have.phase = phaseStopped
	default:
		return s
	}
	s.status = cloneStatus(recorded)
	return s
}

func cloneStatus(st *pb.InstanceStatus) *pb.InstanceStatus {
	out := &pb.InstanceStatus{}
	proto.Merge(out, st)
	return out
}

// poke makes the supervisor look again.
func (s *supervisor) poke() { poke(s.wake) }

// assign takes a newer record of the instance.
func (s *supervisor) assign(inst *pb.Instance) {
	s.mu.Lock()
	s.inst, s.gone = inst, false
	s.mu.Unlock()
	s.poke()
}

// remove says that the instance is no longer assigned to this node.
func (s *supervisor) remove() {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	s.poke()
}

// run supervises until the instance is gone, or until ctx has ended and the
// guest with it.
func (s *supervisor) run(ctx context.Context) {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	done := ctx.Done()
	for {
		act := s.decide(ctx.Err() != nil)
		var due <-chan time.Time
		switch act.verb {
		case verbStart:
			a := s.begin(ctx)
			attempts.Go(func() {
				exit := s.worker.exec.run(a, &progress{s: s, a: a})
				s.settleCalls(ctx, a)
				s.end(ctx, a, exit)
			})
		case verbStop:
			s.stop(ctx, act.cause)
		case verbSettle:
			s.settle()
		case verbForget:
			if s.worker.forget(s, ctx.Err() != nil) {
				return
			}
		case verbWait:
			due = time.After(time.Until(act.until))
			fallthrough
		case verbNone:
			select {
			case <-s.wake:
			case <-due:
			case <-done:
				done = nil
			}
		}
	}
}

// decide asks step for the next action.
func (s *supervisor) decide(shutdown bool) action {
	s.mu.Lock()
	epoch := s.inst.GetPlacement().GetNodeEpoch()
	s.mu.Unlock()
	held := !s.worker.lease.covers(epoch)
	s.mu.Lock()
	defer s.mu.Unlock()
	leaving := s.inst.GetLeaving() && s.inst.GetDesiredRunning()
	return step(want{
		gone: s.gone, shutdown: shutdown,
		run:          s.inst.GetDesiredRunning() && !leaving,
		leaving:      leaving,
		held:         held && tiedToLease(s.inst),
		generation:   s.inst.GetPlacement().GetGeneration(),
		restartEpoch: s.inst.GetRestartEpoch(),
	}, s.have, time.Now())
}

// adoptLocked takes up the wanted run: in a new generation attempts count anew,
// and what the registry counted on other nodes is kept.
func (s *supervisor) adoptLocked() {
	generation := s.inst.GetPlacement().GetGeneration()
	switch {
	case s.inst.GetRestartEpoch() != s.have.restartEpoch:
		s.retries = 0
	case generation != s.have.generation:
		s.retries = int(s.inst.GetStatus().GetRetries())
	}
	if generation != s.status.GetGeneration() {
		s.status = &pb.InstanceStatus{
			Generation: generation,
			Retries:    uint32(s.retries),
			CrashCount: max(s.status.GetCrashCount(), s.inst.GetStatus().GetCrashCount()),
		}
	}
	s.have.generation, s.have.restartEpoch, s.have.left = generation, s.inst.GetRestartEpoch(), false
}

// begin records a new attempt, which the caller runs.
func (s *supervisor) begin(ctx context.Context) *attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.have.phase == phaseWaiting {
		s.worker.metrics.restarts.Inc()
	}
	s.adoptLocked()
	s.have.phase = phaseLive
	s.attempt, s.cause = newAttempt(ctx, s.inst, s.log), causeNone
	s.status = &pb.InstanceStatus{
		Generation: s.have.generation, Attempt: s.status.GetAttempt(), CrashCount: s.status.GetCrashCount(),
		Retries: uint32(s.retries),
	}
	in := s.worker.exec.runtimeOf(s.inst)
	s.changeLocked(func(st *pb.InstanceStatus) {
		st.State = pb.InstanceState_INSTANCE_STATE_PREPARING
		st.Runtime, st.Isolation = in.GetName(), in.GetIsolation()
		st.Attempt++
	})
	return s.attempt
}

// stop asks the present attempt to end. Where the old run has lost the right to
// have effects there is nothing to wait for.
func (s *supervisor) stop(ctx context.Context, why cause) {
	grace := s.worker.exec.grace
	if why == causeSuperseded || why == causeLease {
		grace = 0
	}
	s.mu.Lock()
	if s.have.phase != phaseLive {
		s.mu.Unlock() // it ended by itself in the meantime
		return
	}
	if why == causeRemoved && s.inst.GetPlacement().GetNodeEpoch() != s.worker.lease.epoch() {
		grace = 0 // it was placed in an epoch that is over
	}
	s.have.phase, s.cause, s.guest = phaseEnding, why, nil
	a := s.attempt
	s.changeLocked(func(st *pb.InstanceStatus) {
		st.State, st.Message, st.NextRetryAt = pb.InstanceState_INSTANCE_STATE_STOPPING, why.String(), nil
	})
	s.mu.Unlock()
	s.worker.log.InfoContext(ctx, "stopping an instance", "instance", s.id, "reason", why.String())
	a.stop(grace)
}

// settle records that the wanted run is stopped, without a guest to stop.
func (s *supervisor) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.adoptLocked()
	why := causeAsked
	if s.inst.GetLeaving() {
		why = causeLeaving
	}
	s.have.phase, s.have.left = phaseStopped, why == causeLeaving
	s.changeLocked(func(st *pb.InstanceStatus) {
		st.State, st.Reason = pb.InstanceState_INSTANCE_STATE_STOPPED, pb.ExitReason_EXIT_REASON_STOPPED
		st.Message, st.NextRetryAt = why.String(), nil
		st.FinishedAt = timestamppb.New(time.Now())
	})
}

// settleCalls waits until nothing that the attempt called can have an effect any
// more: its end, once reported, may let the next generation begin elsewhere. It
// waits for nothing where the end of the node's epoch, or a newer generation,
// decides about that, nor when the agent ends.
func (s *supervisor) settleCalls(ctx context.Context, a *attempt) {
	s.mu.Lock()
	why := s.cause
	s.mu.Unlock()
	switch why {
	case causeNone, causeAsked, causeLeaving:
	default:
		return
	}
	if a.host == nil {
		return
	}
	if err := a.host.settle(ctx); err != nil {
		s.worker.log.WarnContext(ctx, "an instance ended with calls whose outcome is not known", "instance", s.id, "error", err)
	}
}

// end takes up how an attempt ended.
func (s *supervisor) end(ctx context.Context, a *attempt, exit runtime.Exit) {
	defer s.poke()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempt, s.guest = nil, nil
	now := time.Now()
	if s.cause == causeShutdown && exit.Reason == runtime.Stopped {
		// The registry keeps STOPPING: the instance is still wanted, and the end
		// of the node's lease decides where it runs next.
		s.have.phase = phaseStopped
		return
	}
	if exit.Reason == runtime.Stopped && (s.cause == causeLease || s.cause == causeRestart) {
		// This generation runs again. STOPPED is kept for an end after which it does
		// not: it lets the instance be placed elsewhere.
		s.have.phase, s.have.due = phaseWaiting, now
		s.changeLocked(func(st *pb.InstanceStatus) {
			st.Reason, st.FinishedAt = pb.ExitReason_EXIT_REASON_STOPPED, timestamppb.New(now)
		})
		return
	}
	s.have.left = exit.Reason == runtime.Stopped && s.cause == causeLeaving
	if exit.Reason == runtime.Stopped {
		exit.Message = strings.TrimSuffix(s.cause.String()+"; "+exit.Message, "; ")
	}
	var ran time.Duration
	if !a.served.IsZero() {
		ran = now.Sub(a.served)
	}
	v := restartPolicyOf(a.inst.GetSpec().GetRestart()).after(exit, ran, s.retries, rand.Float64())
	if s.have.left {
		v.retries = s.retries // moving is no new beginning
	}
	s.have.phase, s.have.due, s.retries = v.phase, now.Add(v.delay), v.retries
	s.changeLocked(func(st *pb.InstanceStatus) { ended(st, exit, v, now) })
	if v.crashed {
		s.worker.metrics.crashes.WithLabelValues(exit.Reason.String()).Inc()
	}
	s.noteLocked(a, exit, v)
	s.worker.log.InfoContext(ctx, "an instance ended", "instance", s.id, "generation", s.have.generation,
		"attempt", s.status.GetAttempt(), "state", stateLabel(s.status.GetState()), "message", exit.Message)
}

// ended writes the end of an attempt into its status.
func ended(st *pb.InstanceStatus, exit runtime.Exit, v verdict, now time.Time) {
	st.Reason, st.ExitCode, st.Message = pb.ExitReason(exit.Reason), exit.Code, oneLine(exit.Message)
	st.FinishedAt, st.NextRetryAt = timestamppb.New(now), nil
	st.Retries = uint32(v.retries)
	if v.phase == phaseWaiting {
		st.NextRetryAt = timestamppb.New(now.Add(v.delay))
	}
	if v.crashed {
		st.CrashCount++
	}
	switch {
	case exit.Reason == runtime.Stopped:
		st.State = pb.InstanceState_INSTANCE_STATE_STOPPED
	case exit.Reason == runtime.Completed:
		st.State = pb.InstanceState_INSTANCE_STATE_COMPLETED
	case v.phase == phaseWaiting:
		st.State = pb.InstanceState_INSTANCE_STATE_CRASHED
	default:
		st.State = pb.InstanceState_INSTANCE_STATE_FAILED
	}
}

// noteLocked tells the reader of the instance's log how an attempt ended.
func (s *supervisor) noteLocked(a *attempt, exit runtime.Exit, v verdict) {
	level := pb.LogLevel_LOG_LEVEL_INFO
	if v.crashed {
		level = pb.LogLevel_LOG_LEVEL_ERROR
	}
	text := fmt.Sprintf("attempt %d %s", s.status.GetAttempt(), stateLabel(s.status.GetState()))
	if exit.Message != "" {
		text += ": " + exit.Message
	}
	if v.phase == phaseWaiting {
		text += fmt.Sprintf("; starts again in %s", v.delay.Round(time.Millisecond))
	}
	s.log.note(level, a.inst.GetPlacement().GetGeneration(), a.inst.GetCorrelationId(), text)
}

// changeLocked replaces the status by a changed copy and reports it.
func (s *supervisor) changeLocked(change func(*pb.InstanceStatus)) {
	st := cloneStatus(s.status)
	change(st)
	s.status = st
	s.worker.report(s.reportLocked())
}

// reportLocked is what the control plane is told of the instance as it stands.
func (s *supervisor) reportLocked() *pb.InstanceReport {
	return &pb.InstanceReport{
		InstanceId: s.id, Status: s.status, RestartEpoch: s.have.restartEpoch,
		Left: s.have.left && s.status.GetState() == pb.InstanceState_INSTANCE_STATE_STOPPED,
	}
}

// progress passes on how far one attempt has come, unless it was asked to stop.
type progress struct {
	s *supervisor
	a *attempt
}

// applyLocked is called with the supervisor's mutex held.
func (p *progress) applyLocked(change func(*pb.InstanceStatus)) bool {
	if p.s.have.phase != phaseLive || p.s.attempt != p.a {
		return false
	}
	p.s.changeLocked(change)
	return true
}

func (p *progress) unfetched(err error, retry time.Time) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.applyLocked(func(st *pb.InstanceStatus) {
		st.Reason, st.Message = pb.ExitReason_EXIT_REASON_MODULE_UNAVAILABLE, oneLine(err.Error())
		st.NextRetryAt = timestamppb.New(retry)
	})
}

func (p *progress) starting() {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.applyLocked(func(st *pb.InstanceStatus) {
		st.State, st.Reason = pb.InstanceState_INSTANCE_STATE_STARTING, pb.ExitReason_EXIT_REASON_UNSPECIFIED
		st.Message, st.NextRetryAt = "", nil
	})
}

func (p *progress) serving(guest runtime.Instance) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.a.served = time.Now()
	if p.applyLocked(func(st *pb.InstanceStatus) {
		st.State, st.StartedAt = pb.InstanceState_INSTANCE_STATE_RUNNING, timestamppb.New(p.a.served)
	}) {
		p.s.guest = guest
	}
}

// String says in a few words why an instance is stopped.
func (c cause) String() string {
	switch c {
	case causeAsked:
		return "stopped as asked"
	case causeRemoved:
		return "no longer assigned to this node"
	case causeSuperseded:
		return "a newer generation of the placement exists"
	case causeLeaving:
		return "moves to another node"
	case causeRestart:
		return "restarted as asked"
	case causeLease:
		return "the node's lease has ended"
	case causeShutdown:
		return "the node's agent is shutting down"
	default:
		return "not stopped"
	}
}
