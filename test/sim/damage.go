package sim

import (
	"context"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// damages reports whether a fault takes away what a disk had acknowledged.
func damages(kind string) bool {
	return kind == faultWipe || kind == faultFlip || kind == faultReplace || kind == faultForget
}

// mayDamage reports whether all peers hold everything and nothing else is wrong.
func (t *troubles) mayDamage() bool {
	if t.world.unsettledPeers() != "" {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.heals) == 0
}

// recover waits until all peers hold everything again: nothing else may go wrong before.
func (t *troubles) recover() {
	for begun := time.Now(); t.world.unsettledPeers() != "" && time.Since(begun) < convergeWithin; {
		if !t.world.rest(time.Second) {
			return
		}
	}
}

// damage takes a disk away, or flips a bit on it, while the machine is down. One
// disk at a time, and only while all others hold everything: what a majority has
// lost is lost.
func (t *troubles) damage(kind string, m *peerMachine) func() {
	w := t.world
	if !t.mayDamage() || m.proc.Load() == nil {
		return nil
	}
	w.setDown(m.id, true)
	m.crash()
	switch kind {
	case faultReplace:
		t.remove(m)
		m.disk.wipe()
	case faultWipe:
		m.disk.wipe()
	default:
		index, ok := m.disk.flip()
		w.note("a bit of entry %d on the disk of peer %s is flipped: %t", index, m.id, ok)
		t.mu.Lock()
		t.flipped[m.id] = ok
		t.mu.Unlock()
	}
	return func() {
		w.setDown(m.id, false)
		if w.closing.Load() {
			return
		}
		m.start()
		t.recover()
	}
}

// remove has an operator take a peer out of the cluster. When nobody leads it
// stays in, and then comes back as one that has lost its disk.
func (t *troubles) remove(m *peerMachine) {
	leader := t.world.leader()
	for begun := time.Now(); leader == nil && time.Since(begun) < 10*time.Second; leader = t.world.leader() {
		if !t.world.rest(time.Second) {
			return
		}
	}
	if leader == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := t.world.clients.admin(leader).Remove(ctx, &pb.RemoveRequest{PeerId: m.id})
	t.world.note("peer %s is removed: %v", m.id, err)
}

// forget makes one peer lag, lets the leader and the third commit without it, and
// then takes the third's disk and stops the leader. What they committed is safe,
// for the leader has it: as long as the one that forgot does not help the one that
// lags to be elected.
func (t *troubles) forget(reason string) (heal func(), machines []string) {
	w := t.world
	leader := w.leader()
	if !t.mayDamage() || leader == nil || len(w.peers) != 3 {
		return nil, nil
	}
	var others []*peerMachine
	for _, id := range w.peerIDs() {
		if id != leader.id {
			others = append(others, w.peers[id])
		}
	}
	t.dice.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	lags, forgets := others[0], others[1]
	t.isolate(reason, lags.id, w.machineIDs(), weather{cut: true})
	w.rest(2 * time.Second)
	w.setDown(leader.id, true)
	leader.crash()
	w.setDown(forgets.id, true)
	forgets.crash()
	forgets.disk.wipe()
	w.net.Calm(reason)
	w.setDown(forgets.id, false)
	if !w.closing.Load() {
		forgets.start()
	}
	return func() {
		w.setDown(leader.id, false)
		if w.closing.Load() {
			return
		}
		leader.start()
		t.recover()
	}, []string{leader.id, lags.id, forgets.id}
}

// powerCut crashes all peers at once while their disks are busy.
func (t *troubles) powerCut() func() {
	w := t.world
	for _, m := range w.peers {
		m.disk.set(func(d *diskTrouble) { d.slow = w.profile.Heartbeat / 4 })
	}
	w.rest(time.Second)
	if leader := w.leader(); leader != nil {
		select {
		case <-leader.disk.nextWrite():
			<-time.After(time.Duration(t.dice.Int64N(int64(w.profile.Heartbeat / 4))))
		case <-time.After(time.Second):
		}
	}
	var back []*peerMachine
	for _, id := range w.peerIDs() {
		if m := w.peers[id]; m.proc.Load() != nil {
			w.setDown(id, true)
			m.crash()
			back = append(back, m)
		}
	}
	return func() {
		for _, m := range w.peers {
			m.disk.set(func(d *diskTrouble) { d.slow = 0 })
		}
		for _, m := range back {
			w.setDown(m.id, false)
			if !w.closing.Load() && m.proc.Load() == nil {
				m.start()
			}
		}
	}
}

// lateLease lets all answers to the leader come late, but not so late that it
// gives up, and then cuts it off: what is under way keeps it in the belief that it
// leads while the others elect another one.
func (t *troubles) lateLease(reason string, leader *peerMachine) func() {
	w := t.world
	late := w.profile.Heartbeat * 3 / 10
	for _, id := range w.peerIDs() {
		if id != leader.id {
			w.net.Disturb(reason, route{id, leader.id}, weather{slow: late})
		}
	}
	t.then(2*time.Second, func() {
		for _, id := range w.peerIDs() {
			if id != leader.id {
				w.net.Disturb(reason, route{leader.id, id}, weather{cut: true})
			}
		}
	})
	return func() { w.net.Calm(reason) }
}
