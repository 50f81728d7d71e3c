package cluster

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (l *lab) worker(p *running) *grpc.ClientConn {
	l.Helper()
	return l.dialAs(identity.Subject{Kind: identity.Node, Name: "w1", Role: identity.RoleWorker}, p)
}

// known waits until a peer has noted on its disk which cluster it is of.
func (r *running) known() string {
	r.lab.Helper()
	r.lab.eventually(r.cfg.ID+" knows its cluster", func() bool { return r.incarnation.String() != "" })
	return r.incarnation.String()
}

func TestAClusterHasOneIdentityForGood(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	id := leader.known()
	for _, p := range l.peers {
		if got := p.known(); got != id || p.state.View().ClusterID() != id {
			t.Errorf("%s is of %q, the leader of %q", p.cfg.ID, got, id)
		}
	}
	// The disk knows it before the log was read again.
	follower := l.other(leader)
	name := follower.cfg.ID
	follower.stop()
	var stored string
	l.prepare = nil
	again := l.start(name, expect(3))
	l.eventually("it has opened its disk", func() bool { stored = again.incarnation.String(); return stored != "" })
	if stored != id {
		t.Errorf("after a restart it is of %q", stored)
	}
	l.voters("n1", "n2", "n3")
	status, err := pb.NewClusterServiceClient(l.admin(again)).Status(t.Context(), &pb.StatusRequest{})
	if err != nil || status.GetClusterId() != id {
		t.Errorf("its status says %q, %v", status.GetClusterId(), err)
	}
}

// TestAnOldDiskIsKeptOutOfANewCluster: two of three peers lost their disks and
// formed a cluster of the same name anew. The third has the longer log, its voters
// are the same, and still it changes nothing: it ends and says why.
func TestAnOldDiskIsKeptOutOfANewCluster(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.three()
	for i := range 20 {
		l.put("old" + strings.Repeat("x", i))
	}
	l.everywhere("old" + strings.Repeat("x", 19))
	old := l.peers["n3"].known()
	for _, id := range []string{"n3", "n1", "n2"} {
		l.peers[id].known()
		l.peers[id].stop()
	}
	delete(l.dirs, "n1")
	delete(l.dirs, "n2")
	l.start("n1", expect(2))
	l.start("n2", expect(2))
	leader := l.leader()
	l.put("new")
	l.everywhere("new")
	for _, p := range l.peers {
		if p.known() == old {
			t.Fatal("the new cluster has the identity of the old one")
		}
	}
	term := leader.raft.Load().CurrentTerm()

	stranger := l.start("n3", expect(3))
	err := stranger.ended()
	if !errors.Is(err, ErrOtherCluster) || !strings.Contains(err.Error(), "move "+l.dirs["n3"]) {
		t.Errorf("ended with %v", err)
	}
	l.put("more")
	l.everywhere("more")
	for _, p := range l.peers {
		if has(p.state.View(), "old") || len(p.servers()) != 2 {
			t.Errorf("%s took something over from the old disk: %v", p.cfg.ID, p.servers())
		}
	}
	if now := l.leader(); now == leader && now.raft.Load().CurrentTerm() != term {
		t.Errorf("the old disk disturbed the term: %d became %d", term, now.raft.Load().CurrentTerm())
	}

	// It is refused by name, too, should it ask to join.
	_, err = pb.NewClusterServiceClient(l.admin(l.leader())).Join(t.Context(), &pb.JoinRequest{
		PeerId: "n3", RaftAddress: "127.0.0.1:1", ApiAddress: "127.0.0.1:2", ClusterId: old,
	})
	if e := apierror.From(err); e.Code() != pb.ErrorCode_ERROR_CODE_CONFLICT || !strings.Contains(e.Error(), "another cluster") {
		t.Errorf("its request to join: %v", err)
	}
}

// TestTheBorder lets through what has no identity, or the same.
func TestTheBorder(t *testing.T) {
	for name, c := range map[string]struct {
		from, to string
		refused  bool
	}{
		"the same": {"a", "a", false}, "another": {"a", "b", true},
		"from a new peer": {"", "b", false}, "to a new peer": {"a", "", false}, "both new": {"", "", false},
	} {
		address, here := raft.NewInmemTransport("")
		target, there := raft.NewInmemTransport("")
		here.Connect(target, there)
		there.Connect(address, here)
		mine, theirs := &incarnation{}, &incarnation{}
		for i, id := range map[*incarnation]string{mine: c.from, theirs: c.to} {
			if id != "" {
				i.id.Store(id)
			}
		}
		sender, err := newBorder(here, mine)
		if err != nil {
			t.Fatal(err)
		}
		receiver, err := newBorder(there, theirs)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		done := make(chan struct{})
		go func() {
			defer close(done)
			receiver.run(ctx)
		}()
		go func() {
			for {
				select {
				case <-ctx.Done():
					return
				case rpc := <-receiver.Consumer():
					var id string
					var answer any
					switch m := rpc.Command.(type) {
					case *raft.AppendEntriesRequest:
						id, answer = string(m.ID), &raft.AppendEntriesResponse{}
					case *raft.RequestVoteRequest:
						id, answer = string(m.ID), &raft.RequestVoteResponse{}
					case *raft.RequestPreVoteRequest:
						id, answer = string(m.ID), &raft.RequestPreVoteResponse{}
					case *raft.TimeoutNowRequest:
						id, answer = string(m.ID), &raft.TimeoutNowResponse{}
					}
					if id != "n1" {
						t.Errorf("%s: %T came from %q", name, rpc.Command, id)
					}
					rpc.Respond(answer, nil)
				}
			}
		}()
		header := raft.RPCHeader{ID: []byte("n1")}
		for kind, err := range map[string]error{
			"append":   sender.AppendEntries("n2", target, &raft.AppendEntriesRequest{RPCHeader: header}, &raft.AppendEntriesResponse{}),
			"vote":     sender.RequestVote("n2", target, &raft.RequestVoteRequest{RPCHeader: header}, &raft.RequestVoteResponse{}),
			"pre-vote": sender.RequestPreVote("n2", target, &raft.RequestPreVoteRequest{RPCHeader: header}, &raft.RequestPreVoteResponse{}),
			"timeout":  sender.TimeoutNow("n2", target, &raft.TimeoutNowRequest{RPCHeader: header}, &raft.TimeoutNowResponse{}),
		} {
			if (err != nil) != c.refused {
				t.Errorf("%s: %s gives %v", name, kind, err)
			}
		}
		cancel()
		<-done
	}
}

// TestARestoredSnapshotDoesNotMakeAnotherCluster: the state of elsewhere takes the
// identity of the cluster it comes to, on every peer and across a restart, and the
// peers compare their states as before.
func TestARestoredSnapshotDoesNotMakeAnotherCluster(t *testing.T) {
	t.Parallel()
	first := newLab(t)
	old := first.start("n1", expect(1))
	first.put("kept")
	theirs := old.known()
	data, _ := save(t, first.admin(old))

	l := newLab(t)
	leader := l.three(comparing)
	mine := leader.known()
	if mine == theirs {
		t.Fatal("two clusters have one identity")
	}
	if _, err := restore(t, l.admin(leader), data); err != nil {
		t.Fatal(err)
	}
	l.put("later")
	l.everywhere("kept")
	l.everywhere("later")
	for id, p := range l.peers {
		if got := p.state.View().ClusterID(); got != mine || p.incarnation.String() != mine {
			t.Errorf("%s is of %q and its state of %q, want %q", id, p.incarnation.String(), got, mine)
		}
	}
	follower := l.other(l.leader()).cfg.ID
	l.peers[follower].stop()
	l.put("meanwhile")
	l.start(follower, expect(3), comparing)
	l.everywhere("meanwhile")
	l.voters("n1", "n2", "n3")
	l.eventually("it compares with the others", func() bool {
		for _, q := range l.peers[follower].poll(t.Context()) {
			if hash, ok := q.majority(); ok && hash == q.mine && len(q.votes) == 1 && q.votes[hash] == 3 {
				return true
			}
		}
		return false
	})
}
