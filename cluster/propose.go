package cluster

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// enqueueLimit is the longest a write waits to be taken by Raft.
const enqueueLimit = 10 * time.Second

// Propose commits a command and returns what it came to. It sets the command's
// time, and its correlation id from ctx when it has none; cmd must not be used
// by anybody else meanwhile. The error is always an *apierror.Error that says
// what became of the command, and its request id:
//
//   - the command's own refusal (CommandResult.error) with outcome=failed and its
//     index: it is committed that nothing happened;
//   - NO_LEADER, TIMEOUT, INVALID_REQUEST or CONFLICT with outcome=failed when it
//     never reached the log: this peer does not lead, is too busy, or restores a
//     snapshot;
//   - NO_LEADER, TIMEOUT, COMMUNICATION_FAILURE or INTERNAL_ERROR with
//     outcome=unknown when leadership was lost or ctx ended on the way: the command
//     may have happened, or may still; propose it again with the same request id.
func (p *Peer) Propose(ctx context.Context, cmd *pb.Command) (*pb.CommandResult, error) {
	result, err := p.propose(ctx, cmd)
	return result, apierror.OfWrite(ctx, err, cmd.GetRequestId())
}

func (p *Peer) propose(ctx context.Context, cmd *pb.Command) (*pb.CommandResult, error) {
	start := time.Now()
	r, leave := p.enter()
	defer leave()
	if r == nil {
		return nil, p.noLeader()
	}
	if err := p.refuseWhenFull(cmd); err != nil {
		return nil, err
	}
	if cmd.GetCorrelationId() == "" {
		cmd.CorrelationId = correlation.ID(ctx)
	}
	future, err := p.enqueue(ctx, r, cmd)
	if err != nil {
		return nil, err
	}
	if plant.On(plant.AcknowledgeBeforeCommit) && cmd.GetSession() != nil {
		return &pb.CommandResult{}, nil
	}
	if err := p.flights.await(ctx, future); err != nil {
		if ctx.Err() != nil {
			return nil, contextError(ctx)
		}
		return nil, p.raftError(err)
	}
	p.metrics.apply.Observe(time.Since(start).Seconds())
	result, ok := future.Response().(*pb.CommandResult)
	if stopped, isError := future.Response().(error); isError {
		return nil, unknown(pb.ErrorCode_ERROR_CODE_NO_LEADER, stopped.Error())
	}
	if !ok {
		return nil, unknown(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, fmt.Sprintf("the state answered %T to a command", future.Response()))
	}
	if refusal := apierror.FromProto(result.GetError()); refusal != nil {
		if refusal.Detail(DetailOutcome) != "" {
			// The state does not stand by it for other attempts.
			return nil, refusal
		}
		return nil, refusal.With(DetailOutcome, OutcomeFailed).
			With(apierror.DetailIndex, strconv.FormatUint(result.GetIndex(), 10))
	}
	return result, nil
}

// enter returns Raft when this peer leads and does not stop, else nil. Until
// leave is called the peer does not shut Raft down, which could forget to answer.
func (p *Peer) enter() (r *raft.Raft, leave func()) {
	p.flights.begin()
	if p.role.leads.Load() && !p.role.closing.Load() {
		r = p.raft.Load()
	}
	return r, p.flights.end
}

// enqueue stamps a command and gives it to Raft. Both happen in one turn, so
// that times never go back within the log.
func (p *Peer) enqueue(ctx context.Context, r *raft.Raft, cmd *pb.Command) (raft.ApplyFuture, error) {
	release, err := p.stamp.take(ctx)
	if err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "the leader has more to write than it can").
			With(DetailOutcome, OutcomeFailed).Next("repeat the call later")
	}
	defer release()
	cmd.Time = timestamppb.New(p.stamp.next(p.state.View().Time()))
	data, err := fsm.EncodeCommand(cmd)
	if err != nil {
		return nil, notEncoded(err)
	}
	return r.Apply(data, remaining(ctx, enqueueLimit)), nil
}

// notEncoded says that a command cannot be written into the log.
func notEncoded(err error) error {
	code := pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR
	if errors.Is(err, fsm.ErrCommandTooLarge) {
		code = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
	}
	return apierror.New(code, "%s", err).With(DetailOutcome, OutcomeFailed)
}

// stamp hands out times that never go back, one holder at a time.
type stamp struct {
	turn chan struct{}
	now  func() time.Time
	last time.Time
}

func newStamp(now func() time.Time) *stamp { return &stamp{turn: make(chan struct{}, 1), now: now} }

func (s *stamp) take(ctx context.Context) (release func(), err error) {
	select {
	case s.turn <- struct{}{}:
		return func() { <-s.turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// next returns the clock's time, or the latest time known if that is later. The
// caller holds the turn.
func (s *stamp) next(committed time.Time) time.Time {
	now := s.now()
	for _, t := range []time.Time{s.last, committed} {
		if now.Before(t) {
			now = t
		}
	}
	s.last = now
	return now
}

// flights counts the calls that Raft has not answered yet.
type flights struct {
	mu   sync.Mutex
	n    int
	idle chan struct{}
}

func newFlights() *flights {
	idle := make(chan struct{})
	close(idle)
	return &flights{idle: idle}
}

// await waits for a future, or until ctx ends; the future's answer is then
// dropped when it comes.
func (f *flights) await(ctx context.Context, future raft.Future) error {
	f.begin()
	done := make(chan error, 1)
	go func() {
		defer f.end()
		done <- future.Error()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *flights) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n == 0 {
		f.idle = make(chan struct{})
	}
	f.n++
}

func (f *flights) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n--; f.n == 0 {
		close(f.idle)
	}
}

// drain waits until nothing is in flight and reports whether that came to be within limit.
func (f *flights) drain(limit time.Duration) bool {
	f.mu.Lock()
	idle := f.idle
	f.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-idle:
		return true
	case <-timer.C:
		return false
	}
}
