package schedule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxDecisions bounds one PlaceCommand, so that an entry of the log stays small
// and other commands get their turn between two of them.
const maxDecisions = 1000

// actor names this duty in the commands it causes.
const actor = "scheduler"

// A proposal that failed although this peer still leads is made again after
// the first wait, then after twice the last, up to the second.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 10 * time.Second
)

// Viewer reads the registry.
type Viewer interface {
	// View returns the registry as of one index.
	View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error)
}

// Proposer commits commands.
type Proposer interface {
	// Propose returns once the command is committed and applied here.
	Propose(ctx context.Context, cmd *pb.Command) (*pb.CommandResult, error)
}

// Config holds what a Scheduler needs. All but Registerer and Logger are required.
type Config struct {
	// Viewer reads the registry of this peer.
	Viewer Viewer
	// Proposer commits the decisions.
	Proposer Proposer
	// Logger gets what was decided; nil discards it.
	Logger *slog.Logger
	// Registerer gets the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Scheduler is the leader's duty that places what is unplaced.
type Scheduler struct {
	viewer   Viewer
	proposer Proposer
	log      *slog.Logger
	metrics  *metrics
}

// New returns a Scheduler; it does nothing before Run.
func New(cfg Config) (*Scheduler, error) {
	if cfg.Viewer == nil || cfg.Proposer == nil {
		return nil, errors.New("a scheduler needs a viewer and a proposer")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	return &Scheduler{viewer: cfg.Viewer, proposer: cfg.Proposer, log: cfg.Logger, metrics: m}, nil
}

// Run places instances and providers until ctx ends or this peer cannot commit
// any more; run it only while this peer leads. It returns the reason, which is
// ctx.Err() when ctx ended. It starts from nothing each time, so that a term
// never works with what an earlier one remembered.
func (s *Scheduler) Run(ctx context.Context) error {
	p := &planner{table: &table{}, proposed: map[subject]attempt{}}
	defer s.metrics.unplaced.Set(0)
	backoff := firstBackoff
	for {
		// The state of this peer is enough: it has applied all that was committed
		// before it began to lead, and nobody else places.
		view, err := s.viewer.View(ctx, &pb.ReadOptions{Stale: true})
		if err != nil {
			return fmt.Errorf("read the registry: %w", err)
		}
		decisions, ws := p.plan(view)
		s.metrics.unplaced.Set(float64(p.blocked))
		if len(decisions) == 0 {
			if err := ws.WatchCtx(ctx); err != nil {
				return err
			}
			continue
		}
		switch err := s.propose(ctx, decisions); {
		case err == nil:
			backoff = firstBackoff
		case ctx.Err() != nil:
			return ctx.Err()
		case apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_NO_LEADER:
			return err
		default:
			s.log.ErrorContext(ctx, "decisions were not committed", "decisions", len(decisions), "retry_in", backoff, "error", err)
			p.forget(decisions)
			if !pause.For(ctx, backoff) {
				return ctx.Err()
			}
			backoff = min(2*backoff, lastBackoff)
		}
	}
}

func (s *Scheduler) propose(ctx context.Context, decisions []*pb.PlaceDecision) error {
	cmd := &pb.Command{
		Actor:   actor,
		Payload: &pb.Command_Place{Place: &pb.PlaceCommand{Decisions: decisions}},
	}
	result, err := s.proposer.Propose(ctx, cmd)
	if err != nil {
		return fmt.Errorf("commit %d placements: %w", len(decisions), err)
	}
	s.account(ctx, decisions, result.GetIds())
	return nil
}

// account counts and logs the decisions that had an effect; done are their ids
// in the order of the decisions. The others were void.
func (s *Scheduler) account(ctx context.Context, decisions []*pb.PlaceDecision, done []string) {
	for _, d := range decisions {
		kind, id := "instance", d.GetInstanceId()
		if id == "" {
			kind, id = "provider", fsm.ReplicaName(d.GetProviderId(), d.GetReplica())
		}
		if len(done) == 0 || done[0] != id {
			s.log.DebugContext(ctx, "a decision was void", kind, id, "node", d.GetNodeId(), "seen_generation", d.GetSeenGeneration())
			continue
		}
		done = done[1:]
		if d.GetNodeId() == "" {
			s.metrics.refused.WithLabelValues(kind).Inc()
			s.log.InfoContext(ctx, "no node can take it", kind, id, "reason", d.GetMessage())
			continue
		}
		s.metrics.placed.WithLabelValues(kind).Inc()
		s.log.DebugContext(ctx, "placed", kind, id, "node", d.GetNodeId(), "generation", d.GetSeenGeneration()+1)
	}
}
