package cluster

import (
	"fmt"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestPlanStart(t *testing.T) {
	member := func(id string, expect uint32, history, alive bool) gossip.Member {
		return gossip.Member{Alive: alive, Metadata: &pb.PeerMetadata{
			PeerId: id, Cluster: "test", RaftAddress: id + ":7402", ApiAddress: id + ":7400", BootstrapExpect: expect, Bootstrapped: history,
		}}
	}
	three := []gossip.Member{member("n1", 3, false, true), member("n2", 3, false, true), member("n3", 3, false, true)}
	tests := map[string]struct {
		expect  int
		join    []string
		members []gossip.Member
		want    step
		says    string
	}{
		"all here":                         {3, nil, three, stepBootstrap, "n1, n2, n3"},
		"one missing":                      {3, nil, three[:2], stepWait, "have 2: n1, n2"},
		"one dead":                         {3, nil, append(three[:2:2], member("n3", 3, false, false)), stepWait, "have 2"},
		"one too many":                     {3, nil, append(three[:3:3], member("n4", 3, false, true)), stepWait, "4 peers have it"},
		"somebody expects something else":  {3, nil, append(three[:2:2], member("n3", 5, false, true)), stepWait, "n3 expects 5"},
		"one has a history":                {3, nil, append(three[:2:2], member("n3", 3, true, true)), stepJoin, "n3 belongs"},
		"a dead one had a history":         {3, nil, append(three[:3:3], member("n4", 3, true, false)), stepBootstrap, "all 3"},
		"own history is not another's":     {3, nil, append(three[1:3:3], member("n1", 3, true, true)), stepBootstrap, "all 3"},
		"joiners do not count":             {3, nil, append(three[:2:2], member("n9", 0, false, true)), stepWait, "have 2"},
		"alone":                            {1, nil, []gossip.Member{member("n1", 1, false, true)}, stepBootstrap, "n1"},
		"alone but others were named":      {1, []string{"n2:7403"}, []gossip.Member{member("n1", 1, false, true)}, stepWait, "join addresses"},
		"alone and named itself":           {1, []string{"n1:7403"}, []gossip.Member{member("n1", 1, false, true)}, stepBootstrap, "n1"},
		"first of a cluster others join":   {1, []string{"n2:7403"}, []gossip.Member{member("n1", 1, false, true), member("n2", 0, false, true)}, stepBootstrap, "n1"},
		"joins only, nobody there":         {0, nil, []gossip.Member{member("n1", 0, false, true)}, stepWait, "no live member"},
		"joins only, others still form":    {0, nil, append(three[1:3:3], member("n1", 0, false, true)), stepWait, "no live member"},
		"joins only, cluster there":        {0, nil, []gossip.Member{member("n1", 0, false, true), member("n2", 3, true, true)}, stepJoin, "n2"},
		"expects one, cluster there":       {1, nil, []gossip.Member{member("n1", 1, false, true), member("n2", 1, true, true)}, stepJoin, "n2"},
		"two that each want to be the one": {1, nil, []gossip.Member{member("n1", 1, false, true), member("n2", 1, false, true)}, stepWait, "2 peers have it"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := Config{ID: "n1", BootstrapExpect: tt.expect, Gossip: gossip.Config{Bind: "n1:7403", Join: tt.join}}
			next, servers, reason := planStart(cfg, tt.members)
			if next != tt.want || !strings.Contains(reason, tt.says) {
				t.Errorf("step %d, %q; want step %d, %q", next, reason, tt.want, tt.says)
			}
			if (next == stepBootstrap) != (len(servers) == tt.expect && tt.expect > 0) {
				t.Errorf("servers %v", servers)
			}
		})
	}
}

func TestPeersStartedInAnyOrderFormOneCluster(t *testing.T) {
	for _, order := range [][]string{{"n3", "n1", "n2"}, {"n5", "n2", "n4", "n1", "n3"}} {
		t.Run(fmt.Sprintf("%d peers", len(order)), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			late := order[len(order)-1]
			for _, id := range order[:len(order)-1] {
				l.start(id, expect(len(order)))
			}
			for id, p := range l.peers {
				l.eventually(id+" runs", func() bool { return p.raft.Load() != nil })
				if len(p.servers()) != 0 {
					t.Errorf("%s did not wait for %s", id, late)
				}
			}
			l.start(late, expect(len(order)))
			leader := l.leader()
			var all []string
			for i := range order {
				all = append(all, fmt.Sprintf("n%d", i+1))
			}
			l.voters(all...)
			l.put("first")
			l.everywhere("first")
			l.eventually("the registry knows all peers", func() bool { return len(leader.state.View().Peers(nil)) == len(order) })
		})
	}
}

func TestFourthPeerJoinsAndBecomesAVoter(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	leader := l.three()
	l.put("before")
	p := l.start("n4")
	l.voters("n1", "n2", "n3", "n4")
	l.everywhere("before")
	l.eventually("the registry knows the API of n4", func() bool {
		record, ok := leader.state.View().Peer("n4")
		return ok && record.GetApiAddress() == p.cfg.APIAdvertise
	})
}

func TestNonVoterReplicatesAndNeverVotes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start("n1", expect(1))
	l.leader()
	p := l.start("n2", func(c *Config) { c.NonVoter = true })
	l.put("w")
	l.everywhere("w")
	l.eventually("n2 is in the configuration", func() bool { _, ok := p.suffrage("n2"); return ok })
	l.voters("n1")
}

func TestSinglePeerNeedsNobody(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start("n1", expect(1))
	l.put("w")
	l.peers["n1"].stop()
	p := l.start("n1", expect(1))
	l.leader()
	l.eventually("what was written is there again", func() bool { return has(p.state.View(), "w") })
}
