package agent

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMetrics(t *testing.T) {
	served(t, func(t *testing.T, agent *node, leader *fakePeer, client pb.NodeAgentServiceClient, ctx context.Context) {
		registry, ok := agent.cfg.Registerer.(*prometheus.Registry)
		if !ok {
			t.Fatal("no registry")
		}
		if _, err := client.InvokeInstance(ctx, invoke("web-1", "")); err != nil {
			t.Fatal(err)
		}
		if _, err := client.InvokeInstance(ctx, invoke("web-9", "")); err == nil {
			t.Fatal("a call of nothing succeeded")
		}
		agent.fake.Crash("web-1", trap)
		within(t, 5*time.Second, "it runs again", agent.running("web-1"))
		leader.put(putInstance(instance(leader, "web-2", stopped)))
		within(t, time.Second, "another is stopped", leader.reports("web-2", stateStopped, 1))
		leader.isolate(false)
		within(t, time.Second, "the session is lost", func() bool { return !agent.component("session").Ready })

		problems, err := testutil.GatherAndLint(registry)
		if err != nil || len(problems) > 0 {
			t.Errorf("lint: %v, %v", problems, err)
		}
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				name := f.GetName()
				for _, l := range m.GetLabel() {
					name += " " + l.GetValue()
				}
				got[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
		for name, want := range map[string]float64{
			"wasmatrix_instances running": 1, "wasmatrix_instances stopped": 1, "wasmatrix_instances failed": 0,
			"wasmatrix_instance_crashes_total trap": 1, "wasmatrix_instance_restarts_total": 1,
			"wasmatrix_invocations_total OK invoke": 1, "wasmatrix_invocation_duration_seconds invoke": 1,
			"wasmatrix_agent_session_up": 0, "wasmatrix_agent_sessions_lost_total": 1,
			"wasmatrix_agent_module_fetches_total ok": 1, "wasmatrix_hosted_providers running": 0,
		} {
			if value, ok := got[name]; !ok || value != want {
				t.Errorf("%s is %v (present: %t), want %v", name, value, ok, want)
			}
		}
		if got["wasmatrix_agent_reports_total ok"] == 0 || got["wasmatrix_agent_journal_writes_total ok"] == 0 {
			t.Errorf("reports or journal writes are not counted: %v", got)
		}
		for name := range got {
			if strings.HasPrefix(name, "wasmatrix_invocations_total") && strings.Contains(name, "web") {
				t.Errorf("an instance id became a label: %s", name)
			}
		}
	})
}
