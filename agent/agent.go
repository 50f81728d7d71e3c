package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// DefaultGrace is how long an instance may take to finish what it works on when
// it is stopped.
const DefaultGrace = 10 * time.Second

// standaloneEpoch stands for the node's epoch where there is no control plane.
const standaloneEpoch = 1

// Config is what an Agent is made of. Node, DataDir, Logger and, unless it is
// standalone, Peers and Conn are required.
type Config struct {
	// Node is what the node tells of itself; Platform and Runtimes are filled in
	// when they are empty. It is not modified.
	Node *pb.NodeInfo
	// DataDir is a directory of the agent's own on the node's disk. One process
	// at a time may use it.
	DataDir string
	// Peers are the API addresses (host:port) of control-plane peers to begin
	// with; the cluster tells of others.
	Peers []string
	// Providers are those that the node's configuration declares.
	Providers []*pb.ProviderSpec
	// Standalone: there is no control plane; NodeAgentService takes workloads.
	Standalone bool
	// Runtimes are the executors by name; they belong to the caller, who closes
	// them after Run has returned.
	Runtimes map[string]runtime.Runtime
	// DefaultRuntime is the executor of workloads that name none.
	DefaultRuntime string
	// Kinds are the types of provider that this node can host and its guests can call.
	Kinds map[string]provider.Kind
	// Conn returns a shared connection to the gRPC server at an address; it must not block.
	Conn func(address string) (grpc.ClientConnInterface, error)
	// Logger takes the agent's own log, never the output of guests.
	Logger *slog.Logger
	// Registerer takes the metrics; nil for none.
	Registerer prometheus.Registerer
	// Clock reads a clock that never goes back and goes on while the machine
	// sleeps; nil means CLOCK_BOOTTIME where there is one.
	Clock func() time.Duration
	// Grace is how long an instance may take to finish; 0 means DefaultGrace.
	Grace time.Duration
}

// Agent is one node's data plane. Make one with New, register its service, and
// run it once.
type Agent struct {
	cfg        Config
	log        *slog.Logger
	modules    *moduleStore
	logs       *logBook
	lease      *lease
	worker     *worker
	providers  *provider.Host
	hosting    *hosting
	directory  *provider.Directory
	journal    *journal
	reports    *reporter
	session    *session    // nil in standalone mode
	standalone *standalone // nil in a cluster
	service    *service
	turns      turns

	assigned assigned
}

// assigned is what is assigned to the node.
type assigned struct {
	mu  sync.Mutex
	set *assignments
	// recovered is the journal's set; nil once something else was applied.
	recovered *pb.WatchAssignmentsResponse
}

// New makes an agent and reads its journal. It starts nothing; what the journal
// says is run by Run. A damaged journal is reported to the log, set aside and
// otherwise ignored.
func New(cfg Config) (*Agent, error) {
	cfg, err := complete(cfg)
	if err != nil {
		return nil, fmt.Errorf("agent configuration: %w", err)
	}
	a := &Agent{cfg: cfg, log: cfg.Logger, assigned: assigned{set: newAssignments()}}
	m := newMetrics()
	peers := &peerList{configured: cfg.Peers}
	a.lease = newLease(cfg.Clock, cfg.Standalone, func() { a.worker.poke() })
	a.logs = newLogBook(a.nodeID(), time.Now)
	a.reports = newReporter(func(err error) { m.reports.WithLabelValues(outcome(err)).Inc() })
	a.reports.denials = newDenials(a.log, a.reports.poke)
	a.modules = &moduleStore{
		dir: filepath.Join(cfg.DataDir, "modules"), log: a.log, peers: peers.list, conn: cfg.Conn,
		fetched: func(err error) { m.fetches.WithLabelValues(outcome(err)).Inc() }, command: map[string]bool{},
	}
	a.journal = newJournal(cfg.DataDir, a.log, a.journalContent, func(err error) { m.journalWrites.WithLabelValues(outcome(err)).Inc() })
	if err := a.wireProviders(); err != nil {
		return nil, err
	}
	a.worker = a.newWorker(m)
	if !cfg.Standalone {
		a.session = &session{
			info: cfg.Node, providers: cfg.Providers, conn: cfg.Conn, peers: peers, lease: a.lease,
			reports: a.reports, metrics: m, log: a.log, apply: a.apply, resync: a.resync,
		}
	}
	if err := a.register(m); err != nil {
		return nil, err
	}
	return a, a.open()
}

// complete checks a configuration and fills in defaults.
func complete(cfg Config) (Config, error) {
	switch {
	case cfg.Node.GetId() == "":
		return cfg, errors.New("the node has no id")
	case cfg.DataDir == "":
		return cfg, errors.New("there is no data directory")
	case cfg.Logger == nil:
		return cfg, errors.New("there is no logger")
	case !cfg.Standalone && (len(cfg.Peers) == 0 || cfg.Conn == nil):
		return cfg, errors.New("there is no control-plane peer to connect to")
	case len(cfg.Runtimes) > 0 && cfg.Runtimes[cfg.DefaultRuntime] == nil:
		return cfg, fmt.Errorf("the default runtime %q is none of %v", cfg.DefaultRuntime, slices.Sorted(maps.Keys(cfg.Runtimes)))
	}
	if cfg.Conn == nil {
		cfg.Conn = func(address string) (grpc.ClientConnInterface, error) {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "a standalone agent connects to nobody, not to %s", address)
		}
	}
	info := &pb.NodeInfo{}
	proto.Merge(info, cfg.Node)
	if info.Platform == "" {
		info.Platform = goruntime.GOOS + "/" + goruntime.GOARCH
	}
	if len(info.Runtimes) == 0 {
		info.Runtimes = slices.Sorted(maps.Keys(cfg.Runtimes))
	}
	info.RuntimeInfo = offers(info, cfg.DefaultRuntime)
	cfg.Node = info
	if cfg.Clock == nil {
		cfg.Clock = bootClock()
	}
	if cfg.Grace <= 0 {
		cfg.Grace = DefaultGrace
	}
	return cfg, nil
}

// wireProviders makes what stands between guests and providers.
func (a *Agent) wireProviders() error {
	kinds := slices.Collect(maps.Values(a.cfg.Kinds))
	a.directory = provider.NewDirectory(a.nodeID())
	a.providers = provider.NewHost(a.log, kinds...)
	router, err := provider.NewRouter(provider.RouterConfig{
		Directory: a.directory, Host: a.providers, Kinds: kinds,
		Remote: remote.NewClient(a.cfg.Conn, a.cfg.Clock), Registerer: a.cfg.Registerer, Clock: a.cfg.Clock,
		Denied: a.reports.denials.add,
	})
	if err != nil {
		return fmt.Errorf("making the capability router: %w", err)
	}
	a.hosting = &hosting{
		node: a.nodeID(), dir: filepath.Join(a.cfg.DataDir, "providers"), host: a.providers,
		report: a.observedProvider, log: a.log, providers: map[string]*hostedProvider{}, wake: make(chan struct{}, 1),
		messages: &courier{
			node: a.nodeID(), directory: a.directory, record: a.recordSubscription, local: a.deliver, conn: a.cfg.Conn,
		},
	}
	a.service = &service{agent: a, capabilities: remote.NewServer(router), toAPI: remote.ToAPI, ports: func(inst *pb.Instance) port {
		p := inst.GetPlacement()
		made := router.Port(inst.GetId(), p.GetGeneration(), p.GetNodeEpoch())
		if tiedToLease(inst) {
			made.Within(tenure{lease: a.lease, epoch: p.GetNodeEpoch()})
		}
		return made
	}}
	return nil
}

func (a *Agent) newWorker(m *metrics) *worker {
	return &worker{
		node: a.nodeID(), logs: a.logs, lease: a.lease, metrics: m, log: a.log, report: a.observedInstance,
		supervisors: map[string]*supervisor{}, wake: make(chan struct{}, 1),
		exec: &executor{
			modules: a.modules, runtimes: a.cfg.Runtimes, offers: a.cfg.Node.GetRuntimeInfo(),
			hosts: a.hostOf, grace: a.cfg.Grace, log: a.log,
		},
	}
}

// hostOf makes the way out of one generation of an instance.
func (a *Agent) hostOf(inst *pb.Instance, log *instanceLog) guestHost {
	h := &host{inst: inst, log: log, port: a.service.ports(inst), toAPI: remote.ToAPI}
	if tiedToLease(inst) {
		h.lease = a.lease
	}
	return h
}

func (a *Agent) register(m *metrics) error {
	if a.cfg.Registerer == nil {
		return nil
	}
	for _, c := range append(m.collectors(), newCollector(a)) {
		if err := a.cfg.Registerer.Register(c); err != nil {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}

// open prepares the data directory and reads the journal.
func (a *Agent) open() error {
	if err := os.MkdirAll(a.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("creating the data directory: %w", err)
	}
	if err := a.modules.prepare(); err != nil {
		return err
	}
	recovered, err := a.journal.load()
	if errors.Is(err, errJournalDamaged) {
		a.log.Error("ignoring a damaged journal; it is set aside", "error", err)
		err = a.journal.setAside()
	}
	if err != nil {
		return err
	}
	if a.cfg.Standalone {
		return a.openStandalone(recovered)
	}
	a.assigned.recovered = recovered
	return nil
}

func (a *Agent) nodeID() string { return a.cfg.Node.GetId() }

// Register adds NodeAgentService to a server. The server must put the
// authenticated caller into the context, as rpc.ServerOptions does; every method
// refuses callers that its rule does not allow.
func (a *Agent) Register(to grpc.ServiceRegistrar) {
	desc := guarded(pb.NodeAgentService_ServiceDesc, rules())
	to.RegisterService(&desc, a.service)
}

// Invoke calls a handler of an instance of this node, for other ways in than
// gRPC. payload is the handler's encoded message. Its errors are
// *apierror.Error: INSTANCE_NOT_FOUND, CONFLICT when it is not running,
// RESOURCE_EXHAUSTED when it is busy until ctx ends, TIMEOUT, INVALID_REQUEST
// when the module lacks the handler, and INTERNAL_ERROR when it crashed.
func (a *Agent) Invoke(ctx context.Context, instanceID string, handler runtime.Handler, payload []byte) ([]byte, error) {
	return a.worker.invoke(ctx, instanceID, handler, payload)
}

// Instances returns the instances of this node in the order of their ids, with
// their status and resource use. The records are shared: they must not be modified.
func (a *Agent) Instances() []*pb.Instance {
	var out []*pb.Instance
	for _, s := range a.worker.all() {
		out = append(out, s.view())
	}
	return out
}

// Component is the health of one part of an agent.
type Component struct {
	// Name is "session", "lease" or "providers".
	Name string
	// Ready is whether the part does its work.
	Ready bool
	// Reason says why not, or how things stand; one line for people.
	Reason string
}

// Ready returns the health of the agent's parts. An agent that is not ready
// still runs what is assigned to it.
func (a *Agent) Ready() []Component {
	serving, why := a.hosting.health()
	parts := []Component{{Name: "providers", Ready: serving, Reason: why}}
	if a.session == nil {
		return parts
	}
	st := a.session.current()
	s := Component{Name: "session", Ready: st.leader != "", Reason: fmt.Sprintf("epoch %d with %s", st.epoch, st.leader)}
	if !s.Ready {
		s.Reason = "none yet"
		if st.err != nil {
			s.Reason = "none: " + st.err.Error()
		}
	}
	alive := a.lease.alive()
	left, _ := a.lease.remaining()
	l := Component{Name: "lease", Ready: alive, Reason: "ends in " + left.Round(time.Millisecond).String()}
	if !alive {
		l.Reason = "ended, or never held; instances with on_disconnect: stop do not run"
	}
	return append([]Component{s, l}, parts...)
}
