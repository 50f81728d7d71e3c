package sim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cluster/plane"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

const (
	portRaft  = "7000"
	portAPI   = "7100"
	portAgent = "7200"
)

// peerMachine is a machine that runs a control-plane peer: its disk and clock
// stay when the process ends.
type peerMachine struct {
	world    *World
	id       string
	disk     *Disk
	clock    *Clock
	identity *identity.Identity
	nonVoter bool
	// expect is bootstrap_expect of the first start; 0 for one that joins.
	expect int
	starts int

	proc atomic.Pointer[peerProcess] // nil while it is down
}

// peerProcess is one process of a peer, put together by cluster/plane as a node's is.
type peerProcess struct {
	machine  *peerMachine
	peer     *cluster.Peer
	server   *grpc.Server
	services *plane.Services
	pool     *identity.Pool
	began    time.Time
	cancel   context.CancelFunc
	done     chan struct{}
	// killed is set by a crash: what happens to the process then is no news.
	killed atomic.Bool
}

// raftAddress and apiAddress are where the machine listens.
func (m *peerMachine) raftAddress() string { return m.world.net.address(m.id) + ":" + portRaft }
func (m *peerMachine) apiAddress() string  { return m.world.net.address(m.id) + ":" + portAPI }

// dialer makes gRPC connect over the simulated network.
func (w *World) dialer(from string) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return w.net.Dial(ctx, from, to) })
}

// pool returns the shared connections of a process.
func (w *World) pool(from string, id *identity.Identity) *identity.Pool {
	return id.NewPool(func(s identity.Subject) bool { return s.Kind == identity.Node }, append(rpc.DialOptions(), w.dialer(from))...)
}

// start runs a process on the machine.
func (m *peerMachine) start() {
	p, err := m.newProcess()
	if err != nil {
		m.world.violate("", "peer %s cannot be made: %v", m.id, err)
		return
	}
	m.starts++
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	m.proc.Store(p)
	m.world.note("peer %s starts", m.id)
	api := m.world.net.Listen(m.id, portAPI)
	m.world.background.Go(func() { _ = p.server.Serve(api) })
	m.world.background.Go(func() { m.world.oracle.follow(p) })
	m.world.background.Go(func() {
		err := p.peer.Run(ctx)
		close(p.done)
		p.end()
		if !p.killed.Load() {
			m.ended(p, err)
		}
	})
}

func (m *peerMachine) newProcess() (_ *peerProcess, err error) {
	w := m.world
	p := &peerProcess{machine: m, pool: w.pool(m.id, m.identity), began: time.Now(), done: make(chan struct{})}
	dial := func(address string) (grpc.ClientConnInterface, error) { return p.pool.Conn(address) }
	disk := m.disk.open()
	log := w.logger(m.id)
	p.peer, err = cluster.New(cluster.Config{
		ID: m.id, Cluster: clusterName, Version: "sim", APIAdvertise: m.apiAddress(),
		BootstrapExpect: m.expect, NonVoter: m.nonVoter,
		Timers: cluster.Timers{
			Heartbeat: w.profile.Heartbeat, DiskLimit: 8 * w.profile.Heartbeat, DiskDead: 40 * w.profile.Heartbeat,
			DeadPeerAfter: -1,
		},
		Snapshots: cluster.Snapshots{Threshold: w.profile.SnapshotEvery, Trailing: w.profile.SnapshotEvery / 4, Interval: 20 * time.Second},
		Identity:  m.identity, Logger: log,
		Seams: cluster.Seams{
			Transport: w.net.newTransport(m.id, m.raftAddress()),
			Logs:      disk, Stable: disk, SnapshotStore: disk,
			Members: w.gossip.source(m.id), Dial: dial, Now: m.clock.Wall,
		},
	})
	if err != nil {
		return nil, err
	}
	p.services, err = plane.New(plane.Config{Peer: p.peer, Modules: w.modules, AgentConn: dial, Clock: m.clock, Logger: log})
	if err != nil {
		return nil, err
	}
	p.server = grpc.NewServer(append(rpc.ServerOptions(rpc.ServerConfig{Identity: m.identity, Logger: log}),
		grpc.ChainUnaryInterceptor(p.watchRenewals, p.peer.ForwardUnary()))...)
	p.services.Register(p.server)
	return p, nil
}

// watchRenewals holds every renewal that this peer accepts to the log (I5).
func (p *peerProcess) watchRenewals(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	renewal, ok := req.(*pb.HeartbeatRequest)
	if !ok {
		return next(ctx, req)
	}
	began := time.Now()
	resp, err := next(ctx, req)
	if err == nil && !p.killed.Load() {
		p.machine.world.judgeRenewal(epoch{renewal.GetNodeId(), renewal.GetEpoch()}, began)
	}
	return resp, err
}

// end frees what a process leaves behind.
func (p *peerProcess) end() {
	p.services.Close()
	p.server.Stop()
	_ = p.pool.Close()
}

// ended takes note of a process that ended by itself. Its machine starts it
// again, as a service manager does; damaged files are set aside first, which is
// what the error tells an operator to do.
func (m *peerMachine) ended(p *peerProcess, err error) {
	if !m.proc.CompareAndSwap(p, nil) {
		return
	}
	m.world.net.crash(m.id)
	m.world.gossip.set(m.id, false)
	reason, _, _ := strings.Cut(fmt.Sprint(err), "\n")
	m.world.note("peer %s ended: %s; its disk holds %s", m.id, reason, m.disk.describe())
	m.world.judgeEnd(m, err)
	m.disk.crash()
	if !m.world.closing.Load() {
		m.world.after(time.Second, func() {
			if m.proc.Load() == nil && m.world.wanted(m.id) {
				m.start()
			}
		})
	}
}

// crash ends the process without a farewell.
func (m *peerMachine) crash() {
	p := m.proc.Swap(nil)
	if p == nil {
		return
	}
	p.killed.Store(true)
	m.world.net.crash(m.id)
	m.world.gossip.set(m.id, false)
	m.disk.crash()
	p.cancel()
	m.world.background.Go(p.end)
}

// stop ends the process as planned. What it had under way when it gave up waiting
// for a slow disk ends with it, or would change the files under the next process.
func (m *peerMachine) stop() {
	p := m.proc.Load()
	if p == nil {
		return
	}
	p.killed.Store(true)
	p.cancel()
	<-p.done
	m.disk.crash()
	m.proc.CompareAndSwap(p, nil)
	m.world.gossip.set(m.id, false)
	m.world.net.crash(m.id)
}

// leads reports whether the machine's peer takes itself for the leader.
func (m *peerMachine) leads() bool {
	p := m.proc.Load()
	return p != nil && p.peer.IsLeader()
}

// moduleStore has every module on every machine: the bytes of modules are not
// what is simulated. It implements control.Modules.
type moduleStore struct{ bytes map[string][]byte }

// Admit knows only what it has.
func (s *moduleStore) Admit(body io.Reader, _ string) (*pb.Module, error) {
	b, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	d := digestOf(b)
	if _, ok := s.bytes[d]; !ok {
		return nil, fmt.Errorf("sim: module %s is not known", d)
	}
	return &pb.Module{Digest: d, SizeBytes: uint64(len(b))}, nil
}

// Replicate has nothing to do.
func (s *moduleStore) Replicate(context.Context, *pb.Module) error { return nil }

// Open returns a module's bytes.
func (s *moduleStore) Open(_ context.Context, digest string) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s.bytes[digest])), nil
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// logger returns the log of a process: discarded unless the world shows it.
func (w *World) logger(of string) *slog.Logger {
	if w.cfg.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(w.cfg.Log).With("machine", of)
}
