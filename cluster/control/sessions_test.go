package control

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	codeConflict = pb.ErrorCode_ERROR_CODE_CONFLICT
	codeInvalid  = pb.ErrorCode_ERROR_CODE_INVALID_REQUEST
)

func openSession(t *testing.T, p *testPeer) string {
	t.Helper()
	resp, err := p.client.OpenSession(asAlice(t.Context()), &pb.OpenSessionRequest{})
	if err != nil || resp.GetSessionId() == "" || resp.GetIndex() == 0 || resp.GetIdleTimeout().AsDuration() != fsm.DefaultSessionIdle {
		t.Fatalf("open session: %v, %v", resp, err)
	}
	return resp.GetSessionId()
}

func TestASessionIsOpenedOncePerRequest(t *testing.T) {
	p := newPeer(t)
	req := &pb.OpenSessionRequest{RequestId: "r", IdleTimeout: durationpb.New(20 * time.Minute)}
	first, err := p.client.OpenSession(asAlice(t.Context()), req)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.client.OpenSession(asAlice(t.Context()), req)
	if err != nil || !proto.Equal(first, again) {
		t.Errorf("got %v, %v, first %v", again, err, first)
	}
	s, ok := p.state.View().Session(first.GetSessionId())
	if !ok || s.GetActor() != alice.String() || s.GetIdleTimeout().AsDuration() != 20*time.Minute {
		t.Errorf("the session is %v", s)
	}
}

func TestAWriteOfASessionIsDoneOnce(t *testing.T) {
	p := newPeer(t)
	digest := p.addModule(modulestest.Reactor())
	session := openSession(t, p)
	start := func(sequence, outstanding uint64, id string) (*pb.StartInstanceResponse, error) {
		return p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{
			Spec: &pb.WorkloadSpec{Name: "web", Module: digest}, RequestId: id,
			Write: &pb.WriteOptions{SessionId: session, Sequence: sequence, FirstOutstanding: outstanding},
		})
	}
	first, err := start(1, 1, "r1")
	if err != nil {
		t.Fatal(err)
	}
	// A repetition may say that more answers have come, and may come without the session.
	again, err := start(1, 0, "r1")
	if err != nil || again.GetIndex() != first.GetIndex() {
		t.Errorf("repeated: %v, %v", again, err)
	}
	alone, err := p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{
		Spec: &pb.WorkloadSpec{Name: "web", Module: digest}, RequestId: "r1",
	})
	if err != nil || alone.GetIndex() != first.GetIndex() {
		t.Errorf("repeated without its session: %v, %v", alone, err)
	}
	if n := len(p.state.View().Instances(nil)); n != 1 {
		t.Errorf("%d instances", n)
	}
	// Another content under the id is found out, a condition is content.
	_, err = p.client.StartInstance(asAlice(t.Context()), &pb.StartInstanceRequest{
		Spec: &pb.WorkloadSpec{Name: "web", Module: digest}, RequestId: "r1", Write: &pb.WriteOptions{IfAbsent: true},
	})
	wantCode(t, err, codeConflict)
	// Another caller cannot use the session, nor find out that it exists.
	bob := identity.Subject{Cluster: "test", Kind: identity.User, Name: "bob", Role: identity.RoleAdmin}
	_, err = p.client.StopInstance(as(t.Context(), bob), &pb.StopInstanceRequest{
		Target: "web", RequestId: "r2", Write: &pb.WriteOptions{SessionId: session, Sequence: 2},
	})
	wantCode(t, err, codeConflict)
	if e := apierror.From(err); e.Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown || e.Detail(apierror.DetailRequestID) != "r2" {
		t.Errorf("another caller: %v", e)
	}
	// Without a request id there is no session.
	_, err = p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{
		Target: "web", Write: &pb.WriteOptions{SessionId: session, Sequence: 2},
	})
	wantCode(t, err, codeInvalid)
}

// TestARepetitionIsNotJudgedByWhatCameAfter: a check that would refuse the request
// now does not keep the answer from the one who asks again.
func TestARepetitionIsNotJudgedByWhatCameAfter(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	first := p.start("web", 1)[0]
	p.run(first, "n1")
	req := &pb.StopInstanceRequest{Target: "we", RequestId: "r"} // an unambiguous prefix
	stopped, err := p.client.StopInstance(asAlice(t.Context()), req)
	if err != nil {
		t.Fatal(err)
	}
	p.start("weather", 1)
	again, err := p.client.StopInstance(asAlice(t.Context()), req)
	if err != nil || again.GetIndex() != stopped.GetIndex() || !slices.Equal(ids(again.GetInstances()), []string{first}) {
		t.Errorf("repeated: %v, %v", again, err)
	}
	req.RequestId = "another"
	_, err = p.client.StopInstance(asAlice(t.Context()), req)
	wantCode(t, err, codeInvalid)
	if e := apierror.From(err); e.Detail(apierror.DetailOutcome) != apierror.OutcomeFailed || e.Detail(apierror.DetailRequestID) != "another" {
		t.Errorf("a new request: %v", e)
	}
}

func TestConditionalWrites(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	p.addProvider("store", "kv")
	first := p.start("web", 2)[0]
	ctx := asAlice(t.Context())
	index := func() uint64 {
		in, _ := p.state.View().Instance(first)
		return in.GetModifiedIndex()
	}
	grant := &pb.CapabilityGrant{Provider: "store", Permissions: []string{"kv:read"}}
	digest := p.addModule(modulestest.Reactor())
	stale := &pb.WriteOptions{IfIndex: 1}
	for name, c := range map[string]struct {
		write func(*pb.WriteOptions) error
		good  func() *pb.WriteOptions
		code  pb.ErrorCode
		bad   *pb.WriteOptions
	}{
		"restart": {func(w *pb.WriteOptions) error {
			_, err := p.client.RestartInstance(ctx, &pb.RestartInstanceRequest{Target: first, Write: w})
			return err
		}, func() *pb.WriteOptions { return &pb.WriteOptions{IfIndex: index()} }, codeConflict, stale},
		"stop of several": {func(w *pb.WriteOptions) error {
			_, err := p.client.StopInstance(ctx, &pb.StopInstanceRequest{Target: "web", Write: w})
			return err
		}, func() *pb.WriteOptions { return nil }, codeInvalid, stale},
		"start": {func(w *pb.WriteOptions) error {
			name := "web"
			if w.GetSequence() == 1 { // the good case
				name = "fresh"
				w = &pb.WriteOptions{IfAbsent: true}
			}
			_, err := p.client.StartInstance(ctx, &pb.StartInstanceRequest{
				Spec: &pb.WorkloadSpec{Name: name, Module: digest}, Write: w,
			})
			return err
		}, func() *pb.WriteOptions { return &pb.WriteOptions{Sequence: 1} }, codeConflict, &pb.WriteOptions{IfAbsent: true}},
		"assign": {func(w *pb.WriteOptions) error {
			_, err := p.client.AssignCapability(ctx, &pb.AssignCapabilityRequest{Target: first, Grant: grant, Write: w})
			return err
		}, func() *pb.WriteOptions { return &pb.WriteOptions{IfAbsent: true} }, codeConflict, stale},
		"drain": {func(w *pb.WriteOptions) error {
			_, err := p.client.DrainNode(ctx, &pb.DrainNodeRequest{NodeId: "n1", Write: w})
			return err
		}, func() *pb.WriteOptions {
			n, _ := p.state.View().Node("n1")
			return &pb.WriteOptions{IfIndex: n.GetModifiedIndex()}
		}, codeConflict, &pb.WriteOptions{IfIndex: 1 << 40}},
		"stop provider": {func(w *pb.WriteOptions) error {
			_, err := p.client.StopProvider(ctx, &pb.StopProviderRequest{ProviderId: "store", Write: w})
			return err
		}, func() *pb.WriteOptions {
			r, _ := p.state.View().Provider("store")
			return &pb.WriteOptions{IfIndex: r.GetModifiedIndex()}
		}, codeConflict, &pb.WriteOptions{IfIndex: 1}},
		"both at once": {func(w *pb.WriteOptions) error {
			_, err := p.client.UndrainNode(ctx, &pb.UndrainNodeRequest{NodeId: "n1", Write: w})
			return err
		}, func() *pb.WriteOptions { return nil }, codeInvalid, &pb.WriteOptions{IfIndex: 1, IfAbsent: true}},
	} {
		before := len(p.proposed)
		err := c.write(c.bad)
		wantCode(t, err, c.code)
		if e := apierror.From(err); c.code == codeConflict && (e.Detail("precondition") != "failed" || e.Detail("found_index") == "") {
			t.Errorf("%s: the refusal does not say what was found: %v", name, e)
		}
		if c.code == codeInvalid && len(p.proposed) != before {
			t.Errorf("%s: it was proposed", name)
		}
		if err := c.write(c.good()); err != nil {
			t.Errorf("%s: with what is there: %v", name, err)
		}
	}
}

func TestAnUploadIsNotConditional(t *testing.T) {
	p := newPeer(t)
	wasm := modulestest.Reactor()
	header := &pb.UploadModuleHeader{Name: "a.wasm", SizeBytes: uint64(len(wasm)), RequestId: "r", Write: &pb.WriteOptions{IfIndex: 1}}
	_, err := send(asAlice(t.Context()), p, uploadHeader(header), uploadChunk(wasm))
	wantCode(t, err, codeInvalid)
	header.Write = nil
	header.SizeBytes++
	_, err = send(asAlice(t.Context()), p, uploadHeader(header), uploadChunk(wasm))
	wantCode(t, err, codeInvalid)
	if e := apierror.From(err); e.Detail(apierror.DetailOutcome) != apierror.OutcomeFailed || e.Detail(apierror.DetailRequestID) != "r" {
		t.Errorf("a cut upload: %v", e)
	}
}
