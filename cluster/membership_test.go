package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMayRemove(t *testing.T) {
	tests := []struct {
		voters, dead string
		remove       string
		says         string
	}{
		{"a b c", "c", "c", ""},
		{"a b c", "", "c", ""},
		{"a b c", "b c", "c", "more than a minority"},
		{"a b c", "b", "c", "1 would be alive"},
		{"a b c d e", "d e", "e", ""},
		{"a b c d e", "c d e", "e", "more than a minority"},
		{"a b c d", "c d", "d", "more than a minority"},
		{"a b", "b", "b", "more than a minority"},
		{"a b", "", "b", ""},
		{"a", "", "a", "only voter"},
		{"a b c", "b c", "witness", ""},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("of %s dead %s remove %s", tt.voters, tt.dead, tt.remove), func(t *testing.T) {
			servers := []raft.Server{{ID: "witness", Suffrage: raft.Nonvoter}}
			for id := range strings.FieldsSeq(tt.voters) {
				servers = append(servers, raft.Server{ID: raft.ServerID(id)})
			}
			got := mayRemove(servers, tt.remove, func(id string) bool { return !strings.Contains(tt.dead, id) })
			if (got == "") != (tt.says == "") || !strings.Contains(got, tt.says) {
				t.Errorf("%q, want %q", got, tt.says)
			}
		})
	}
}

// Whatever dies, and in whatever order and company: each removal can be committed
// by those that live, and what remains has a quorum of live voters.
func TestDeadPeersAreRemovedOnlyWhileAQuorumLives(t *testing.T) {
	for size := 1; size <= 7; size++ {
		for dead := range 1 << size {
			for later := range 1 << size {
				removeAll(t, size, dead, dead|later)
			}
		}
	}
}

// removeAll removes one dead peer after the other; before the second removal
// those in later have died too.
func removeAll(t *testing.T, size, dead, later int) {
	t.Helper()
	var servers []raft.Server
	for i := range size {
		servers = append(servers, raft.Server{ID: raft.ServerID(fmt.Sprint(i))})
	}
	for round := 0; ; round++ {
		if round == 1 {
			dead = later
		}
		since, live := map[string]time.Time{}, 0
		for _, s := range servers {
			if i, _ := strconv.Atoi(string(s.ID)); dead>>i&1 == 1 {
				since[string(s.ID)] = time.Unix(int64(i), 0)
			} else {
				live++
			}
		}
		id, _ := longestDead(since)
		why := "nobody is dead"
		if id != "" {
			why = mayRemove(servers, id, func(s string) bool { _, gone := since[s]; return !gone })
		}
		before := len(servers)
		quorum, rest := before/2+1, (before-1)/2+1
		switch {
		case why == "" && (live < quorum || live < rest):
			t.Fatalf("of %d voters %d live, and one was removed", before, live)
		case why == "" && before == 1:
			t.Fatal("the only voter was removed")
		case why != "" && id != "" && live >= quorum:
			t.Fatalf("of %d voters %d live, and a dead one was kept: %s", before, live, why)
		case why != "":
			return
		}
		servers = slices.DeleteFunc(servers, func(s raft.Server) bool { return string(s.ID) == id })
	}
}

func TestPeerWithWipedDiskComesBackAsAVoter(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	l.put("before")
	lost := l.other(leader)
	id := lost.cfg.ID
	lost.crash()
	l.put("meanwhile")
	l.dirs[id] = t.TempDir()
	// It starts with the same configuration as the first time.
	l.start(id, expect(3))
	l.voters("n1", "n2", "n3")
	l.everywhere("before")
	l.everywhere("meanwhile")
	if n := l.peers[id]; n.state.View().Hash() == "" {
		t.Error("no state")
	}
}

// What a voter acknowledged before it lost its disk counts until it is out of
// the configuration, so joining again must take its vote first.
func TestJoinTakesTheVoteOfAKnownVoter(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	lost := l.other(leader)
	m, _ := leader.member(lost.cfg.ID)
	lost.crash()
	resp, err := pb.NewClusterServiceClient(l.admin(l.leader())).Join(t.Context(), &pb.JoinRequest{
		PeerId: lost.cfg.ID, RaftAddress: m.Metadata.GetRaftAddress(), ApiAddress: m.Metadata.GetApiAddress(),
	})
	if err != nil || resp.GetIndex() == 0 {
		t.Fatal(resp, err)
	}
	if suffrage, ok := l.leader().suffrage(lost.cfg.ID); !ok || suffrage != raft.Nonvoter {
		t.Errorf("it is a member %v, with suffrage %v", ok, suffrage)
	}
}

func TestPeerWithWipedDiskWaitsForAQuorumOfTheOthers(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	wiped := l.other(leader)
	id := wiped.cfg.ID
	wiped.crash()
	l.dirs[id] = t.TempDir()
	// As if the third were down: it could not acknowledge that the wiped one is out.
	third := l.other(leader).cfg.ID
	l.hub.alive(third, false)
	again := l.start(id, expect(3))
	l.put("meanwhile")
	l.everywhere("meanwhile")
	if suffrage, ok := l.leader().suffrage(id); !ok || suffrage != raft.Voter || again.role.mayVote.Load() {
		t.Errorf("%s was removed: member %v, suffrage %v", id, ok, suffrage)
	}
	l.hub.alive(third, true)
	if err := again.Standing(); err == nil {
		t.Error("a peer that gives no vote says that it can be counted on")
	}
	l.eventually(id+" may vote again", func() bool { return again.role.mayVote.Load() })
	l.voters("n1", "n2", "n3")
	l.eventually(id+" can be counted on", func() bool { return again.Standing() == nil })
}

func TestWipedPeerGrantsNoVoteBeforeItHasJoinedAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	follower := l.other(leader)
	wiped := l.other(leader, follower)
	l.put("acknowledged")
	l.everywhere("acknowledged")
	wiped.crash()
	leader.crash()
	term := follower.raft.Load().CurrentTerm()
	// Only one voter still knows the acknowledged write. The wiped one must
	// not help anybody to a quorum, whoever asks.
	l.dirs[wiped.cfg.ID] = t.TempDir()
	again := l.start(wiped.cfg.ID, expect(3))
	l.eventually("the wiped peer is asked for its vote", func() bool { return again.raft.Load() != nil && follower.raft.Load().State() == raft.Candidate })
	quiet, cancel := context.WithTimeout(t.Context(), 10*testHeartbeat)
	defer cancel()
	<-quiet.Done()
	if now := follower.raft.Load().CurrentTerm(); now != term {
		t.Fatalf("term %d began, after %d, with the vote of a peer that forgot", now, term)
	}
	// With a second peer that remembers there is a quorum, and the wiped one returns.
	l.start(leader.cfg.ID)
	l.leader()
	l.voters("n1", "n2", "n3")
	l.everywhere("acknowledged")
}

// As long as a wiped peer has not joined again the next disk must not be lost, so
// its pause between two tries ends once there is somebody to ask.
func TestWipedPeerJoinsAsSoonAsSomebodyLeads(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	wiped := l.other(leader)
	wiped.crash()
	leader.crash()
	l.dirs[wiped.cfg.ID] = t.TempDir()
	again := l.start(wiped.cfg.ID, expect(3))
	woken := make(chan bool, 1)
	go func() { woken <- again.lull(t.Context(), time.Hour, false) }()
	l.start(leader.cfg.ID)
	l.eventually("the pause ends", func() bool { return len(woken) == 1 })
	if !<-woken {
		t.Error("the pause ended without a leader")
	}
	l.eventually("it has joined", func() bool { return again.role.mayVote.Load() })
}

func TestRestartedPeersFindEachOtherAtNewAddresses(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.three()
	l.put("before")
	for _, id := range []string{"n1", "n2", "n3"} {
		l.peers[id].stop()
	}
	// All ports differ from those in the Raft configuration.
	for _, id := range []string{"n1", "n2", "n3"} {
		l.start(id, expect(3))
	}
	leader := l.leader()
	l.put("after")
	l.everywhere("before")
	l.everywhere("after")
	l.eventually("the new addresses are recorded", func() bool {
		for id, p := range l.peers {
			record, _ := leader.state.View().Peer(id)
			m, _ := p.member(id)
			if record.GetApiAddress() != p.cfg.APIAdvertise || record.GetRaftAddress() != m.Metadata.GetRaftAddress() ||
				leader.recordedAddress(id) != m.Metadata.GetRaftAddress() {
				return false
			}
		}
		return true
	})
}

func TestForgedAddressDoesNotReachTheRegistry(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	victim := l.other(leader)
	l.eventually("all addresses are recorded", func() bool {
		record, ok := leader.state.View().Peer(victim.cfg.ID)
		return ok && record.GetApiAddress() == victim.cfg.APIAdvertise
	})
	m, _ := leader.member(victim.cfg.ID)
	honest := m.Metadata.GetRaftAddress()
	other, _ := leader.member(l.other(leader, victim).cfg.ID)
	forged := victim.hubSource()
	meta := &pb.PeerMetadata{
		Cluster: "test", PeerId: victim.cfg.ID, Bootstrapped: true,
		RaftAddress: other.Metadata.GetRaftAddress(), ApiAddress: other.Metadata.GetApiAddress(),
	}
	if err := forged.Update(meta); err != nil {
		t.Fatal(err)
	}
	// Entries still reach the victim, at its configured address.
	l.put("despite")
	l.everywhere("despite")
	record, _ := leader.state.View().Peer(victim.cfg.ID)
	if record.GetApiAddress() != victim.cfg.APIAdvertise || leader.recordedAddress(victim.cfg.ID) != honest {
		t.Errorf("the forged address was believed: %v", record)
	}
}

// removeOne removes a follower that has had its place for a while.
func (l *lab) removeOne(leader *running) *running {
	l.Helper()
	removed := l.other(leader)
	id := removed.cfg.ID
	l.eventually(id+" has had its place for a while", func() bool { return removed.role.settled.Load() })
	cluster := pb.NewClusterServiceClient(l.admin(leader))
	l.eventually(id+" is removed", func() bool {
		_, err := cluster.Remove(l.Context(), &pb.RemoveRequest{PeerId: id})
		code := apierror.CodeOf(err)
		switch {
		case err == nil, code == pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND:
			return true
		case code != pb.ErrorCode_ERROR_CODE_NO_LEADER: // else an election came between
			l.Fatal(err)
		}
		return false
	})
	l.eventually("the registry has forgotten "+id, func() bool {
		_, known := l.leader().state.View().Peer(id)
		return !known
	})
	return removed
}

// saysRemoved waits until a peer tells that it was removed, and how it gets back.
func (l *lab) saysRemoved(p *running) {
	l.Helper()
	l.eventually("the removed peer says so", func() bool {
		_, err := p.Propose(l.Context(), write("w"))
		return strings.Contains(err.Error(), "not part of the cluster")
	})
	api := pb.NewControlPlaneServiceClient(l.admin(p))
	_, err := api.ListProviders(l.Context(), &pb.ListProvidersRequest{})
	e := apierror.From(err)
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || e.Detail("removed") != "true" {
		l.Errorf("a call to the removed peer: %v", err)
	}
	if way := e.Proto(l.Context()).GetNextStep(); !strings.Contains(way, filepath.Join(p.cfg.DataDir, "raft")) {
		l.Errorf("it says to try %q", way)
	}
}

func TestRemovedPeerStaysOutUntilItForgetsItsPast(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	removed := l.removeOne(leader)
	id := removed.cfg.ID
	l.saysRemoved(removed)
	removed.stop()
	l.put("meanwhile")

	again := l.start(id, expect(3))
	l.saysRemoved(again)
	if _, member := leader.suffrage(id); member {
		t.Errorf("%s was let in again with the disk of before", id)
	}
	again.stop()

	l.dirs[id] = t.TempDir()
	l.start(id, expect(3))
	l.voters("n1", "n2", "n3")
	l.everywhere("meanwhile")
}

// A machine is replaced by another under the same name and at another address.
func TestPeerIsReplacedUnderItsName(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	removed := l.removeOne(leader)
	id := removed.cfg.ID
	removed.stop()
	l.dirs[id] = t.TempDir()
	next := l.start(id)
	l.voters("n1", "n2", "n3")
	l.put("after")
	l.everywhere("after")
	l.eventually("the registry has its new address", func() bool {
		record, ok := l.leader().state.View().Peer(id)
		return ok && record.GetApiAddress() == next.cfg.APIAdvertise
	})
}

func TestNewPeerVotesOnlyWhenItHasBeenInTouchForAWhile(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three(func(c *Config) { c.Timers.Stabilization = time.Hour })
	p := l.start("n4")
	l.put("w")
	l.everywhere("w")
	l.eventually("n4 replicates", func() bool { s, ok := leader.suffrage("n4"); return ok && s == raft.Nonvoter })
	_, err := pb.NewClusterServiceClient(l.admin(leader)).Promote(t.Context(), &pb.PromoteRequest{PeerId: "n4"})
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT || !strings.Contains(err.Error(), "in touch with the leader for 1h") {
		t.Errorf("a promotion at once: %v", err)
	}
	p.crash()
	l.eventually("the leader misses n4", func() bool { return leader.role.contacts.steadySince("n4").IsZero() })
	_, err = pb.NewClusterServiceClient(l.admin(leader)).Promote(t.Context(), &pb.PromoteRequest{PeerId: "n4"})
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT || !strings.Contains(err.Error(), "not in touch") {
		t.Errorf("a promotion of a peer that is down: %v", err)
	}
	l.voters("n1", "n2", "n3")
}

// When a follower is removed and added again, the last heartbeat to the old one may
// fail after those to the new one have begun.
func TestLateFailureOfAHeartbeatKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	id := l.other(leader).cfg.ID
	leader.beat(raft.ServerID(id), false)
	l.eventually("the follower is in touch", func() bool {
		return !leader.role.contacts.steadySince(id).IsZero() && !leader.role.contacts.isLost(id)
	})
}

// A peer that was stopped after it had joined, and before it voted, still
// becomes a voter.
func TestInterruptedJoinIsFinishedAfterARestart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	patience := 1500 * time.Millisecond
	leader := l.three(func(c *Config) { c.Timers.Stabilization = patience })
	began := time.Now()
	p := l.start("n4")
	l.eventually("n4 has its place", func() bool { return p.role.mayVote.Load() })
	p.crash()
	l.start("n4")
	l.voters("n1", "n2", "n3", "n4")
	if took := time.Since(began); took < patience {
		t.Errorf("n4 votes after %s, and must have been in touch with %s for %s", took, leader.cfg.ID, patience)
	}
}

// A disk of an old cluster among new ones: nobody forms a second cluster beside
// it, and nobody forgets the old one.
func TestOldDiskAmongNewOnesKeepsThemFromFormingACluster(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.three()
	l.put("precious")
	l.everywhere("precious")
	for _, id := range []string{"n1", "n2", "n3"} {
		l.peers[id].stop()
	}
	kept := l.dirs["n2"]
	l.dirs = map[string]string{"n2": kept}
	for _, id := range []string{"n1", "n2", "n3"} {
		l.start(id, expect(3))
	}
	quiet, cancel := context.WithTimeout(t.Context(), 8*testHeartbeat)
	defer cancel()
	<-quiet.Done()
	for id, p := range l.peers {
		if leader, _ := p.Leader(); leader != "" || id != "n2" && len(p.servers()) != 0 {
			t.Errorf("%s has the servers %v and the leader %q", id, p.servers(), leader)
		}
	}
	if !has(l.peers["n2"].state.View(), "precious") && l.peers["n2"].raft.Load().LastIndex() < 3 {
		t.Error("the old disk is not as it was")
	}
}

func TestRemoveKeepsTheQuorumUnlessForced(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	dead := l.other(leader)
	dead.crash()
	live := l.other(leader)
	cluster := pb.NewClusterServiceClient(l.admin(leader))
	_, err := cluster.Remove(t.Context(), &pb.RemoveRequest{PeerId: live.cfg.ID})
	if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_CONFLICT {
		t.Fatalf("removing the second of two live peers: %v", err)
	}
	if _, err := cluster.Remove(t.Context(), &pb.RemoveRequest{PeerId: dead.cfg.ID}); err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Remove(t.Context(), &pb.RemoveRequest{PeerId: "nobody"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND {
		t.Errorf("removing nobody: %v", err)
	}
	if _, err := cluster.Remove(t.Context(), &pb.RemoveRequest{PeerId: live.cfg.ID, Force: true}); err != nil {
		t.Fatal(err)
	}
	l.put("alone")
}

func TestDeadPeerIsRemovedAfterItsTime(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three(func(c *Config) { c.Timers.DeadPeerAfter = 300 * time.Millisecond })
	dead := l.other(leader)
	dead.crash()
	l.eventually("the dead peer is removed", func() bool {
		_, member := leader.suffrage(dead.cfg.ID)
		_, known := leader.state.View().Peer(dead.cfg.ID)
		return !member && !known
	})
	l.put("two-are-enough")
	l.saysRemoved(l.start(dead.cfg.ID))
}

func TestPeerThatOnlyGossipMissesIsKept(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three(func(c *Config) { c.Timers.DeadPeerAfter = 100 * time.Millisecond })
	victim := l.other(leader)
	l.hub.alive(victim.cfg.ID, false)
	quiet, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	<-quiet.Done()
	if _, ok := leader.suffrage(victim.cfg.ID); !ok {
		t.Fatal("a peer that answers was removed because gossip said it is dead")
	}
}

func TestJoinAndPromoteAreForThePeerItselfAndAdmins(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	stranger := identity.Subject{Kind: identity.Node, Name: "n9", Role: identity.RoleServer}
	worker := identity.Subject{Kind: identity.Node, Name: "n8", Role: identity.RoleWorker}
	join := func(s identity.Subject, id string) error {
		_, err := pb.NewClusterServiceClient(l.dialAs(s, leader)).Join(t.Context(),
			&pb.JoinRequest{PeerId: id, RaftAddress: "127.0.0.1:1", ApiAddress: "127.0.0.1:2", NonVoter: true})
		return err
	}
	if err := join(stranger, "n2"); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a peer joined as another: %v", err)
	}
	if err := join(worker, "n8"); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a worker joined: %v", err)
	}
	if err := join(stranger, leader.cfg.ID); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a peer joined as the leader: %v", err)
	}
	if err := join(stranger, "n9"); err != nil {
		t.Errorf("a peer could not join as itself: %v", err)
	}
	as := pb.NewClusterServiceClient(l.dialAs(stranger, leader))
	if _, err := as.Promote(t.Context(), &pb.PromoteRequest{PeerId: "n2"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a peer promoted another: %v", err)
	}
	if _, err := as.Remove(t.Context(), &pb.RemoveRequest{PeerId: "n9"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a peer removed: %v", err)
	}
	if _, err := as.TransferLeadership(t.Context(), &pb.TransferLeadershipRequest{}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED {
		t.Errorf("a peer took the leadership: %v", err)
	}
	if _, err := as.Status(t.Context(), &pb.StatusRequest{}); err != nil {
		t.Errorf("a peer may ask for the status: %v", err)
	}
}

func TestDamagedLogStopsThePeerBeforeItStarts(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start("n1", expect(1))
	l.put("precious-record")
	l.peers["n1"].stop()
	path := filepath.Join(l.dirs["n1"], "raft", "raft.db")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damaged := strings.ReplaceAll(string(raw), "precious-record", "precious-rec0rd")
	if damaged == string(raw) {
		t.Fatal("the record is not in the log")
	}
	if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	p := l.start("n1", expect(1))
	<-p.done
	if p.err == nil || !strings.Contains(p.err.Error(), ErrCorrupt.Error()) || !strings.Contains(p.err.Error(), "checksum") {
		t.Errorf("a damaged log: %v", p.err)
	}
	p.err = nil
}

func TestPeerJoinsAtAnAddressThatAnotherHasLeft(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	moved := l.other(leader)
	m, _ := leader.member(moved.cfg.ID)
	left := m.Metadata.GetRaftAddress()
	moved.stop()
	l.start(moved.cfg.ID, expect(3))
	l.eventually("the registry has followed", func() bool {
		return l.leader().recordedAddress(moved.cfg.ID) != left
	})
	l.start("n4", func(c *Config) { c.RaftBind = left })
	l.voters("n1", "n2", "n3", "n4")
	l.put("w")
	l.everywhere("w")
}
