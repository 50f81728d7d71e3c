package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestStandaloneAgent runs an agent without any control plane, through the same
// API, and kills it: what it ran is there again from its journal.
func TestStandaloneAgent(t *testing.T) {
	binary, guests := harness.Binary(t)
	s := newStandalone(t, binary)
	s.start()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	digest := s.upload(ctx, filepath.Join(guests, "hello.wasm"))
	started, err := s.client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "hello", Module: digest,
		Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read", "kv:write"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	id := started.Instances[0].Id
	s.invoke(ctx, id, "hello, Ada: visit 1\n")
	if err := s.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = s.cmd.Wait()
	s.start()
	s.invoke(ctx, id, "hello, Ada: visit 2\n")
	if _, err := s.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "hello"}); err != nil {
		t.Fatal(err)
	}
	s.state(ctx, id, pb.InstanceState_INSTANCE_STATE_STOPPED)
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Fatalf("the agent's orderly end: %v\n%s", err, dev.Tail(s.log, 30))
	}
}

type standalone struct {
	t                   *testing.T
	binary, config, log string
	cmd                 *exec.Cmd
	client              pb.NodeAgentServiceClient
}

func newStandalone(t *testing.T, binary string) *standalone {
	t.Helper()
	dir := t.TempDir()
	ca, err := identity.NewCA("alone")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(s identity.Subject, dir string) {
		bundle, err := ca.Issue(s, time.Hour)
		if err == nil {
			err = bundle.Save(dir)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	issue(identity.Subject{Cluster: "alone", Kind: identity.Node, Name: "solo", Role: identity.RoleWorker}, filepath.Join(dir, "tls"))
	issue(identity.Subject{Cluster: "alone", Kind: identity.User, Name: "ada", Role: identity.RoleAdmin}, filepath.Join(dir, "user"))
	base := harness.FreePortBase(1)
	s := &standalone{t: t, binary: binary, config: filepath.Join(dir, "config.yaml"), log: filepath.Join(dir, "agent.log")}
	config := fmt.Sprintf("cluster: alone\nnode: {name: solo}\ndata_dir: %s\ntls: {dir: %s}\nbind: {port_base: %d}\nproviders: [{id: kv, type: kv, driver: bbolt}]\n",
		filepath.Join(dir, "data"), filepath.Join(dir, "tls"), base)
	if err := os.WriteFile(s.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := identity.Load(filepath.Join(dir, "user"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := node.Default()
	cfg.Bind.PortBase = base
	conn, err := grpc.NewClient(cfg.AgentAddress(), append(rpc.DialOptions(), id.DialOption(identity.Subject.IsWorker))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		if s.cmd != nil && s.cmd.ProcessState == nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("the end of the agent's log:\n%s", dev.Tail(s.log, 40))
		}
	})
	s.client = pb.NewNodeAgentServiceClient(conn)
	return s
}

func (s *standalone) start() {
	s.t.Helper()
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(s.binary, "agent", "--standalone", "--config", s.config)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *standalone) upload(ctx context.Context, path string) (digest string) {
	s.t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	stream, err := s.client.UploadModule(ctx, grpc.WaitForReady(true))
	if err != nil {
		s.t.Fatal(err)
	}
	header := &pb.UploadModuleHeader{Name: "hello.wasm", SizeBytes: uint64(len(raw))}
	err = stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Header{Header: header}})
	for len(raw) > 0 && err == nil {
		n := min(len(raw), 1<<20)
		err = stream.Send(&pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Chunk{Chunk: raw[:n]}})
		raw = raw[n:]
	}
	if err != nil {
		s.t.Fatal(err)
	}
	done, err := stream.CloseAndRecv()
	if err != nil {
		s.t.Fatal(err)
	}
	return done.Module.Digest
}

func (s *standalone) state(ctx context.Context, id string, want pb.InstanceState) {
	s.t.Helper()
	err := harness.Until(ctx, fmt.Sprintf("%s to be %s", id, want), func(ctx context.Context) error {
		got, err := s.client.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: id}, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		if got.Instance.Status.State != want {
			return fmt.Errorf("it is %s %s", got.Instance.Status.State, got.Instance.Status.Message)
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *standalone) invoke(ctx context.Context, id, want string) {
	s.t.Helper()
	s.state(ctx, id, pb.InstanceState_INSTANCE_STATE_RUNNING)
	got, err := s.client.InvokeInstance(ctx, &pb.InvokeInstanceRequest{InstanceId: id, Request: &pb.InvokeRequest{Target: "hello", Payload: []byte("Ada")}})
	if err != nil {
		s.t.Fatal(err)
	}
	if string(got.Response.Payload) != want {
		s.t.Fatalf("invoke: %q, want %q", got.Response.Payload, want)
	}
}
