// Package plane joins a control-plane peer with everything that it does for
// others: the client API, the leader's placement, and the sessions of agents. A
// node and the simulation put their peers together with it, so that what is
// simulated is what runs.
//
// It holds no logic of its own, and never imports agent, runtime or provider.
package plane

import (
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cluster/control"
	"github.com/wasmatrix/wasmatrix/cluster/dispatch"
	"github.com/wasmatrix/wasmatrix/cluster/schedule"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Config is what the services work with. Peer, Modules, AgentConn and Logger are required.
type Config struct {
	// Peer is the peer; it has not begun to run.
	Peer *cluster.Peer
	// Modules keeps the modules' bytes.
	Modules control.Modules
	// AgentConn returns a shared connection to the agent at host:port; it stays open.
	AgentConn func(address string) (grpc.ClientConnInterface, error)
	// Clock measures leases; nil means the system's.
	Clock dispatch.Clock
	// Logger takes what the services have to say.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

// Services are what a peer serves.
type Services struct {
	peer       *cluster.Peer
	control    *control.Service
	dispatcher *dispatch.Dispatcher
}

// New makes the services and gives the peer its duties. It starts nothing.
func New(cfg Config) (*Services, error) {
	s := &Services{peer: cfg.Peer}
	var err error
	s.control, err = control.New(control.Config{
		Proposer: cfg.Peer, Viewer: cfg.Peer, LeaderConn: cfg.Peer.LeaderConn, Modules: cfg.Modules, AgentConn: cfg.AgentConn,
		Explain: func(v fsm.View, i *pb.Instance) []*pb.NodeVerdict { return schedule.Explain(v, i) },
		Logger:  cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	scheduler, err := schedule.New(schedule.Config{Viewer: cfg.Peer, Proposer: cfg.Peer, Logger: cfg.Logger, Registerer: cfg.Registerer})
	if err != nil {
		return nil, err
	}
	s.dispatcher, err = dispatch.New(dispatch.Config{Peer: cfg.Peer, Clock: cfg.Clock, Logger: cfg.Logger, Registerer: cfg.Registerer})
	if err != nil {
		return nil, err
	}
	cfg.Peer.Lead(scheduler.Run, s.dispatcher.Run)
	return s, nil
}

// Register adds the services to a server, ClusterService of the peer included.
func (s *Services) Register(server grpc.ServiceRegistrar) {
	s.peer.Register(server)
	s.control.Register(server)
	s.dispatcher.Register(server)
}

// Close ends the streams that would otherwise go on until their clients leave.
func (s *Services) Close() { s.control.Close() }
