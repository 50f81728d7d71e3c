package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/wasmatrix/wasmatrix/agent"
	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/internal/faults"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/external"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/messaging"
	"github.com/wasmatrix/wasmatrix/provider/outbound"
	"github.com/wasmatrix/wasmatrix/quantity"
	"github.com/wasmatrix/wasmatrix/rpc"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// CompileMain is the child process that compiles a module; see runtime/wasm.
func CompileMain(args []string, stdin io.Reader, stderr io.Writer) int {
	return wasm.CompileMain(args, stdin, stderr)
}

// agentProcess is everything of one agent.
type agentProcess struct {
	cfg      Config
	log      *slog.Logger
	id       *identity.Identity
	registry *prometheus.Registry  // what is served
	metrics  prometheus.Registerer // where the parts register
	network  *faults.Injector      // nil but in a development cluster

	agent    *agent.Agent
	runtimes *runtimes
	pool     *identity.Pool
	server   *grpc.Server
	health   *health.Server
}

func newAgentProcess(ctx context.Context, cfg Config, log *slog.Logger) (_ *agentProcess, err error) {
	a := &agentProcess{cfg: cfg, log: log.With("node", cfg.Node.Name, "process", "agent")}
	a.registry, a.metrics = newRegistry("agent")
	if a.id, err = loadIdentity(cfg); err != nil {
		return nil, err
	}
	if a.network, a.id, err = openNetwork(cfg, a.id, a.log); err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.DataDir, "agent")
	if a.runtimes, err = openRuntimes(ctx, cfg, a.log, a.metrics); err != nil {
		return nil, err
	}
	a.pool = a.id.NewPool(anyNode, rpc.DialOptions()...)
	memory, err := quantity.ParseBytes(cfg.Limits.Memory)
	if err != nil {
		return nil, err
	}
	kinds, err := providerKinds(a.log, a.metrics)
	if err != nil {
		return nil, errors.Join(err, a.runtimes.close(ctx))
	}
	a.agent, err = agent.New(agent.Config{
		Node: &pb.NodeInfo{
			Id: cfg.Node.Name, AgentAddress: cfg.AgentAddress(), Labels: cfg.Node.Labels, Version: Version, Platform: platform(),
			Capacity: &pb.NodeCapacity{Instances: cfg.Limits.Instances, MemoryBytes: memory}, Runtimes: a.runtimes.names(),
			RuntimeInfo: a.runtimes.infos(),
		},
		DataDir: dir, Peers: cfg.Join.APIPeers, Providers: providerSpecs(cfg.Providers), Standalone: cfg.Node.Role == RoleStandalone,
		Runtimes: a.runtimes.all, DefaultRuntime: cfg.Runtime.Default,
		Kinds:  kinds,
		Conn:   func(address string) (grpc.ClientConnInterface, error) { return a.pool.Conn(address) },
		Logger: a.log, Registerer: a.metrics,
	})
	if err != nil {
		return nil, errors.Join(err, a.runtimes.close(ctx))
	}
	a.server = grpc.NewServer(rpc.ServerOptions(rpc.ServerConfig{Identity: a.id, Logger: a.log, Registerer: a.metrics})...)
	a.agent.Register(a.server)
	a.health = health.NewServer()
	rpc.RegisterHealthAndReflection(a.server, a.health)
	return a, nil
}

// providerKinds are the types of provider that this binary can host.
func providerKinds(log *slog.Logger, metrics prometheus.Registerer) (map[string]provider.Kind, error) {
	messages, err := messaging.New(messaging.Options{Log: log, Registerer: metrics})
	if err != nil {
		return nil, err
	}
	web, err := outbound.New(outbound.Options{Registerer: metrics})
	if err != nil {
		return nil, err
	}
	kinds := map[string]provider.Kind{}
	for _, k := range []provider.Kind{kv.New(kv.Options{Log: log}), web, messages, external.New(external.Options{Log: log})} {
		kinds[k.Type()] = k
	}
	return kinds, nil
}

func providerSpecs(declared []ProviderConfig) []*pb.ProviderSpec {
	var out []*pb.ProviderSpec
	for _, p := range declared {
		out = append(out, &pb.ProviderSpec{Id: p.ID, Type: p.Type, Driver: p.Driver, Config: p.Config})
	}
	return out
}

// Run serves until ctx ends, then ends the instances in order and stops.
func (a *agentProcess) Run(ctx context.Context) (err error) {
	defer func() {
		err = errors.Join(err, a.runtimes.close(ctx), a.pool.Close())
	}()
	lock, err := lockAgent(a.cfg.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	api, err := listen(a.network, a.cfg.bound(portAgent), "the agent's API")
	if err != nil {
		return err
	}
	web, err := listen(nil, a.cfg.bound(portAgentHTTP), "the agent's health and metrics")
	if err != nil {
		return errors.Join(err, api.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.network.Run(ctx) })
	g.Go(func() error { return ignoreEnd(ctx, a.agent.Run(ctx)) })
	g.Go(func() error { return a.runtimes.Run(ctx) })
	g.Go(func() error { return serveGRPC(ctx, a.server, api, a.health.Shutdown, func() {}) })
	g.Go(func() error { return serveHTTP(ctx, web, newHTTPHandler(a.registry, a.checks())) })
	a.health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	a.log.Info("agent serves", "api", a.cfg.AgentAddress(), "pid", os.Getpid(), "version", Version)
	return g.Wait()
}

func (a *agentProcess) checks() map[string]check {
	checks := map[string]check{}
	for _, part := range a.agent.Ready() {
		checks[part.Name] = func() error { return a.readiness(part.Name) }
	}
	return checks
}

func (a *agentProcess) readiness(name string) error {
	for _, part := range a.agent.Ready() {
		if part.Name == name && !part.Ready {
			return fmt.Errorf("%s", part.Reason)
		}
	}
	return nil
}
