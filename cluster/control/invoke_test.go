package control

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

var noCredentials = insecure.NewCredentials()

func refuseToDial(context.Context, string) (net.Conn, error) {
	return nil, errors.New("connection refused")
}

func invoke(t *testing.T, p *testPeer, target string) (*pb.InvokeResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(asAlice(t.Context()), 20*time.Second)
	defer cancel()
	return p.client.Invoke(ctx, &pb.InvokeRequest{Target: target, Payload: []byte("ping")})
}

func TestInvokeReachesAnyReplicaWithoutALeader(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	p.addNode("n2", &fakeAgent{})
	web := p.start("web", 3)
	p.run(web[0], "n1")
	p.run(web[1], "n2")
	p.loseLeader()
	answered := map[string]string{}
	for range 100 {
		resp, err := invoke(t, p, "web")
		if err != nil {
			t.Fatal(err)
		}
		if want := resp.GetInstanceId() + " got ping"; string(resp.GetPayload()) != want {
			t.Fatalf("answer is %q, want %q", resp.GetPayload(), want)
		}
		answered[resp.GetInstanceId()] = resp.GetNodeId()
	}
	if len(answered) != 2 || answered[web[0]] != "n1" || answered[web[1]] != "n2" {
		t.Errorf("answers came from %v", answered)
	}
	if resp, err := invoke(t, p, web[1]); err != nil || resp.GetInstanceId() != web[1] {
		t.Errorf("by id: %v, %v", resp, err)
	}
}

func TestInvokeTriesAnotherReplicaOnlyWhenTheGuestDidNotRun(t *testing.T) {
	unreachable, err := grpc.NewClient("passthrough:gone", grpc.WithTransportCredentials(noCredentials), grpc.WithContextDialer(refuseToDial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unreachable.Close() })
	tests := []struct {
		name  string
		spoil func(p *testPeer, bad *fakeAgent)
		again bool
		code  pb.ErrorCode
	}{
		{"not running there", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_CONFLICT) }, true, pb.ErrorCode_ERROR_CODE_CONFLICT},
		{"unknown there", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND) }, true, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND},
		{"not reached", func(p *testPeer, _ *fakeAgent) { p.connect("bad", unreachable) }, true, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
		{"reached and then broken", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE) }, false, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
		{"refused by the guest, as if not running", func(_ *testPeer, a *fakeAgent) { a.refuseInvoke(pb.ErrorCode_ERROR_CODE_CONFLICT) }, false, pb.ErrorCode_ERROR_CODE_CONFLICT},
		{"refused by the guest, as if not reached", func(_ *testPeer, a *fakeAgent) { a.refuseInvoke(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE) }, false, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE},
		{"crashed", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR) }, false, pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR},
		{"out of time", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_TIMEOUT) }, false, pb.ErrorCode_ERROR_CODE_TIMEOUT},
		{"no handler", func(_ *testPeer, a *fakeAgent) { a.failInvoke(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST) }, false, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := newPeer(t)
			good, bad := &fakeAgent{}, &fakeAgent{}
			p.addNode("good", good)
			p.addNode("bad", bad)
			web := p.start("web", 2)
			p.run(web[0], "good")
			p.run(web[1], "bad")
			test.spoil(p, bad)
			failures := 0
			for range 40 {
				_, err := invoke(t, p, "web")
				if err == nil {
					continue
				}
				failures++
				wantCode(t, err, test.code)
			}
			if test.again && failures > 0 {
				t.Errorf("%d of 40 calls failed, although another replica could serve", failures)
			}
			if !test.again && (failures == 0 || good.calls()+failures != 40) {
				t.Errorf("%d of 40 calls failed and %d went to the good replica: some were repeated", failures, good.calls())
			}
			_, err := invoke(t, p, web[1])
			wantCode(t, err, test.code)
		})
	}
}

func TestInvokeTellsTheStatesWhenNothingRuns(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	web := p.start("web", 2)
	p.run(web[0], "n1")
	p.report(web[0], pb.InstanceState_INSTANCE_STATE_FAILED)
	if _, err := p.client.StopInstance(asAlice(t.Context()), &pb.StopInstanceRequest{Target: web[1]}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, err := invoke(t, p, "web")
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	e := apierror.From(err)
	if e.Detail(web[0]) != "FAILED on n1" || e.Detail(web[1]) != "STOPPED" ||
		!strings.Contains(e.Proto(t.Context()).GetNextStep(), "wasmatrix instance start web") {
		t.Errorf("error is %v", e.Proto(t.Context()))
	}
	_, err = invoke(t, p, "nothing")
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
	if took := time.Since(began); took > settleTime {
		t.Errorf("with a leader that says so it took %s to say no twice", took)
	}
}

func TestInvokeSeesWhatTheLeaderHasAcknowledged(t *testing.T) {
	leader := newPeer(t)
	follower := newFollower(t, leader)
	agent := &fakeAgent{}
	leader.addNode("n1", agent)
	follower.connect("n1", leader.agents["n1:7400"])
	follower.holdBack()
	id := leader.start("web", 1)[0]
	leader.run(id, "n1")
	before := leader.linearizedReads()

	answered := make(chan error, 1)
	go func() {
		_, err := invoke(t, follower, "web")
		answered <- err
	}()
	// The call has asked the leader how far it is; the follower lags behind that.
	eventually(t, "the follower to ask the leader", func() bool { return leader.linearizedReads() > before })
	select {
	case err := <-answered:
		t.Fatalf("answered %v before the follower had caught up", err)
	default:
	}
	follower.catchUp()
	if err := <-answered; err != nil {
		t.Errorf("after the follower has caught up: %v", err)
	}
}

func TestInvokeWaitsForAnInstanceThatIsAboutToRun(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	id := p.start("web", 1)[0]
	p.place(id, "n1")
	answered := make(chan error, 1)
	go func() {
		_, err := invoke(t, p, id)
		answered <- err
	}()
	p.report(id, pb.InstanceState_INSTANCE_STATE_RUNNING)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	slow := p.start("slow", 1)[0]
	_, err := invoke(t, p, slow)
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_CONFLICT)
	if apierror.From(err).Detail(slow) != "PENDING" {
		t.Errorf("error is %v", apierror.From(err).Proto(t.Context()))
	}
}
