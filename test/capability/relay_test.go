package capability

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// settleTime is far above what anything here takes, on a loaded machine and
// in emulated virtual machines too.
const settleTime = 3 * time.Minute

// rounds is how often a test repeats what it does: the number in the environment
// variable, or usual.
func rounds(t *testing.T, variable string, usual int) int {
	t.Helper()
	given := os.Getenv(variable)
	if given == "" {
		return usual
	}
	n, err := strconv.Atoi(given)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number of rounds", variable, given)
	}
	return n
}

var built sync.Map // by tags: the guest's path

// relayModule builds the relay guest that imports the capabilities named by tags.
func relayModule(t *testing.T, tags string) string {
	t.Helper()
	if path, ok := built.Load(tags); ok {
		return fmt.Sprint(path)
	}
	dir, err := os.MkdirTemp("", "relay") //nolint:usetesting // other tests use it too; TestMain removes it
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "relay.wasm")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", tags, "-buildmode=c-shared", "-trimpath", "-ldflags", "-s -w", "-o", path, "./internal/relay")
	cmd.Dir = "../../guest/go"
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the relay guest: %v\n%s", err, out)
	}
	built.Store(tags, path)
	return path
}

// TestMain removes the guests that were built.
func TestMain(m *testing.M) {
	code := m.Run()
	built.Range(func(_, path any) bool { _ = os.RemoveAll(filepath.Dir(fmt.Sprint(path))); return true })
	os.Exit(code)
}

// The relay imports all functions of a capability, and a guest starts only with
// permissions that may allow each of them. These do, and allow nothing that a test uses.
var (
	baseKV        = []string{"kv:read:base/", "kv:write:base/", "kv:delete:base/"}
	baseMessaging = []string{"msg:publish:base", "msg:subscribe:base"}
)

// relay is a workload of the relay guest.
type relay struct {
	*harness.Cluster
	t         *testing.T
	name      string
	instances []*pb.Instance
	// evenly has the calls go to the instances in turn, not to any of them.
	evenly bool
	turn   atomic.Uint64
}

// target returns what is to be invoked next.
func (r *relay) target() string {
	if !r.evenly {
		return r.name
	}
	return r.instances[r.turn.Add(1)%uint64(len(r.instances))].Id
}

// startRelay starts a relay that imports the capabilities of tags, and waits until
// all its instances run.
func startRelay(t *testing.T, c *harness.Cluster, tags string, spec *pb.WorkloadSpec) *relay {
	t.Helper()
	ctx := c.Context(settleTime)
	module, err := c.Client.UploadModuleFile(ctx, relayModule(t, tags))
	if err != nil {
		t.Fatal(err)
	}
	spec.Module = module.Digest
	started, err := c.Client.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec})
	if err != nil {
		t.Fatalf("start %s: %v", spec.Name, err)
	}
	for _, in := range started.Instances {
		if err := harness.WaitState(ctx, c.Client, in.Id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
			t.Fatal(err)
		}
	}
	return &relay{Cluster: c, t: t, name: spec.Name, instances: started.Instances}
}

// refusal is what the host answered to the guest instead of success.
type refusal struct{ said *pb.Error }

func (r *refusal) Error() string { return fmt.Sprintf("%s: %s", r.said.Code, r.said.Message) }

// code returns the code of a refusal, 0 for success. Any other error is none of
// the host's: the guest did not answer.
func code(err error) pb.ErrorCode {
	if r, ok := err.(*refusal); ok { //nolint:errorlint // it is never wrapped
		return r.said.Code
	}
	return pb.ErrorCode_ERROR_CODE_UNSPECIFIED
}

// errNoAnswer wraps the failure of an invocation: the guest itself did not answer.
type errNoAnswer struct{ error }

// call makes one capability call through the guest. Its error is a *refusal or an
// errNoAnswer.
func (r *relay) call(ctx context.Context, function string, req, resp proto.Message) error {
	_, err := r.repeat(ctx, function, 1, req, resp)
	return err
}

// repeat makes the same call up to times times, until one fails, and returns how
// many succeeded and the error of the one that did not.
func (r *relay) repeat(ctx context.Context, function string, times int, req, resp proto.Message) (done int, err error) {
	message, err := proto.Marshal(req)
	if err != nil {
		return 0, err
	}
	answer, err := r.Client.Invoke(ctx, &pb.InvokeRequest{
		Target: r.target(), Payload: append([]byte(function+" "+strconv.Itoa(times)+"\n"), message...),
	})
	if err != nil {
		return 0, errNoAnswer{err}
	}
	said := answer.GetPayload()
	if len(said) < 8 {
		return 0, errNoAnswer{fmt.Errorf("the guest answered with %d bytes", len(said))}
	}
	status, done := binary.LittleEndian.Uint32(said), int(binary.LittleEndian.Uint32(said[4:]))
	if status != 0 {
		failure := &pb.Error{}
		if err := proto.Unmarshal(said[8:], failure); err != nil || uint32(failure.Code) != status {
			return done, errNoAnswer{fmt.Errorf("status %d comes with %v: %w", status, failure, err)}
		}
		return done, &refusal{failure}
	}
	return done, proto.Unmarshal(said[8:], resp)
}

// unharmed fails the test unless all instances still run as they were started.
func (r *relay) unharmed() {
	r.t.Helper()
	for _, in := range r.instances {
		got, err := r.Client.QueryInstance(r.Context(20*time.Second), &pb.QueryInstanceRequest{Target: in.Id})
		if err != nil {
			r.t.Fatal(err)
		}
		now := got.Instance
		if now.Status.State != pb.InstanceState_INSTANCE_STATE_RUNNING || now.Status.Attempt != 1 || now.Placement.Generation != 1 {
			r.t.Errorf("%s is %s in generation %d, attempt %d: %s", in.Id, now.Status.State, now.Placement.Generation, now.Status.Attempt, now.Status.Message)
		}
	}
}

// eventually waits until f returns nil.
func eventually(t *testing.T, c *harness.Cluster, what string, f func(ctx context.Context) error) {
	t.Helper()
	if err := harness.Until(c.Context(settleTime), what, f); err != nil {
		t.Fatal(err)
	}
}

// providerRuns waits until all replicas of a provider serve, with the spec version
// given, or any when that is 0.
func providerRuns(t *testing.T, c *harness.Cluster, id string, version uint64) {
	t.Helper()
	eventually(t, c, "provider "+id+" to serve", func(ctx context.Context) error {
		got, err := c.Client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: id})
		if err != nil {
			return err
		}
		for _, p := range append(got.Replicas, got.Provider) {
			if p.Status.State != pb.ProviderState_PROVIDER_STATE_RUNNING {
				return fmt.Errorf("replica %d is %s: %s", p.Replica, p.Status.State, p.Status.Message)
			}
			if version != 0 && p.Status.SpecVersion != version {
				return fmt.Errorf("replica %d serves version %d: %s", p.Replica, p.Status.SpecVersion, p.Status.Message)
			}
		}
		return nil
	})
}
