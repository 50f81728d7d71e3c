package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The defaults of Config.
const (
	DefaultLeaseTTL          = 3 * time.Second
	DefaultRenewalsPerSecond = 1000
)

// Peer is the control-plane peer that a Dispatcher works for.
type Peer interface {
	// View returns the registry: with Stale as this peer has it, else linearizably,
	// which proves that this peer leads.
	View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error)
	// Propose returns once the command is committed and applied here; a refusal is
	// the error.
	Propose(ctx context.Context, cmd *pb.Command) (*pb.CommandResult, error)
	// Leader returns the leader's id and API address, "" when unknown.
	Leader() (id, apiAddress string)
}

// Config holds what a Dispatcher needs. Only Peer is required. The lease
// settings must be the same on all peers: a new leader's grace is computed from
// its own.
type Config struct {
	// Peer is this control-plane peer.
	Peer Peer
	// LeaseTTL is the shortest lease; 0 means DefaultLeaseTTL.
	LeaseTTL time.Duration
	// RenewalsPerSecond is how many renewals the leader is to handle at most; with
	// more nodes leases get longer. 0 means DefaultRenewalsPerSecond.
	RenewalsPerSecond int
	// Clock measures leases; nil means the system's.
	Clock Clock
	// Logger gets what happens to sessions; nil discards it.
	Logger *slog.Logger
	// Registerer gets the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Dispatcher serves AgentSessionService. Its methods may be called from any
// goroutine at any time.
type Dispatcher struct {
	pb.UnimplementedAgentSessionServiceServer

	peer     Peer
	clock    Clock
	log      *slog.Logger
	metrics  *metrics
	settings leaseSettings
	// present is the term in which this peer leads; nil while it does not.
	present atomic.Pointer[term]
}

// New returns a Dispatcher that answers NO_LEADER until Run is called.
func New(cfg Config) (*Dispatcher, error) {
	if cfg.Peer == nil {
		return nil, errors.New("a dispatcher needs a peer")
	}
	if cfg.LeaseTTL == 0 {
		cfg.LeaseTTL = DefaultLeaseTTL
	}
	if cfg.RenewalsPerSecond == 0 {
		cfg.RenewalsPerSecond = DefaultRenewalsPerSecond
	}
	if cfg.LeaseTTL < 0 || cfg.RenewalsPerSecond < 0 {
		return nil, errors.New("lease settings must be positive")
	}
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	return &Dispatcher{
		peer: cfg.Peer, clock: cfg.Clock, log: cfg.Logger, metrics: m,
		settings: leaseSettings{ttl: cfg.LeaseTTL, perSecond: cfg.RenewalsPerSecond},
	}, nil
}

// Register adds AgentSessionService to a server.
func (d *Dispatcher) Register(server grpc.ServiceRegistrar) {
	pb.RegisterAgentSessionServiceServer(server, d)
}

// Run owns the leases until ctx ends or this peer cannot lead any more; run it
// only while this peer leads. It returns the reason, which is ctx.Err() when ctx
// ended. When it returns every session stream ends with NO_LEADER.
func (d *Dispatcher) Run(ctx context.Context) error {
	t := newTerm(d.peer, d.clock, d.settings, d.log, d.metrics)
	defer d.metrics.reset()
	defer close(t.ended)
	// Grace first: nobody may ask before every node that is READY has its lease.
	if _, err := t.syncLeases(ctx); err != nil {
		return err
	}
	d.present.Store(t)
	defer d.present.Store(nil)
	return t.run(ctx)
}

// term returns the present term, or NO_LEADER with where the leader is.
func (d *Dispatcher) term() (*term, error) {
	if t := d.present.Load(); t != nil {
		return t, nil
	}
	return nil, d.noLeader()
}

func (d *Dispatcher) noLeader() error {
	id, address := d.peer.Leader()
	if address == "" {
		return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "no leader is known at the moment").
			Next("try again, here or at another peer")
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "sessions are kept by the leader, %s", id).
		With("leader_id", id).
		With("leader_api_address", address).
		Next("open the session at %s", address)
}

// authorize allows a node's own agent only.
func authorize(ctx context.Context, nodeID string) error {
	caller, ok := identity.Caller(ctx)
	if ok && caller.IsWorker() && caller.Name == nodeID {
		return nil
	}
	who := "an unknown caller"
	if ok {
		who = caller.String()
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "only the agent of node %q may do this", nodeID).
		With("node", nodeID).
		With("caller", who).
		Next("use the certificate of a worker named %s", nodeID)
}

// registerAgain tells an agent that its epoch is over.
func registerAgain(h holder, reason error) error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the session of node %q is over: %s", h.node, reason).
		With("node", h.node).
		Next("register again")
}
