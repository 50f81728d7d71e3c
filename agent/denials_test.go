package agent

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func denial(instance, key string) provider.Denial {
	return provider.Denial{
		Instance: instance, Name: "web", Provider: "kv",
		Need: permission.Need{Capability: "kv", Action: "read", Resource: key},
	}
}

// The first refusal is reported at once, later ones are summed up.
func TestRefusedCallsAreReported(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		var log sharedText
		agent := start(t, testConfig(t, n, logTo(&log)))
		inst := instance(leader, "web-1")
		leader.put(putProvider(func(p *pb.Provider) { p.Placement.NodeId = "n2" }), putInstance(inst))
		within(t, time.Second, "it runs", agent.running("web-1"))
		add := func(key string) {
			agent.reports.denials.add(correlation.With(t.Context(), "c-"+key), denial("web-1", key))
		}
		add("a")
		within(t, 200*time.Millisecond, "the first is reported", func() bool {
			counts, _ := leader.reportedDenials()
			return counts["kv:read:a"] == 1
		})
		for i := range 5000 {
			add(fmt.Sprintf("k%d", i%2))
		}
		still(t, 8*time.Second, "the others wait", func() bool {
			counts, reports := leader.reportedDenials()
			return reports == 1 && len(counts) == 1
		})
		within(t, 5*time.Second, "they are reported together", func() bool {
			counts, reports := leader.reportedDenials()
			return reports == 2 && counts["kv:read:k0"] == 2500 && counts["kv:read:k1"] == 2500
		})
		if lines := strings.Count(log.String(), "a capability call was refused"); lines < 1 || lines > 10 {
			t.Errorf("%d log lines for 5001 refusals", lines)
		}
		// What a broken session loses is reported by the next one; at the end nothing is kept back.
		leader.isolate(true)
		add("z")
		<-time.After(30 * time.Second)
		leader.heal()
		within(t, 10*time.Second, "the next session reports it", func() bool {
			counts, _ := leader.reportedDenials()
			return counts["kv:read:z"] == 1
		})
		add("last")
		agent.end()
		if counts, _ := leader.reportedDenials(); counts["kv:read:last"] != 1 {
			t.Errorf("at the end: %v", counts)
		}
	})
}

// A guest cannot make reports grow, nor break them.
func TestReportsOfRefusedCallsAreBounded(t *testing.T) {
	d := newDenials(slog.New(slog.DiscardHandler), func() {})
	for i := range 3 * maxDenials {
		d.add(t.Context(), denial("web-1", fmt.Sprintf("k%04d", i)))
	}
	d.add(t.Context(), denial("web-2", "\xff\xfe"+strings.Repeat("é", 2000)))
	reports := d.take()
	sum := uint64(0)
	needs := map[string]uint64{}
	for _, r := range reports {
		sum += r.GetCount()
		needs[r.GetNeed()] += r.GetCount()
		if !utf8.ValidString(r.GetNeed()) || len(r.GetNeed()) > maxNeed || r.GetInstanceId() == "" {
			t.Errorf("cannot be sent: %v", r)
		}
	}
	if len(reports) > maxDenials || sum != 3*maxDenials+1 || needs[""] != 2*maxDenials+2 {
		t.Errorf("%d reports of %d refusals, %d of them without a need: %v", len(reports), sum, needs[""], slices.Sorted(maps.Keys(needs)))
	}
	if d.take() != nil {
		t.Error("they are reported twice")
	}
	d = newDenials(slog.New(slog.DiscardHandler), func() {})
	d.add(t.Context(), denial("web-2", "\xff\xfe"+strings.Repeat("é", 2000)))
	if need := d.take()[0].GetNeed(); !utf8.ValidString(need) || len(need) > maxNeed || len(need) < maxNeed-4 {
		t.Errorf("need of %d bytes", len(need))
	}
	d.giveBack([]*pb.DenialReport{{InstanceId: "web-1", ProviderId: "kv", Need: "kv:read:a", Count: 3}})
	if d.hurry(); d.take()[0].GetCount() != 3 {
		t.Error("what was given back is lost")
	}
}
