package sim

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/agent"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/rpc"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// workerMachine is a machine that runs an agent. Its disk is a directory; the
// process after a crash finds a copy of what was there at that moment.
type workerMachine struct {
	world    *World
	id       string
	clock    *Clock
	identity *identity.Identity
	dir      string
	starts   int

	proc atomic.Pointer[workerProcess] // nil while it is down

	mu sync.Mutex
	// deadlines are the node's own, on its clock, by epoch: the latest moment to
	// which a renewal that was answered reaches.
	deadlines map[uint64]time.Duration
}

// workerProcess is one process of an agent.
type workerProcess struct {
	machine *workerMachine
	agent   *agent.Agent
	guests  *guests
	server  *grpc.Server
	pool    *identity.Pool
	cancel  context.CancelFunc
	done    chan struct{}
	killed  atomic.Bool
}

// ownMargin is the part of the TTL that an agent must give up, as correctness asks for it.
const ownMargin = 0.1

func (m *workerMachine) address() string { return m.world.net.address(m.id) + ":" + portAgent }

// start runs a process on the machine.
func (m *workerMachine) start() {
	p, err := m.newProcess()
	if err != nil {
		m.world.violate("", "agent %s cannot be made: %v", m.id, err)
		return
	}
	m.starts++
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	m.proc.Store(p)
	m.world.note("agent %s starts", m.id)
	listener := m.world.net.Listen(m.id, portAgent)
	m.world.background.Go(func() { _ = p.server.Serve(listener) })
	m.world.background.Go(func() {
		err := p.agent.Run(ctx)
		close(p.done)
		p.server.Stop()
		_ = p.pool.Close()
		if !p.killed.Load() {
			m.world.violate("", "agent %s ended by itself: %v", m.id, err)
		}
	})
}

func (m *workerMachine) newProcess() (_ *workerProcess, err error) {
	w := m.world
	p := &workerProcess{machine: m, pool: w.pool(m.id, m.identity), done: make(chan struct{})}
	p.guests = newGuests(p)
	log := w.logger(m.id)
	k := &recordingKind{Kind: kv.New(kv.Options{}), process: p}
	p.agent, err = agent.New(agent.Config{
		Node: &pb.NodeInfo{
			Id: m.id, AgentAddress: m.address(), Version: "sim", Platform: "sim/sim",
			Capacity: &pb.NodeCapacity{Instances: 1000, MemoryBytes: 1 << 40},
		},
		DataDir: m.dir, Peers: w.peerAddresses(), Providers: []*pb.ProviderSpec{m.world.providerOf(m.id)},
		Runtimes: map[string]runtime.Runtime{"wasm": p.guests}, DefaultRuntime: "wasm",
		Kinds: map[string]provider.Kind{k.Type(): k},
		Conn: func(to string) (grpc.ClientConnInterface, error) {
			conn, err := p.pool.Conn(to)
			if err != nil {
				return nil, err
			}
			return &leaseTap{ClientConnInterface: conn, process: p}, nil
		},
		Logger: log, Clock: m.clock.Elapsed, Grace: time.Second,
	})
	if err != nil {
		return nil, err
	}
	p.server = grpc.NewServer(rpc.ServerOptions(rpc.ServerConfig{Identity: m.identity, Logger: log})...)
	p.agent.Register(p.server)
	return p, nil
}

// crash ends the process without a farewell.
func (m *workerMachine) crash() {
	p := m.proc.Swap(nil)
	if p == nil {
		return
	}
	p.killed.Store(true)
	m.world.net.crash(m.id)
	m.freshDisk()
	p.cancel()
}

// freshDisk gives the machine a copy of its disk, which the process that has just
// crashed cannot reach.
func (m *workerMachine) freshDisk() {
	next := m.dir + "+"
	if err := copyTree(m.dir, next); err != nil {
		m.world.violate("", "copying the disk of agent %s: %v", m.id, err)
	}
	m.dir = next
}

// stop ends the process as planned.
func (m *workerMachine) stop() {
	p := m.proc.Load()
	if p == nil {
		return
	}
	p.killed.Store(true)
	p.cancel()
	<-p.done
	m.proc.CompareAndSwap(p, nil)
	m.world.net.crash(m.id)
}

// deadline returns until when, in the time of the simulation, the node may take
// an epoch for its own.
func (m *workerMachine) deadline(epoch uint64) (at time.Time, held bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, held := m.deadlines[epoch]
	return m.clock.Until(d), held
}

// granted takes in that a renewal that was sent at sent was answered.
func (m *workerMachine) granted(epochNumber uint64, sent, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.deadlines[epochNumber] = max(m.deadlines[epochNumber], sent+ttl-time.Duration(ownMargin*float64(ttl)))
}

// leaseTap reads along what an agent is granted.
type leaseTap struct {
	grpc.ClientConnInterface
	process *workerProcess
}

// Invoke makes a unary call.
func (t *leaseTap) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	m := t.process.machine
	sent := m.clock.Elapsed()
	err := t.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
	if err != nil || t.process.killed.Load() {
		return err
	}
	switch r := reply.(type) {
	case *pb.RegisterNodeResponse:
		m.granted(r.GetEpoch(), sent, r.GetLeaseTtl().AsDuration())
	case *pb.HeartbeatResponse:
		if req, ok := args.(*pb.HeartbeatRequest); ok {
			m.granted(req.GetEpoch(), sent, r.GetLeaseTtl().AsDuration())
		}
	}
	return nil
}

// copyTree copies a directory with plain files.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		at := filepath.Join(to, strings.TrimPrefix(path, from))
		if d.IsDir() {
			return os.MkdirAll(at, 0o700)
		}
		b, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return os.WriteFile(at, b, 0o600)
	})
}
