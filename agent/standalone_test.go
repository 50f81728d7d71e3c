package agent

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// alone runs a standalone agent with a kv provider.
func alone(t *testing.T, f func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		agent := start(t, testConfig(t, newNetwork(t), withKind(&memoKind{}), func(cfg *Config) {
			cfg.Standalone, cfg.Peers, cfg.Conn = true, nil, nil
			cfg.Providers = []*pb.ProviderSpec{{Id: "kv", Type: "kv", Driver: "memory"}}
		}))
		f(t, agent, agent.serve(t), as(t.Context(), asAdmin))
	})
}

// upload sends a module in chunks.
func upload(client pb.NodeAgentServiceClient, ctx context.Context, data []byte, change ...func(*pb.UploadModuleHeader)) (*pb.Module, error) {
	stream, err := client.UploadModule(ctx)
	if err != nil {
		return nil, err
	}
	header := &pb.UploadModuleHeader{Name: "m.wasm", SizeBytes: uint64(len(data))}
	for _, c := range change {
		c(header)
	}
	if err := stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Header{Header: header}}); err != nil {
		return nil, err
	}
	for part := range slices.Chunk(data, 50) {
		// A failed send says less than the answer does.
		_ = stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Chunk{Chunk: part}})
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetModule(), err
}

func workload(t *testing.T, client pb.NodeAgentServiceClient, ctx context.Context, change ...func(*pb.WorkloadSpec)) *pb.WorkloadSpec {
	t.Helper()
	m, err := upload(client, ctx, testModule)
	if err != nil {
		t.Fatal(err)
	}
	spec := &pb.WorkloadSpec{Name: "web", Module: m.GetDigest()}
	for _, c := range change {
		c(spec)
	}
	return spec
}

func TestAStandaloneAgentRunsWorkloadsByItself(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context) {
		spec := workload(t, client, ctx, func(s *pb.WorkloadSpec) {
			s.Replicas = 2
			s.Capabilities = []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read"}}}
		})
		resp, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, inst := range resp.GetInstances() {
			if !regexp.MustCompile(`^web-[a-z2-7]{5}$`).MatchString(inst.GetId()) || inst.GetSpec().GetReplicas() != 1 {
				t.Errorf("started %v", inst)
			}
			ids = append(ids, inst.GetId())
		}
		within(t, time.Second, "both replicas run", agent.running(ids...))

		agent.fake.OnInvoke(echoKV)
		answer, err := client.InvokeInstance(ctx, invoke(ids[0], "x"))
		if err != nil || string(answer.GetResponse().GetPayload()) != "memory web" {
			t.Fatalf("the guest got %v, %v from its provider", answer, err)
		}
		if c := agent.component("providers"); !c.Ready || len(agent.Ready()) != 1 {
			t.Fatalf("health %+v", agent.Ready())
		}

		agent.fake.CrashName("web", trap)
		within(t, 5*time.Second, "they run again", agent.running(ids...))
		stop, err := client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "web"})
		if err != nil || len(stop.GetInstances()) != 2 {
			t.Fatalf("stop: %v, %v", stop, err)
		}
		within(t, time.Second, "both have stopped", func() bool {
			return agent.running()() && agent.state(ids[0]) == stateStopped && agent.state(ids[1]) == stateStopped
		})
	})
}

func TestAStandaloneAgentSurvivesARestart(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context) {
		ids := map[string]string{}
		for _, name := range []string{"web", "job", "off"} {
			spec := workload(t, client, ctx, func(s *pb.WorkloadSpec) {
				s.Name = name
				s.Capabilities = []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read"}, Bucket: "shared"}}
			})
			resp, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
			if err != nil {
				t.Fatal(err)
			}
			ids[name] = resp.GetInstances()[0].GetId()
		}
		within(t, time.Second, "all run", func() bool { return len(agent.fake.Running()) == 3 })
		agent.fake.CrashName("job", completed)
		if _, err := client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "off"}); err != nil {
			t.Fatal(err)
		}
		within(t, time.Second, "one is left", agent.running(ids["web"]))

		agent = agent.again()
		within(t, time.Second, "it runs again", agent.running(ids["web"]))
		still(t, time.Minute, "what had ended does not", agent.running(ids["web"]))
		if agent.state(ids["job"]) != pb.InstanceState_INSTANCE_STATE_COMPLETED || agent.state(ids["off"]) != stateStopped {
			t.Fatalf("ended as %v and %v", agent.state(ids["job"]), agent.state(ids["off"]))
		}
		if got := agent.fake.Specs()[0].Generation; got != 2 {
			t.Fatalf("the new process runs generation %d", got)
		}
		agent.fake.OnInvoke(echoKV)
		answer, err := agent.serve(t).InvokeInstance(ctx, invoke(ids["web"], "x"))
		if err != nil || string(answer.GetResponse().GetPayload()) != "memory shared" {
			t.Fatalf("the guest got %v, %v from its provider", answer, err)
		}
	})
}

func TestStandaloneRequestsAreChecked(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context) {
		spec := workload(t, client, ctx)
		first, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec, RequestId: "r1"})
		if err != nil {
			t.Fatal(err)
		}
		again, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec, RequestId: "r1"})
		if err != nil || again.GetInstances()[0].GetId() != first.GetInstances()[0].GetId() || len(agent.Instances()) != 1 {
			t.Fatalf("a repeated request gave %v, %v", again, err)
		}
		unknown := "sha256:" + strings.Repeat("0", 64)
		for _, c := range []struct {
			name   string
			change func(*pb.StartInstanceRequest)
			code   pb.ErrorCode
		}{
			{"another request of the same id", func(r *pb.StartInstanceRequest) { r.RequestId, r.Spec.Name = "r1", "x" }, pb.ErrorCode_ERROR_CODE_CONFLICT},
			{"a name in use", func(r *pb.StartInstanceRequest) {}, pb.ErrorCode_ERROR_CODE_CONFLICT},
			{"an unknown module", func(r *pb.StartInstanceRequest) { r.Spec.Module = unknown }, pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND},
			{"a file", func(r *pb.StartInstanceRequest) { r.Spec.Module = "./m.wasm" }, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
			{"an unknown runtime", func(r *pb.StartInstanceRequest) { r.Spec.Runtime = "microvm" }, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
			{"too much memory", func(r *pb.StartInstanceRequest) { r.Spec.Limits = &pb.InstanceLimits{Memory: "5GiB"} }, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
			{"another node", func(r *pb.StartInstanceRequest) { r.Spec.Placement = &pb.PlacementRules{Node: "n7"} }, pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND},
			{"too many", func(r *pb.StartInstanceRequest) { r.Spec.Name, r.Spec.Replicas = "many", 100 }, pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED},
			{"an unknown provider", func(r *pb.StartInstanceRequest) {
				r.Spec.Name, r.Spec.Capabilities = "x", []*pb.CapabilityGrant{{Provider: "bus"}}
			}, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND},
			{"no permission", func(r *pb.StartInstanceRequest) {
				r.Spec.Name, r.Spec.Capabilities = "x", []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:fly"}}}
			}, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
			{"two buckets", func(r *pb.StartInstanceRequest) {
				r.Spec.Name, r.Spec.Capabilities = "x", []*pb.CapabilityGrant{{Provider: "kv", Bucket: "a"}, {Provider: "kv", Bucket: "b"}}
			}, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		} {
			req := &pb.StartInstanceRequest{Spec: workload(t, client, ctx)}
			c.change(req)
			if _, err := client.StartInstance(ctx, req); apierror.CodeOf(err) != c.code {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		if _, err := client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "nix"}); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND {
			t.Errorf("a stop of nothing: %v", err)
		}
		if len(agent.Instances()) != 1 {
			t.Fatalf("%d instances exist", len(agent.Instances()))
		}
	})
}

func TestStandaloneUploads(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context) {
		data := modulestest.Command("wasi_snapshot_preview1 proc_exit")
		m, err := upload(client, ctx, data)
		if err != nil {
			t.Fatal(err)
		}
		if m.GetKind() != pb.ModuleKind_MODULE_KIND_COMMAND || m.GetName() != "m.wasm" || m.GetSizeBytes() != uint64(len(data)) ||
			!slices.Equal(m.GetImports(), []string{"wasi_snapshot_preview1 proc_exit"}) || !slices.Equal(m.GetExports(), []string{"_start"}) {
			t.Fatalf("stored %v", m)
		}
		for name, upload := range map[string]func() (*pb.Module, error){
			"no module": func() (*pb.Module, error) { return upload(client, ctx, []byte("hello")) },
			"too short": func() (*pb.Module, error) {
				return upload(client, ctx, data, func(h *pb.UploadModuleHeader) { h.SizeBytes++ })
			},
			"too long": func() (*pb.Module, error) {
				return upload(client, ctx, data, func(h *pb.UploadModuleHeader) { h.SizeBytes-- })
			},
			"another digest": func() (*pb.Module, error) {
				return upload(client, ctx, testModule, func(h *pb.UploadModuleHeader) { h.Digest = m.GetDigest() })
			},
		} {
			if m, err := upload(); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
				t.Errorf("%s: %v, %v", name, m, err)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(agent.modules.dir, "*")); len(left) != 1 {
			t.Fatalf("the directory holds %v", left)
		}
	})
}

func TestEndedInstancesAreForgottenInTheEnd(t *testing.T) {
	s := &standalone{}
	var known []*pb.Instance
	for i := range maxEndedInstances + 2 {
		inst := &pb.Instance{Id: string(rune('a'+i%26)) + strings.Repeat("x", i/26), Status: &pb.InstanceStatus{State: pb.InstanceState_INSTANCE_STATE_FAILED}}
		inst.Spec = &pb.WorkloadSpec{Capabilities: []*pb.CapabilityGrant{{Provider: "kv"}}}
		known = append(known, inst)
	}
	known = append(known, &pb.Instance{Id: "live", DesiredRunning: true, Status: &pb.InstanceStatus{State: stateRunning}})
	changes := s.pruned(known)
	if len(changes) != 4 || changes[0].GetRemoveInstance() != known[0].GetId() || changes[3].GetRemoveAssignment().GetInstanceId() != known[1].GetId() {
		t.Fatalf("pruned %v", changes)
	}
}

func TestADamagedJournalIsReportedAndIgnored(t *testing.T) {
	alone(t, func(t *testing.T, agent *node, client pb.NodeAgentServiceClient, ctx context.Context) {
		if _, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: workload(t, client, ctx)}); err != nil {
			t.Fatal(err)
		}
		agent.end()
		path := agent.journal.path
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)-1] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		logged := &sharedText{}
		agent = agent.again(logTo(logged))
		if len(agent.Instances()) != 0 || !strings.Contains(logged.String(), "damaged journal") {
			t.Fatalf("instances %v, log %s", agent.Instances(), logged.String())
		}
		if kept, err := os.ReadFile(path + ".damaged"); err != nil || len(kept) != len(data) {
			t.Fatalf("the damaged journal was not kept: %v", err)
		}
		client = agent.serve(t)
		if _, err := client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: workload(t, client, ctx)}); err != nil {
			t.Fatal(err)
		}
	})
}

func TestConfigurationIsChecked(t *testing.T) {
	n := newNetwork(t)
	n.peer("p1")
	for name, change := range map[string]func(*Config){
		"no node":            func(c *Config) { c.Node = nil },
		"no directory":       func(c *Config) { c.DataDir = "" },
		"no logger":          func(c *Config) { c.Logger = nil },
		"no peers":           func(c *Config) { c.Peers = nil },
		"no connections":     func(c *Config) { c.Conn = nil },
		"no default runtime": func(c *Config) { c.DefaultRuntime = "vm"; c.Runtimes = map[string]runtime.Runtime{"wasm": nil} },
		"a taken registry":   func(c *Config) { c.Registerer.MustRegister(newMetrics().crashes) },
		"a file as directory": func(c *Config) {
			c.DataDir = filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(c.DataDir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		cfg := testConfig(t, n)
		cfg.Registerer = prometheus.NewRegistry()
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New succeeded", name)
		}
	}
}
