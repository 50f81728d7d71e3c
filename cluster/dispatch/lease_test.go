package dispatch

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestLeaseRules(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	l := newLeases()
	n1 := holder{"n1", 2}
	steps := []struct {
		name string
		do   func() error
		want error
	}{
		{"a node without a lease", func() error { return l.renew(n1, at(3)) }, errNoLease},
		{"a grant", func() error { return l.grant(n1, 10, at(3)) }, nil},
		{"an older epoch", func() error { return l.renew(holder{"n1", 1}, at(9)) }, errOtherEpoch},
		{"a grant that comes late", func() error { return l.grant(holder{"n1", 1}, 9, at(9)) }, errOtherEpoch},
		{"a renewal", func() error { return l.renew(n1, at(5)) }, nil},
		{"a shorter renewal changes nothing", func() error { return l.renew(n1, at(4)) }, nil},
		{"not over at its deadline's eve", func() error { return expect(l, at(4)) }, nil},
		{"over at its deadline", func() error { return expect(l, at(5), n1) }, nil},
		{"told only once", func() error { return expect(l, at(6)) }, nil},
		{"no renewal after the end", func() error { return l.renew(n1, at(9)) }, errExpired},
		{"no grant of the ended epoch", func() error { return l.grant(n1, 11, at(9)) }, errExpired},
		{"adoption does not revive it", func() error { l.adopt(n1, 11, at(9)); return l.renew(n1, at(9)) }, errExpired},
		{"a failed end is told again", func() error { l.retry(n1, at(7)); return expect(l, at(7), n1) }, nil},
		{"a new epoch", func() error { return l.grant(holder{"n1", 3}, 12, at(9)) }, nil},
		{"an older view does not drop it", func() error { l.drop("n1", 11); return l.renew(holder{"n1", 3}, at(9)) }, nil},
		{"an older view does not replace it", func() error { l.adopt(n1, 11, at(9)); return l.renew(holder{"n1", 3}, at(9)) }, nil},
		{"a restored registry does, with a lower epoch", func() error { return l.grant(holder{"n1", 1}, 20, at(9)) }, nil},
		{"dropped", func() error { l.drop("n1", 20); return l.renew(holder{"n1", 1}, at(9)) }, errNoLease},
	}
	for _, s := range steps {
		if err := s.do(); !errors.Is(err, s.want) {
			t.Errorf("%s: %v, want %v", s.name, err, s.want)
		}
	}
}

func expect(l *leases, now time.Time, want ...holder) error {
	due, _ := l.expire(now)
	if fmt.Sprint(due) != fmt.Sprint(want) {
		return fmt.Errorf("expired %v, want %v", due, want)
	}
	return nil
}

// Against a model that knows only the latest deadline of each node: a lease ends
// at the first look after its deadline, never before, and never twice.
func TestLeasesEndExactlyWhenDue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l, now := newLeases(), time.Unix(0, 0)
		deadlines := map[string]time.Time{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			h := holder{rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "node"), 1}
			deadline := now.Add(time.Duration(rapid.IntRange(1, 20).Draw(t, "lease")) * time.Second)
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0:
				if _, held := deadlines[h.node]; !held {
					l.drop(h.node, 1)
					if err := l.grant(h, 1, deadline); err != nil {
						t.Fatal(err)
					}
					deadlines[h.node] = deadline
				}
			case 1:
				err := l.renew(h, deadline)
				had, held := deadlines[h.node]
				if (err == nil) != held {
					t.Fatalf("renewal of %s: %v, held %t", h.node, err, held)
				}
				if held && deadline.After(had) {
					deadlines[h.node] = deadline
				}
			default:
				now = now.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "pass")) * time.Second)
				due, next := l.expire(now)
				for _, h := range due {
					if d, held := deadlines[h.node]; !held || d.After(now) {
						t.Fatalf("%s ended at %v, its deadline is %v", h.node, now, d)
					}
					delete(deadlines, h.node)
				}
				for node, d := range deadlines {
					if !d.After(now) {
						t.Fatalf("%s is overdue since %v", node, d)
					}
					if next.IsZero() || next.After(d) {
						t.Fatalf("the next look is at %v, after the deadline %v of %s", next, d, node)
					}
				}
			}
		}
	})
}

func TestTTLGrowsWithTheNodes(t *testing.T) {
	s := leaseSettings{ttl: 3 * time.Second, perSecond: 1000}
	for nodes, want := range map[int]time.Duration{
		0: 3 * time.Second, 750: 3 * time.Second, 751: 4 * time.Second, 10000: 40 * time.Second,
	} {
		got := s.ttlFor(nodes)
		if got != want {
			t.Errorf("TTL for %d nodes is %s, want %s", nodes, got, want)
		}
		if rate := float64(renewalsPerTTL*nodes) / got.Seconds(); rate > 1000 {
			t.Errorf("%d nodes renew %.0f times a second", nodes, rate)
		}
	}
}
