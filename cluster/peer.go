package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
)

// Duty is work of the leader. It runs while this peer leads, after a barrier
// has shown it everything that was committed before, and ends when ctx ends. An
// error that it returns while ctx lives resigns leadership; nil means that it
// has nothing more to do.
type Duty func(ctx context.Context) error

// Peer is one control-plane peer. Make it with New, give it its duties with
// Lead, and let Run run it. All other methods are safe for concurrent use and
// may be called at any time; before Run they know of no leader.
type Peer struct {
	cfg     Config
	log     *slog.Logger
	state   *fsm.State
	duties  []Duty
	pool    *identity.Pool
	dial    func(address string) (grpc.ClientConnInterface, error)
	metrics *metrics
	changed *signal // leadership, members or the Raft configuration
	reads   *reads
	stamp   *stamp
	flights *flights
	raft    atomic.Pointer[raft.Raft]
	members atomic.Pointer[memberSource]
	role    role
	disk    diskState
	fatal   chan error
	// incarnation tells the cluster from others of its name.
	incarnation incarnation
	// announcing is held while this peer changes what it tells the gossip.
	announcing sync.Mutex
}

// memberSource lets an interface be stored atomically.
type memberSource struct{ MemberSource }

// role is what the peer is at the moment.
type role struct {
	// leads is set from the barrier at the start of a leadership to its end.
	leads atomic.Bool
	// closing is set when the peer stops.
	closing atomic.Bool
	// mayVote is set once the peer has no past that it could have forgotten.
	mayVote atomic.Bool
	// outside is set when the others say that this peer is not of the cluster.
	outside atomic.Bool
	// settled is set once the peer has had a leader for a while.
	settled atomic.Bool
	// leaderless is when the present absence of a leader began, in Unix nanoseconds; 0 while there is a leader.
	leaderless atomic.Int64
	// contacts is what the leader knows of its followers.
	contacts contacts
}

// New makes a peer. It opens nothing and starts nothing. Its error wraps ErrConfig.
func New(cfg Config) (*Peer, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	p := &Peer{
		cfg:     cfg,
		log:     cfg.Logger,
		state:   fsm.New(),
		dial:    cfg.Seams.Dial,
		changed: newSignal(),
		reads:   newReads(),
		stamp:   newStamp(cfg.Seams.Now),
		flights: newFlights(),
		fatal:   make(chan error, 1),
	}
	p.role.contacts.lost, p.role.contacts.steady = map[string]bool{}, map[string]time.Time{}
	if p.dial == nil {
		p.pool = cfg.Identity.NewPool(identity.Subject.IsPeer, rpc.DialOptions()...)
		p.dial = func(address string) (grpc.ClientConnInterface, error) { return p.pool.Conn(address) }
	}
	var err error
	if p.metrics, err = newMetrics(p, cfg.Registerer); err != nil {
		return nil, fmt.Errorf("%w: register metrics: %w", ErrConfig, err)
	}
	return p, nil
}

// Lead adds duties. Call it before Run.
func (p *Peer) Lead(duties ...Duty) { p.duties = append(p.duties, duties...) }

// State returns the replicated state of this peer, which may lag. Only Run
// writes to it.
func (p *Peer) State() *fsm.State { return p.state }

// Changed returns a channel that is closed as soon as the applied index of this
// peer is greater than after; see fsm.State.Changed.
func (p *Peer) Changed(after uint64) <-chan struct{} { return p.state.Changed(after) }

// Leader returns the leader's id and the address of its API, as far as this
// peer knows: both empty without a leader, the address alone while it is not known yet.
func (p *Peer) Leader() (id, apiAddress string) {
	r := p.raft.Load()
	if r == nil {
		return "", ""
	}
	_, leader := r.LeaderWithID()
	return string(leader), p.apiAddress(string(leader))
}

// IsLeader reports whether this peer leads and has seen all that was committed
// before. It is a hint: a leader that was cut off does not know it yet.
func (p *Peer) IsLeader() bool {
	r := p.raft.Load()
	return r != nil && p.role.leads.Load() && r.State() == raft.Leader
}

// Run runs the peer until ctx ends, and then hands leadership over, tells the
// gossip that it leaves and releases everything; that returns nil. It returns
// an error when the peer cannot start or must not go on: files that cannot be
// opened, damaged files (ErrCorrupt), a disk that hangs or fails (ErrDiskHangs,
// ErrDiskFailed), a command it does not know. Call it once.
func (p *Peer) Run(ctx context.Context) (err error) {
	if p.pool != nil {
		defer func() { err = errors.Join(err, p.pool.Close()) }()
	}
	n, err := p.open()
	if err != nil {
		return p.advise(err)
	}

	// The transport and the gossip outlive the rest: a planned stop needs both.
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBelow()
	base, bctx := errgroup.WithContext(below)
	base.Go(func() error { n.border.run(bctx); return nil })
	base.Go(func() error { n.vigil.run(bctx); return nil })
	base.Go(func() error { n.guard.run(bctx); return nil })
	if n.storage.space != nil {
		base.Go(func() error {
			n.storage.space.run(bctx, p.IsLeader, func(full bool) {
				p.tellFull(full)
				p.announce(func(meta *pb.PeerMetadata) { meta.DiskFull = full })
			})
			return nil
		})
	}
	base.Go(func() error { return p.runGossip(bctx) })
	err = p.serve(ctx, bctx, n)
	err = errors.Join(err, p.stop(below, n))
	stopBelow()
	return errors.Join(err, base.Wait())
}

// node is what Run has opened.
type node struct {
	raft    *raft.Raft
	border  *border
	vigil   *vigil
	guard   *guard
	herald  *herald
	storage *storage
	logs    *parallelLogs
	// settle says that the peer must bootstrap or join before it votes.
	settle bool
}

// open opens files and sockets and starts Raft.
func (p *Peer) open() (_ *node, err error) {
	n := &node{}
	if err := wasDiverged(p.cfg.DataDir); err != nil {
		return nil, err
	}
	if n.border, n.vigil, n.guard, err = p.openTransport(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.guard.Close())
		}
	}()
	if n.storage, err = openStorage(p.cfg, p.watchDisk(n.guard)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.storage.close())
		}
	}()
	p.disk.space.Store(n.storage.space)
	if err = p.incarnation.open(n.storage.stable); err != nil {
		return nil, err
	}
	if n.settle, err = n.storage.unsettled(); err != nil {
		return nil, err
	}
	p.role.mayVote.Store(!n.settle)
	if n.storage.space == nil {
		if err := n.storage.verify(); err != nil {
			return nil, err
		}
	}
	history, err := n.storage.hasHistory()
	if err != nil {
		return nil, err
	}
	if err := p.openMembers(string(n.guard.LocalAddr()), history); err != nil {
		return nil, err
	}
	n.logs = newParallelLogs(&sealedLogs{LogStore: n.storage.logs, damaged: p.fail}, p.leadsOthers, p.fail)
	n.guard.syncedWhile, n.guard.leadsIn = n.logs.syncedWhile, p.leadsIn
	n.guard.covers, n.guard.beat = p.covers, p.beat
	n.herald = newHerald(n.guard, p.commitIndex, p.lastIndex, p.leadsIn)
	logs, err := raft.NewLogCache(logCacheEntries, n.logs)
	if err != nil {
		return nil, fmt.Errorf("cache the raft log: %w", err)
	}
	if n.raft, err = p.startRaft(&lastResort{LogStore: logs, StableStore: n.storage.stable, SnapshotStore: n.storage.snapshots, stuck: &p.disk.stuck, isHole: func(index uint64) bool { return p.isHole(n.logs, index) }}, n.herald); err != nil {
		return nil, err
	}
	p.role.leaderless.Store(time.Now().UnixNano())
	p.raft.Store(n.raft)
	return n, nil
}

// openTransport opens the network below Raft. Closing the guard closes all of it.
func (p *Peer) openTransport() (b *border, v *vigil, g *guard, err error) {
	transport := p.cfg.Seams.Transport
	if transport == nil {
		where := &addresses{id: raft.ServerID(p.cfg.ID), hint: p.hintedAddress, known: p.recordedAddress}
		if transport, err = openTransport(p.cfg, where); err != nil {
			return nil, nil, nil, err
		}
	}
	if b, err = newBorder(transport, &p.incarnation); err != nil {
		return nil, nil, nil, err
	}
	if v, err = newVigil(b, p.cfg.ID, p.cfg.Timers.Heartbeat, p.changed, p.raft.Load); err != nil {
		return nil, nil, nil, err
	}
	g, err = newGuard(v, &p.role.mayVote)
	return b, v, g, err
}

// openMembers makes the gossip unless it was injected, and tells it about this peer.
func (p *Peer) openMembers(raftAddress string, history bool) error {
	meta := &pb.PeerMetadata{
		Cluster: p.cfg.Cluster, PeerId: p.cfg.ID, Version: p.cfg.Version,
		RaftAddress: raftAddress, ApiAddress: p.cfg.APIAdvertise,
		BootstrapExpect: uint32(p.cfg.BootstrapExpect), Bootstrapped: history,
	}
	if source := p.cfg.Seams.Members; source != nil {
		if err := source.Update(meta); err != nil {
			return fmt.Errorf("tell the members of this peer: %w", err)
		}
		p.members.Store(&memberSource{source})
		return nil
	}
	g, err := gossip.New(p.cfg.Gossip, meta)
	if err != nil {
		return fmt.Errorf("open the gossip: %w", err)
	}
	p.members.Store(&memberSource{g})
	return nil
}

// serve does everything a peer does until ctx ends or something fails. Losing
// the gossip or the transport, which live in base, ends it too.
func (p *Peer) serve(ctx, base context.Context, n *node) error {
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case <-gctx.Done():
			return nil
		case <-base.Done():
			return context.Cause(base)
		case err := <-p.fatal:
			return err
		}
	})
	group.Go(func() error { p.observe(gctx, n); return nil })
	group.Go(func() error { n.herald.run(gctx, p.appliedNext); return nil })
	group.Go(func() error { n.vigil.watch(gctx, n.raft); return nil })
	group.Go(func() error { p.lead(gctx, n); return nil })
	group.Go(func() error { return p.keepIncarnation(gctx) })
	group.Go(func() error { return p.compareStates(gctx) })
	group.Go(func() error { p.runReads(gctx); return nil })
	group.Go(func() error { return p.watchSuperseded(gctx) })
	group.Go(func() error { return p.settle(gctx, n) })
	return group.Wait()
}

// errHanging is returned by Run when Raft could not be ended.
var errHanging = errors.New("raft does not end, its disk may hang; the files stay open until the process ends")

// stop hands leadership over, ends Raft and closes the files. Calls in flight
// are let finish first, because hashicorp/raft forgets to answer some of them
// once it is shut down. No step waits for a disk that hangs.
func (p *Peer) stop(ctx context.Context, n *node) error {
	p.role.closing.Store(true)
	p.changed.notify()
	defer func() {
		p.role.leads.Store(false)
		p.changed.notify()
	}()
	if p.disk.ruined.Load() {
		return p.abandon(ctx, n)
	}
	if n.raft.State() == raft.Leader {
		limit, cancel := context.WithTimeout(ctx, p.cfg.Timers.Shutdown)
		if err := p.handOver(limit, n.raft); err != nil {
			p.log.Info("leadership was not handed over", "error", err)
		}
		cancel()
	}
	if !p.flights.drain(p.cfg.Timers.Shutdown) {
		p.log.Warn("stopped with calls in flight")
	}
	limit, cancel := context.WithTimeout(ctx, p.cfg.Timers.Shutdown)
	defer cancel()
	if err := p.flights.await(limit, n.raft.Shutdown()); err != nil {
		return errors.Join(errHanging, n.guard.Close())
	}
	if err := p.flights.await(limit, futureFunc(n.logs.synced)); err != nil {
		return errors.Join(errHanging, err, n.guard.Close())
	}
	return n.storage.close()
}

// futureFunc is a function that blocks, as what hashicorp/raft calls a future.
type futureFunc func() error

// Error waits.
func (f futureFunc) Error() error { return f() }

// leadsOthers reports whether this peer leads and another one votes.
func (p *Peer) leadsOthers() bool {
	r := p.raft.Load()
	return r != nil && r.State() == raft.Leader && slices.ContainsFunc(p.servers(), func(s raft.Server) bool {
		return s.Suffrage == raft.Voter && string(s.ID) != p.cfg.ID
	})
}

func (p *Peer) commitIndex() uint64 { return p.raft.Load().CommitIndex() }

func (p *Peer) lastIndex() uint64 { return p.raft.Load().LastIndex() }

// leadsIn reports whether this peer leads in a term in which it has led. Terms only
// grow, so a leader whose term is that one, read after it was seen to lead, leads in it.
func (p *Peer) leadsIn(term uint64) bool {
	r := p.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

// covers reports whether more than index has been applied here, and the log or a
// snapshot of this peer goes that far. A snapshot of the very state is let through:
// its leader has not heard that it arrived, and would send it again for ever.
func (p *Peer) covers(index uint64) bool {
	r := p.raft.Load()
	return r != nil && r.AppliedIndex() > index && r.LastIndex() >= index
}

// appliedNext returns a channel that is closed when something more has been applied.
func (p *Peer) appliedNext() <-chan struct{} { return p.state.Changed(p.state.View().Index()) }

// runGossip takes part in the gossip and wakes whoever waits for its news.
func (p *Peer) runGossip(ctx context.Context) error {
	source := p.members.Load()
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error { return source.Run(gctx) })
	group.Go(func() error {
		for {
			select {
			case <-gctx.Done():
				return nil
			case e := <-source.Events():
				p.log.Info("gossip", "member", e.Member.Metadata.GetPeerId(), "event", e.Kind.String())
				p.changed.notify()
			}
		}
	})
	return group.Wait()
}

// fail makes Run return err.
func (p *Peer) fail(err error) {
	p.log.Error("this peer cannot go on", "error", err)
	select {
	case p.fatal <- err:
	default:
	}
}

// announce changes what this peer tells the gossip about itself, if it changes anything.
func (p *Peer) announce(change func(*pb.PeerMetadata)) {
	p.announcing.Lock()
	defer p.announcing.Unlock()
	m, ok := p.member(p.cfg.ID)
	if !ok {
		return
	}
	meta := proto.CloneOf(m.Metadata)
	if change(meta); proto.Equal(meta, m.Metadata) {
		return
	}
	if err := p.members.Load().Update(meta); err != nil {
		p.log.Warn("tell the gossip about this peer", "error", err)
	}
}

// hintedAddress returns where gossip says that a live peer's Raft transport is, or "".
func (p *Peer) hintedAddress(id string) string {
	if m, ok := p.member(id); ok && m.Alive {
		return m.Metadata.GetRaftAddress()
	}
	return ""
}

// recordedAddress returns the address of a peer's Raft transport that is
// committed: in the registry, where it follows the peer, else in the Raft
// configuration, where it stays as it was when the peer joined. "" when unknown.
func (p *Peer) recordedAddress(id string) string {
	servers := p.servers()
	at := slices.IndexFunc(servers, func(s raft.Server) bool { return string(s.ID) == id })
	if at < 0 {
		return ""
	}
	if peer, ok := p.state.View().Peer(id); ok && peer.GetRaftAddress() != "" {
		return peer.GetRaftAddress()
	}
	return unnamed(servers[at].Address)
}

// apiAddress returns where a peer's API is: what is committed, else what gossip says, else "".
func (p *Peer) apiAddress(id string) string {
	if id == p.cfg.ID {
		return p.cfg.APIAdvertise
	}
	if peer, ok := p.state.View().Peer(id); ok && peer.GetApiAddress() != "" {
		return peer.GetApiAddress()
	}
	if m, ok := p.member(id); ok {
		return m.Metadata.GetApiAddress()
	}
	return ""
}

func (p *Peer) member(id string) (gossip.Member, bool) {
	for _, m := range p.known() {
		if id != "" && m.Metadata.GetPeerId() == id {
			return m, true
		}
	}
	return gossip.Member{}, false
}

// known returns all members that gossip knows.
func (p *Peer) known() []gossip.Member {
	source := p.members.Load()
	if source == nil {
		return nil
	}
	return source.Members()
}

// servers returns the latest Raft configuration that this peer knows, committed or not.
func (p *Peer) servers() []raft.Server {
	r := p.raft.Load()
	if r == nil {
		return nil
	}
	return r.GetConfiguration().Configuration().Servers
}

// Standing returns nil while the cluster can count on this peer's vote, or while it
// is to have none; otherwise why not. Stopping another voter meanwhile can end the
// quorum for good.
func (p *Peer) Standing() error {
	if !p.role.mayVote.Load() {
		return errors.New("this peer has not joined yet, or not again since it lost its disk: it gives no vote")
	}
	if suffrage, _ := p.suffrage(p.cfg.ID); suffrage != raft.Voter && !p.cfg.NonVoter {
		return errors.New("this peer is not a voter yet")
	}
	return nil
}

func (p *Peer) suffrage(id string) (raft.ServerSuffrage, bool) {
	for _, s := range p.servers() {
		if string(s.ID) == id {
			return s.Suffrage, true
		}
	}
	return raft.Nonvoter, false
}
