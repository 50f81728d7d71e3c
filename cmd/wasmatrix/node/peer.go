package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/cluster/modules"
	"github.com/wasmatrix/wasmatrix/cluster/plane"
	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/internal/faults"
	"github.com/wasmatrix/wasmatrix/rpc"
)

// ErrCertificate is returned when a node has no certificate that speaks for it.
var ErrCertificate = errors.New("no usable certificate")

// ErrPort is returned when a node cannot listen on one of its addresses.
var ErrPort = errors.New("address not usable")

// rpcGrace is how long calls under way may take when a server stops.
const rpcGrace = 3 * time.Second

// peerProcess is everything of one control-plane peer.
type peerProcess struct {
	cfg      Config
	log      *slog.Logger
	id       *identity.Identity
	registry *prometheus.Registry  // what is served
	metrics  prometheus.Registerer // where the parts register; it tells this process's series from the agent's
	network  *faults.Injector      // nil but in a development cluster

	peer       *cluster.Peer
	services   *plane.Services
	replicator *modules.Replicator
	store      *modules.Store
	pool       *identity.Pool
	server     *grpc.Server
	health     *health.Server
}

func newPeerProcess(cfg Config, log *slog.Logger) (*peerProcess, error) {
	p := &peerProcess{cfg: cfg, log: log.With("peer", cfg.Node.Name)}
	p.registry, p.metrics = newRegistry("peer")
	var err error
	if p.id, err = loadIdentity(cfg); err != nil {
		return nil, err
	}
	if p.network, p.id, err = openNetwork(cfg, p.id, p.log); err != nil {
		return nil, err
	}
	p.pool = p.id.NewPool(anyNode, rpc.DialOptions()...)
	if err := p.newPeer(log); err != nil {
		return nil, err
	}
	if err := p.newServices(); err != nil {
		return nil, err
	}
	p.newServer()
	return p, nil
}

// newPeer makes the peer; the cluster package names it in its log itself.
func (p *peerProcess) newPeer(log *slog.Logger) (err error) {
	var link gossip.Link
	if p.network != nil {
		link = p.network
	}
	key, err := p.cfg.Join.gossipKey()
	if err != nil {
		return fmt.Errorf("join.gossip_key: %w", err)
	}
	deadPeerAfter := *p.cfg.Raft.DeadPeerAfter
	if deadPeerAfter == 0 {
		deadPeerAfter = -1
	}
	p.peer, err = cluster.New(cluster.Config{
		ID: p.cfg.Node.Name, Cluster: p.cfg.Cluster, Version: Version,
		DataDir:  p.cfg.DataDir,
		RaftBind: p.cfg.bound(portRaft), RaftAdvertise: p.cfg.advertised(portRaft), APIAdvertise: p.cfg.APIAddress(),
		Gossip: gossip.Config{
			Bind: p.cfg.bound(portGossip), Advertise: p.cfg.GossipAddress(), Join: p.cfg.Join.Peers, Key: key, Logger: log, Link: link,
		},
		BootstrapExpect: p.cfg.Join.BootstrapExpect,
		Timers:          cluster.Timers{Heartbeat: p.cfg.Raft.HeartbeatTimeout, Stabilization: p.cfg.Raft.StabilizationTime, DeadPeerAfter: deadPeerAfter},
		Snapshots: cluster.Snapshots{
			Threshold: p.cfg.Raft.SnapshotThreshold, Interval: p.cfg.Raft.SnapshotInterval, Trailing: p.cfg.Raft.TrailingLogs,
		},
		Identity: p.id, Logger: log, Registerer: p.metrics,
	})
	return err
}

func (p *peerProcess) newServices() (err error) {
	if p.store, err = modules.NewStore(modules.StoreConfig{Dir: p.cfg.DataDir}); err != nil {
		return err
	}
	p.replicator, err = modules.NewReplicator(modules.Config{
		Self: p.cfg.Node.Name, Store: p.store, Registry: p.peer, Peers: p.peerRefs, Conn: p.conn, Logger: p.log, Metrics: p.metrics,
	})
	if err != nil {
		return err
	}
	p.services, err = plane.New(plane.Config{Peer: p.peer, Modules: p.replicator, AgentConn: p.conn, Logger: p.log, Registerer: p.metrics})
	return err
}

func (p *peerProcess) newServer() {
	opts := rpc.ServerOptions(rpc.ServerConfig{Identity: p.id, Logger: p.log, Registerer: p.metrics})
	p.server = grpc.NewServer(append(opts, grpc.ChainUnaryInterceptor(p.peer.ForwardUnary()))...)
	p.services.Register(p.server)
	modules.NewService(p.store, p.log).Register(p.server)
	p.health = health.NewServer()
	rpc.RegisterHealthAndReflection(p.server, p.health)
}

// conn returns a shared connection to a node's server.
func (p *peerProcess) conn(address string) (grpc.ClientConnInterface, error) {
	return p.pool.Conn(address)
}

// peerRefs lists the peers of the Raft configuration for the replication of modules.
func (p *peerProcess) peerRefs(context.Context) []modules.PeerRef {
	var refs []modules.PeerRef
	for _, s := range p.peer.Peers() {
		refs = append(refs, modules.PeerRef{ID: s.Id, Address: s.ApiAddress, Voter: s.Voter})
	}
	return refs
}

// Run serves until ctx ends, then stops in the reverse order: new calls are
// refused, those under way finish, leadership is handed over, files are closed.
// It calls opened once the peer holds its ports.
func (p *peerProcess) Run(ctx context.Context, opened func()) (err error) {
	defer func() { err = errors.Join(err, p.pool.Close()) }()
	api, err := listen(p.network, p.cfg.bound(portAPI), "the API")
	if err != nil {
		return err
	}
	httpListeners, err := p.listenHTTP()
	if err != nil {
		return errors.Join(err, api.Close())
	}
	opened()
	// Raft and gossip end last: a planned stop hands leadership over while the
	// server can still answer.
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBelow()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer stopBelow()
		return p.endSoon(p.peer.Run(below))
	})
	g.Go(func() error {
		err := p.replicator.Run(ctx)
		return ignoreEnd(ctx, err)
	})
	g.Go(func() error {
		return serveGRPC(ctx, p.server, api, func() { p.health.Shutdown(); p.services.Close() }, stopBelow)
	})
	g.Go(func() error { return p.network.Run(ctx) })
	handler := newHTTPHandler(p.gatherer(), p.checks())
	for _, l := range httpListeners {
		g.Go(func() error { return serveHTTP(ctx, l, handler) })
	}
	p.health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	p.log.Info("peer serves", "api", p.cfg.APIAddress(), "raft", p.cfg.advertised(portRaft), "gossip", p.cfg.GossipAddress(), "version", Version)
	return g.Wait()
}

func (p *peerProcess) listenHTTP() ([]net.Listener, error) {
	l, err := listen(nil, p.cfg.bound(portHTTP), "health and metrics")
	if err != nil {
		return nil, err
	}
	if p.cfg.Telemetry.MetricsAddr == "off" {
		return []net.Listener{l}, nil
	}
	m, err := listen(nil, p.cfg.Telemetry.MetricsAddr, "metrics (telemetry.metrics_addr)")
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return []net.Listener{l, m}, nil
}

func (p *peerProcess) checks() map[string]check {
	checks := map[string]check{"raft": p.ready}
	if p.cfg.Node.Role == RoleBoth {
		checks["agent"] = agentReady(&http.Client{Timeout: agentReadyWithin}, "http://"+p.cfg.AgentHTTPAddress()+"/readyz")
	}
	return checks
}

// ready says whether this peer takes its part in a cluster that has a leader.
func (p *peerProcess) ready() error {
	if id, _ := p.peer.Leader(); id == "" {
		return errors.New("no leader is known")
	}
	return p.peer.Standing()
}

// gatherer adds the metrics of the agent process to those of this one.
func (p *peerProcess) gatherer() prometheus.Gatherer {
	if p.cfg.Node.Role != RoleBoth {
		return p.registry
	}
	return prometheus.Gatherers{p.registry, agentGatherer{
		client: &http.Client{Timeout: 2 * time.Second},
		url:    "http://" + p.cfg.AgentHTTPAddress() + "/metrics",
	}}
}

// newRegistry returns a registry with what describes the process as a whole,
// and the registerer to use: it adds the label "process", by which the series of
// peer and agent differ where one address serves both.
func newRegistry(process string) (*prometheus.Registry, prometheus.Registerer) {
	r := prometheus.NewRegistry()
	labelled := prometheus.WrapRegistererWith(prometheus.Labels{processLabel: process}, r)
	labelled.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r, labelled
}

// loadIdentity loads the node's certificate and checks that it speaks for this node.
func loadIdentity(cfg Config) (*identity.Identity, error) {
	id, err := identity.Load(cfg.TLS.Dir)
	if err != nil {
		return nil, fmt.Errorf("%w for this node (tls.dir): %w; issue one with `wasmatrix cluster ca issue --node %s --role %s --out %s`",
			ErrCertificate, err, cfg.Node.Name, certificateRole(cfg.Node.Role), cfg.TLS.Dir)
	}
	if s := id.Self(); s.Kind != identity.Node || s.Name != cfg.Node.Name || s.Cluster != cfg.Cluster {
		return nil, fmt.Errorf("%w: that in %s speaks for %s, and this is node %q of cluster %q: name them alike or issue another certificate",
			ErrCertificate, cfg.TLS.Dir, s, cfg.Node.Name, cfg.Cluster)
	}
	return id, nil
}

// certificateRole is the role in the certificate of a node of that role.
func certificateRole(role string) string {
	if role == RoleStandalone {
		return RoleWorker
	}
	return role
}

func anyNode(s identity.Subject) bool { return s.Kind == identity.Node }

func listen(network *faults.Injector, address, what string) (net.Listener, error) {
	l, err := network.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w: %w; is a node running on these ports already? See bind.port_base", what, ErrPort, err)
	}
	return l, nil
}

// serveGRPC serves until ctx ends, then ends streams, lets calls finish, and
// calls after once the server takes no more calls.
func serveGRPC(ctx context.Context, s *grpc.Server, l net.Listener, before, after func()) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		before()
		force := time.AfterFunc(rpcGrace, s.Stop)
		defer force.Stop()
		after()
		s.GracefulStop()
	})
	err := s.Serve(l)
	if stop() {
		return fmt.Errorf("serve grpc on %s: %w", l.Addr(), err)
	}
	<-stopped
	return nil
}

func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}
