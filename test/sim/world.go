package sim

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const clusterName = "sim"

// Config says which world to run, and for how long.
type Config struct {
	// Seed fixes the schedule of faults, the workload, and the dice of network and disks.
	Seed uint64
	// Hours is how long the world runs, in virtual time, at least; it ends with the
	// round in which that is reached.
	Duration time.Duration
	// Profile is the kind of world.
	Profile Profile
	// Counts are added to; nil means counts of its own.
	Counts *Counts
	// Log gets the logs of all processes; nil discards them.
	Log slog.Handler
}

// Violation is a broken promise.
type Violation struct {
	// Invariant is "I1" to "I10", "linearizable", "converge", or "" for a process
	// that ended without reason.
	Invariant string
	// What says what happened.
	What string
	// At is when, in virtual time since the world began.
	At time.Duration
	// Profile and Seed name the world.
	Profile string
	Seed    uint64
	// Last are the last things that happened, the oldest first.
	Last []string
}

// String is a report for people, with the command that runs the same world again.
func (v *Violation) String() string {
	return fmt.Sprintf("%s broken at %s of virtual time, profile %s, seed %d: %s\nrun it again: go test ./test/sim -run 'TestSeed$' -profile %s -from %d -v\nbefore that:\n  %s",
		v.Invariant, v.At.Round(time.Millisecond), v.Profile, v.Seed, v.What, v.Profile, v.Seed, strings.Join(v.Last, "\n  "))
}

// World is one simulated cluster with everything around it.
type World struct {
	cfg     Config
	profile Profile
	counts  *Counts
	began   time.Time
	dir     string

	net       *Network
	gossip    *gossipNet
	peers     map[string]*peerMachine
	workers   map[string]*workerMachine
	providers []string
	modules   *moduleStore
	oracle    *oracle
	effects   *effects
	troubles  *troubles
	clients   *workload

	background sync.WaitGroup
	closing    atomic.Bool
	// broken is closed with the first violation.
	broken chan struct{}

	mu        sync.Mutex
	dice      *rand.Rand
	trail     []string
	violation *Violation
	restarts  map[string]time.Time
	down      map[string]bool // machines that a fault keeps down
}

// Run runs one world in a bubble of its own time and returns the first violation,
// or nil.
func Run(t *testing.T, cfg Config) (broken *Violation) {
	t.Helper()
	defer func() {
		// hashicorp/raft does not answer every call that it has taken once it is shut
		// down; whoever waits for one waits for ever, which a bubble does not forgive.
		if reason := recover(); reason != nil && !strings.Contains(fmt.Sprint(reason), leftBehind) {
			panic(reason)
		}
	}()
	if cfg.Counts == nil {
		cfg.Counts = &Counts{}
	}
	dir, err := os.MkdirTemp(memoryDir(), "wasmatrix-sim-") //nolint:usetesting // t.TempDir is not in memory
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	synctest.Test(t, func(*testing.T) {
		w := newWorld(cfg, dir)
		w.live()
		broken = w.violation
		cfg.Counts.Virtual.Add(int64(time.Since(w.began)))
		cfg.Counts.Worlds.Add(1)
	})
	return broken
}

// leftBehind is the text of the panic of a bubble that ends with blocked goroutines.
const leftBehind = "main bubble goroutine has exited but blocked goroutines remain"

// memoryDir is a directory in memory where there is one: agents sync their
// files, and that costs real time.
func memoryDir() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func newWorld(cfg Config, dir string) *World {
	w := &World{
		cfg: cfg, profile: cfg.Profile.withDefaults(), counts: cfg.Counts, began: time.Now(), dir: dir,
		net:   newNetwork(cfg.Seed, cfg.Counts),
		peers: map[string]*peerMachine{}, workers: map[string]*workerMachine{},
		modules: &moduleStore{bytes: map[string][]byte{}}, effects: newEffects(),
		broken: make(chan struct{}), dice: rand.New(rand.NewPCG(cfg.Seed, 0x776f726c64)),
		restarts: map[string]time.Time{}, down: map[string]bool{},
	}
	w.troubles = newTroubles(w)
	w.gossip = &gossipNet{net: w.net, told: map[string]*pb.PeerMetadata{}, up: map[string]bool{}}
	w.oracle = newOracle(w)
	w.modules.bytes[digestOf(guestModule)] = guestModule
	ca, err := identity.NewCA(clusterName)
	if err != nil {
		panic(err)
	}
	for i := range w.profile.Peers {
		w.addPeer(ca, fmt.Sprintf("p%d", i+1), w.profile.Peers)
	}
	for i := range w.profile.Workers {
		w.addWorker(ca, fmt.Sprintf("w%d", i+1))
	}
	w.clients = newWorkload(w, ca)
	return w
}

// guestModule stands in for a module; only its digest matters here.
var guestModule = []byte("a guest of the simulation")

func (w *World) addPeer(ca *identity.CA, id string, expect int) {
	w.net.address(id)
	w.peers[id] = &peerMachine{
		world: w, id: id, disk: newDisk(w.draw(), w.counts), clock: w.newClock(), expect: expect,
		identity: issue(ca, identity.Subject{Kind: identity.Node, Name: id, Role: identity.RoleServer}),
	}
}

func (w *World) addWorker(ca *identity.CA, id string) {
	w.net.address(id)
	m := &workerMachine{
		world: w, id: id, clock: w.newClock(), deadlines: map[uint64]time.Duration{}, dir: filepath.Join(w.dir, id),
		identity: issue(ca, identity.Subject{Kind: identity.Node, Name: id, Role: identity.RoleWorker}),
	}
	at := filepath.Join(m.dir, "modules")
	if err := os.MkdirAll(at, 0o700); err != nil {
		panic(err)
	}
	name := strings.TrimPrefix(digestOf(guestModule), "sha256:") + ".wasm"
	if err := os.WriteFile(filepath.Join(at, name), guestModule, 0o600); err != nil {
		panic(err)
	}
	w.workers[id] = m
	w.providers = append(w.providers, w.providerOf(id).GetId())
}

// providerOf is the provider that a worker's configuration declares: some keep
// their data on disk, some in memory.
func (w *World) providerOf(id string) *pb.ProviderSpec {
	driver := "bbolt"
	if strings.HasSuffix(id, "2") {
		driver = "memory"
	}
	return &pb.ProviderSpec{Id: "kv-" + id, Type: "kv", Driver: driver}
}

// newClock draws a clock: within the drift that leases allow for, and wrong by up to a minute.
func (w *World) newClock() *Clock {
	w.mu.Lock()
	defer w.mu.Unlock()
	drift := (w.dice.Float64() - 0.5) * 0.009
	return newClock(drift, time.Duration(w.dice.Int64N(int64(2*time.Minute)))-time.Minute)
}

func issue(ca *identity.CA, s identity.Subject) *identity.Identity {
	s.Cluster = clusterName
	bundle, err := ca.Issue(s, 10*365*24*time.Hour)
	if err != nil {
		panic(err)
	}
	id, err := identity.FromBundle(bundle)
	if err != nil {
		panic(err)
	}
	return id
}

// live runs the world from its first election to its end.
func (w *World) live() {
	for _, id := range slices.Sorted(maps.Keys(w.peers)) {
		w.peers[id].start()
	}
	for _, id := range slices.Sorted(maps.Keys(w.workers)) {
		w.workers[id].start()
	}
	w.converge("the cluster forms")
	w.clients.prepare()
	for round := 1; w.whole() && (round == 1 || time.Since(w.began) < w.cfg.Duration); round++ {
		w.clients.begin(round)
		w.troubles.season(w.profile.Round)
		w.clients.end()
		w.troubles.healAll()
		w.converge(fmt.Sprintf("round %d is over and everything healed", round))
		w.clients.judge()
	}
	w.close()
}

// whole reports whether no promise is broken so far.
func (w *World) whole() bool {
	select {
	case <-w.broken:
		return false
	default:
		return true
	}
}

// rest lets time pass; it returns false at once when a promise is broken.
func (w *World) rest(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-w.broken:
		return false
	case <-timer.C:
		return true
	}
}

// after runs f later, unless the world ends before.
func (w *World) after(d time.Duration, f func()) {
	w.background.Go(func() {
		if w.rest(d) && !w.closing.Load() {
			f()
		}
	})
}

// close ends all processes.
func (w *World) close() {
	w.closing.Store(true)
	w.troubles.healAll()
	for _, m := range w.workers {
		m.crash()
	}
	for _, m := range w.peers {
		m.crash()
	}
	w.clients.close()
	w.background.Wait()
}

// draw returns a seed for something of its own.
func (w *World) draw() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dice.Uint64()
}

// note remembers something that happened, for the report of a violation.
func (w *World) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	line := fmt.Sprintf("%11s ", time.Since(w.began).Round(time.Microsecond)) + fmt.Sprintf(format, args...)
	w.trail = append(w.trail, line)
	if len(w.trail) > 2*trailLength {
		w.trail = slices.Clone(w.trail[len(w.trail)-trailLength:])
	}
	if w.cfg.Log != nil {
		slog.New(w.cfg.Log).Warn("WORLD " + line)
	}
}

const trailLength = 60

// violate reports a broken promise; the first one ends the world.
func (w *World) violate(invariant, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	w.note("VIOLATION %s: %s", invariant, what)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.violation != nil {
		return
	}
	w.violation = &Violation{
		Invariant: invariant, What: what, At: time.Since(w.began), Profile: w.profile.Name, Seed: w.cfg.Seed,
		Last: slices.Clone(w.trail[max(0, len(w.trail)-trailLength):]),
	}
	close(w.broken)
}

// wanted reports whether a machine is to run.
func (w *World) wanted(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.down[id]
}

func (w *World) setDown(id string, down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down[id] = down
}

// leader returns the machine whose peer leads and serves, or nil.
func (w *World) leader() *peerMachine {
	for _, id := range slices.Sorted(maps.Keys(w.peers)) {
		if w.peers[id].leads() {
			return w.peers[id]
		}
	}
	return nil
}

func (w *World) peerAddresses() []string {
	var out []string
	for _, id := range slices.Sorted(maps.Keys(w.peers)) {
		out = append(out, w.peers[id].apiAddress())
	}
	return out
}

// convergeWithin is how long after everything has healed the cluster may take to
// be as it is wanted.
const convergeWithin = 2 * time.Minute

// converge waits until a healed cluster is as it is wanted.
func (w *World) converge(when string) {
	reason := ""
	for begun := time.Now(); time.Since(begun) < convergeWithin; {
		if !w.rest(time.Second) {
			return
		}
		if reason = w.unsettled(); reason == "" {
			return
		}
	}
	w.violate("converge", "%s, and %s later %s", when, convergeWithin, reason)
}

// unsettled returns what is not yet as it is wanted in a healed cluster.
func (w *World) unsettled() string {
	if reason := w.unsettledPeers(); reason != "" {
		return reason
	}
	if lost := w.oracle.lost(); len(lost) > 0 {
		return fmt.Sprintf("acknowledged writes are beyond the end of the log: %v", lost)
	}
	return w.unsettledWork()
}

// unsettledPeers is unsettled for the control plane alone.
func (w *World) unsettledPeers() string {
	leader := w.leader()
	if leader == nil {
		return "nobody leads"
	}
	index, _ := w.oracle.at()
	lead := leader.proc.Load()
	if lead == nil {
		return "the leader has just ended"
	}
	for _, id := range slices.Sorted(maps.Keys(w.peers)) {
		p := w.peers[id].proc.Load()
		switch {
		case !w.wanted(id):
		case p == nil:
			return "peer " + id + " does not run"
		case p.peer.State().View().Index() < index:
			return fmt.Sprintf("peer %s has applied %d of %d", id, p.peer.State().View().Index(), index)
		case !slices.ContainsFunc(lead.peer.Peers(), func(s *pb.PeerStatus) bool { return s.GetId() == id && s.GetVoter() }):
			return "peer " + id + " is no voter"
		case p.peer.Standing() != nil:
			return "peer " + id + ": " + p.peer.Standing().Error()
		}
	}
	return ""
}

// unsettledWork is unsettled for nodes and instances.
func (w *World) unsettledWork() string {
	view := w.oracle.view()
	for _, id := range slices.Sorted(maps.Keys(w.workers)) {
		if n, ok := view.Node(id); !ok || n.GetState() != pb.NodeState_NODE_STATE_READY {
			return "node " + id + " is not registered"
		}
	}
	// What waits for a node waits rightly when users have drained them all.
	full := !slices.ContainsFunc(view.Nodes(nil), fsm.Schedulable)
	for _, in := range view.Instances(nil) {
		if !settledInstance(in) && (!full || !fsm.Unplaced(in)) {
			return fmt.Sprintf("instance %s is %s, generation %d on %q, wanted %t: %q; %s leads", in.GetId(), in.GetStatus().GetState(),
				in.GetPlacement().GetGeneration(), in.GetPlacement().GetNodeId(), in.GetDesiredRunning(), in.GetStatus().GetMessage(), w.leader().id)
		}
	}
	return ""
}

func (w *World) peerIDs() []string { return slices.Sorted(maps.Keys(w.peers)) }

func (w *World) workerIDs() []string { return slices.Sorted(maps.Keys(w.workers)) }

func (w *World) machineIDs() []string { return append(w.peerIDs(), w.workerIDs()...) }
