package sim

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing/synctest"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The kinds of fault.
const (
	faultCrashPeer     = "crash a peer"
	faultCrashLeader   = "crash the leader"
	faultCrashAll      = "crash all peers"
	faultRestartPeer   = "restart a peer as planned"
	faultTransfer      = "transfer leadership"
	faultPartition     = "split the peers"
	faultIsolateLeader = "isolate the leader"
	faultOneWay        = "cut one way"
	faultPausePeer     = "pause a peer"
	faultPauseLeader   = "pause the leader"
	faultStorm         = "lose and repeat messages"
	faultLate          = "answer late"
	faultSlow          = "slow network"
	faultSlowDisk      = "slow disk"
	faultHangingDisk   = "hanging disk"
	faultFailingDisk   = "failing disk"
	faultWipe          = "wipe a disk"
	faultReplace       = "remove a peer and add it anew"
	faultFlip          = "flip a bit on a disk"
	faultClock         = "move a clock"
	faultCrashWorker   = "crash an agent"
	faultRestartWorker = "restart an agent as planned"
	faultPauseWorker   = "pause an agent"
	faultCutWorker     = "cut an agent from the peers"
	faultCutWorkers    = "cut an agent from another"
	faultCutControl    = "cut the peers from all agents"
	faultLateLease     = "cut a leader off while late answers reach it"
	faultCutAnswers    = "lose the answers to clients"
	faultPowerCut      = "cut the power in the middle of writes"
	faultForget        = "wipe a peer that knew what a lagging one does not"
	faultLateRenewals  = "answer an agent late, then cut it off"
	faultLateWorker    = "carry what an agent sends very late"
	faultLateCalls     = "delay the calls of an agent and cut it off"
)

// troubles makes faults and remembers which machines they touched.
type troubles struct {
	world *World
	dice  *rand.Rand
	wait  sync.WaitGroup

	mu sync.Mutex
	// heals are the ends of the faults under way, by number.
	heals map[int]func()
	next  int
	past  []*trouble
	// flipped are peers with damage on disk, badDisk those whose disk failed or hung.
	flipped, badDisk map[string]bool
}

// trouble is one fault.
type trouble struct {
	kind     string
	machines []string
	from     time.Time
	until    time.Time // zero while it lasts
}

func newTroubles(w *World) *troubles {
	return &troubles{
		world: w, dice: rand.New(rand.NewPCG(w.cfg.Seed, 0x666c74)), heals: map[int]func(){},
		flipped: map[string]bool{}, badDisk: map[string]bool{},
	}
}

// season makes faults for d.
func (t *troubles) season(d time.Duration) {
	w := t.world
	for end := time.Now().Add(d); time.Now().Before(end); {
		if !w.rest(time.Duration(t.dice.ExpFloat64() * float64(w.profile.Calm))) {
			return
		}
		kind := t.pick()
		lasts := time.Second + time.Duration(t.dice.ExpFloat64()*float64(w.profile.Lasts))
		heal, machines := t.strike(kind)
		if heal == nil {
			continue
		}
		w.counts.fault(kind)
		w.note("fault: %s %v for %s", kind, machines, lasts.Round(time.Millisecond))
		number := t.begin(kind, machines, heal)
		if t.dice.Float64() < w.profile.Overlap && !damages(kind) {
			t.wait.Go(func() {
				w.rest(lasts)
				t.heal(number)
			})
			continue
		}
		ok := w.rest(lasts)
		t.heal(number)
		if !ok {
			return
		}
	}
}

func (t *troubles) pick() string {
	total := 0
	kinds := slices.Sorted(maps.Keys(t.world.profile.Faults))
	for _, k := range kinds {
		total += t.world.profile.Faults[k]
	}
	at := t.dice.IntN(total)
	for _, k := range kinds {
		if at -= t.world.profile.Faults[k]; at < 0 {
			return k
		}
	}
	return kinds[0]
}

func (t *troubles) begin(kind string, machines []string, heal func()) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	record := &trouble{kind: kind, machines: machines, from: time.Now()}
	t.past = append(t.past, record)
	if len(t.past) > 200 {
		t.past = slices.Clone(t.past[100:])
	}
	t.heals[t.next] = sync.OnceFunc(func() {
		heal()
		t.mu.Lock()
		record.until = time.Now()
		t.mu.Unlock()
	})
	return t.next
}

func (t *troubles) heal(number int) {
	t.mu.Lock()
	heal := t.heals[number]
	delete(t.heals, number)
	t.mu.Unlock()
	if heal != nil {
		heal()
	}
}

// healAll ends all faults.
func (t *troubles) healAll() {
	t.mu.Lock()
	numbers := slices.Sorted(maps.Keys(t.heals))
	t.mu.Unlock()
	for _, n := range numbers {
		t.heal(n)
	}
	if t.world.whole() {
		t.wait.Wait()
	}
	t.world.note("all faults healed")
}

// disk reports whether a peer's disk gave it a reason to end.
func (t *troubles) disk(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.badDisk[id]
}

// damaged reports whether there is damage on a peer's disk, and forgets it: it is set aside now.
func (t *troubles) damaged(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.flipped[id]
	delete(t.flipped, id)
	return was
}

// onlyLeaderChanges reports whether lately nothing went wrong but that one leader
// was replaced.
func (t *troubles) onlyLeaderChanges(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	changes := 0
	for _, p := range t.past {
		if !p.until.IsZero() && now.Sub(p.until) > quietTime {
			continue
		}
		switch p.kind {
		case faultTransfer, faultCrashLeader, faultCrashPeer, faultRestartPeer:
			if changes++; changes > 1 {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// crashedAlone returns when a node crashed that is still down, if nothing else was
// wrong since, or shortly before.
func (t *troubles) crashedAlone(node string) (at time.Time, alone bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.past {
		if p.kind == faultCrashWorker && p.until.IsZero() && p.machines[0] == node {
			at = p.from
		}
	}
	for _, p := range t.past {
		if !p.from.Equal(at) && (p.until.IsZero() || at.Sub(p.until) < quietTime) {
			return at, false
		}
	}
	return at, !at.IsZero()
}

// quietTime is how long the effects of a fault may last after it healed.
const quietTime = 20 * time.Second

// strike begins a fault and returns how it ends and whom it touches; nil when it
// cannot be now.
func (t *troubles) strike(kind string) (heal func(), machines []string) {
	w := t.world
	peer := w.peers[t.one(w.peerIDs())]
	leader := w.leader()
	switch kind {
	case faultCrashLeader, faultTransfer, faultIsolateLeader, faultPauseLeader, faultLateLease:
		if leader == nil {
			return nil, nil
		}
		peer = leader
	}
	reason := fmt.Sprintf("%s %d", kind, t.next+1)
	calm := func() { w.net.Calm(reason) }
	switch kind {
	case faultCrashPeer, faultCrashLeader:
		return t.crashPeer(peer), []string{peer.id}
	case faultCrashAll:
		return t.crashAll(), w.peerIDs()
	case faultRestartPeer:
		return t.restartPeer(peer), []string{peer.id}
	case faultTransfer:
		return t.transfer(peer), []string{peer.id}
	case faultPartition:
		return calm, t.split(reason)
	case faultIsolateLeader:
		t.isolate(reason, peer.id, w.machineIDs(), weather{cut: true})
		return calm, []string{peer.id}
	case faultOneWay:
		return calm, t.oneWay(reason)
	case faultPausePeer, faultPauseLeader:
		t.isolate(reason, peer.id, w.machineIDs(), weather{held: true})
		return calm, []string{peer.id}
	case faultStorm:
		return calm, t.everywhere(reason, weather{loss: 0.05 + 0.3*t.dice.Float64(), twice: 0.3 * t.dice.Float64(), slow: 2 * time.Millisecond})
	case faultLate:
		return calm, t.everywhere(reason, weather{late: 0.2 + 0.3*t.dice.Float64(), lateBy: 6 * w.profile.Heartbeat, twice: 0.1})
	case faultSlow:
		return calm, t.everywhere(reason, weather{slow: time.Duration(1+t.dice.IntN(40)) * time.Millisecond})
	case faultSlowDisk, faultHangingDisk, faultFailingDisk:
		return t.badDiskOf(kind, peer), []string{peer.id}
	case faultWipe, faultFlip, faultReplace:
		return t.damage(kind, peer), []string{peer.id}
	case faultCutAnswers:
		for i := range w.profile.Clients {
			w.net.Disturb(reason, route{peer.id, fmt.Sprintf("c%d", i+1)}, weather{cut: true})
		}
		return calm, []string{peer.id}
	case faultForget:
		return t.forget(reason)
	case faultPowerCut:
		return t.powerCut(), w.peerIDs()
	case faultLateLease:
		return t.lateLease(reason, peer), []string{peer.id}
	case faultClock:
		by := time.Duration(t.dice.Int64N(int64(time.Minute))) - 30*time.Second
		peer.clock.jump(by)
		return func() {}, []string{peer.id}
	}
	return t.strikeWorker(kind, reason)
}

func (t *troubles) strikeWorker(kind, reason string) (heal func(), machines []string) {
	w := t.world
	if len(w.workers) == 0 {
		return nil, nil
	}
	ids := w.workerIDs()
	m := w.workers[t.one(ids)]
	calm := func() { w.net.Calm(reason) }
	switch kind {
	case faultCrashWorker, faultRestartWorker:
		if m.proc.Load() == nil {
			return nil, nil
		}
		w.setDown(m.id, true)
		if kind == faultRestartWorker {
			m.stop()
		} else {
			synctest.Wait()
			m.crash()
		}
		return func() {
			w.setDown(m.id, false)
			if !w.closing.Load() {
				m.start()
			}
		}, []string{m.id}
	case faultPauseWorker:
		t.isolate(reason, m.id, w.machineIDs(), weather{held: true})
		return calm, []string{m.id}
	case faultCutWorker:
		t.isolate(reason, m.id, w.peerIDs(), weather{cut: true})
		return calm, []string{m.id}
	case faultCutWorkers:
		other := t.one(ids)
		if other == m.id {
			return nil, nil
		}
		w.net.Disturb(reason, route{m.id, other}, weather{cut: true})
		return calm, []string{m.id, other}
	case faultLateRenewals:
		for _, id := range w.peerIDs() {
			w.net.Disturb(reason, route{id, m.id}, weather{slow: 350 * time.Millisecond})
		}
		t.then(3*time.Second, func() { t.isolate(reason, m.id, w.peerIDs(), weather{cut: true}) })
		return calm, []string{m.id}
	case faultLateWorker:
		for _, id := range w.peerIDs() {
			w.net.Disturb(reason, route{m.id, id}, weather{slow: 3500 * time.Millisecond})
		}
		return calm, []string{m.id}
	case faultLateCalls:
		for _, id := range ids {
			if id != m.id {
				w.net.Disturb(reason, route{m.id, id}, weather{slow: time.Second})
			}
		}
		t.isolate(reason, m.id, w.peerIDs(), weather{cut: true})
		return calm, []string{m.id}
	case faultCutControl:
		for _, id := range ids {
			t.isolate(reason, id, w.peerIDs(), weather{cut: true})
		}
		return calm, ids
	}
	return nil, nil
}

// then goes on with a fault, unless it has healed meanwhile.
func (t *troubles) then(d time.Duration, f func()) {
	number := t.next + 1
	t.world.after(d, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.heals[number] != nil {
			f()
		}
	})
}

func (t *troubles) one(ids []string) string { return ids[t.dice.IntN(len(ids))] }

// isolate puts weather between one machine and others, both ways.
func (t *troubles) isolate(reason, id string, others []string, bad weather) {
	for _, other := range others {
		if other != id {
			t.world.net.Disturb(reason, route{id, other}, bad)
			t.world.net.Disturb(reason, route{other, id}, bad)
		}
	}
}

// split cuts the peers, and each agent with one side, in two.
func (t *troubles) split(reason string) []string {
	all := t.world.machineIDs()
	side := map[string]bool{}
	for _, id := range all {
		side[id] = t.dice.IntN(2) == 0
	}
	for _, a := range all {
		for _, b := range all {
			if side[a] != side[b] {
				t.world.net.Disturb(reason, route{a, b}, weather{cut: true})
			}
		}
	}
	return all
}

// oneWay cuts some routes in one direction only.
func (t *troubles) oneWay(reason string) []string {
	peers := t.world.peerIDs()
	var touched []string
	for range 1 + t.dice.IntN(len(peers)) {
		from, to := t.one(peers), t.one(t.world.machineIDs())
		if t.dice.IntN(2) == 0 {
			from, to = to, from
		}
		if from != to {
			t.world.net.Disturb(reason, route{from, to}, weather{cut: true})
			touched = append(touched, from, to)
		}
	}
	return touched
}

func (t *troubles) everywhere(reason string, bad weather) []string {
	all := t.world.machineIDs()
	for _, a := range all {
		for _, b := range all {
			if a != b {
				t.world.net.Disturb(reason, route{a, b}, bad)
			}
		}
	}
	return all
}

// crashPeer crashes one and starts it again when it heals.
func (t *troubles) crashPeer(m *peerMachine) func() {
	w := t.world
	if m.proc.Load() == nil {
		return nil
	}
	if t.dice.IntN(3) > 0 {
		// The worst moment is in the middle of a write.
		select {
		case <-m.disk.nextWrite():
			<-time.After(time.Duration(t.dice.IntN(100)) * time.Microsecond)
		case <-time.After(time.Second):
		}
	}
	w.setDown(m.id, true)
	m.crash()
	return func() {
		w.setDown(m.id, false)
		if !w.closing.Load() && m.proc.Load() == nil {
			m.start()
		}
	}
}

func (t *troubles) crashAll() func() {
	var heals []func()
	for _, id := range t.world.peerIDs() {
		if heal := t.crashPeer(t.world.peers[id]); heal != nil {
			heals = append(heals, heal)
		}
	}
	return func() {
		for _, heal := range heals {
			heal()
		}
	}
}

func (t *troubles) restartPeer(m *peerMachine) func() {
	w := t.world
	if m.proc.Load() == nil {
		return nil
	}
	w.setDown(m.id, true)
	m.stop()
	return func() {
		w.setDown(m.id, false)
		if !w.closing.Load() && m.proc.Load() == nil {
			m.start()
		}
	}
}

func (t *troubles) transfer(m *peerMachine) func() {
	w := t.world
	w.background.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		// Whether it succeeds is no matter here.
		_, _ = w.clients.admin(m).TransferLeadership(ctx, &pb.TransferLeadershipRequest{})
	})
	return func() {}
}

// badDiskOf makes a disk bad; a peer that ends for it is started again.
func (t *troubles) badDiskOf(kind string, m *peerMachine) func() {
	limit := 8 * t.world.profile.Heartbeat
	switch kind {
	case faultSlowDisk:
		m.disk.set(func(d *diskTrouble) { d.slow = limit / time.Duration(1+t.dice.IntN(40)) })
	case faultHangingDisk:
		m.disk.set(func(d *diskTrouble) { d.hangs = true })
	default:
		m.disk.set(func(d *diskTrouble) { d.fails = 0.02 + 0.2*t.dice.Float64() })
	}
	t.mu.Lock()
	t.badDisk[m.id] = true
	t.mu.Unlock()
	return func() { m.disk.set(func(d *diskTrouble) { *d = diskTrouble{} }) }
}
