package client

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// bareTransport has peers that are never dialled.
func bareTransport(t *testing.T, addresses ...string) *transport {
	t.Helper()
	s := &peerSet{opts: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, refresh: time.Now().Add(time.Hour)}
	for _, a := range addresses {
		if err := s.add(a, true); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = s.close() })
	return &transport{timeout: 5 * time.Second, attemptTimeout: 20 * time.Millisecond, peers: s}
}

func TestPeerThatHangsIsLeftForTheNextOne(t *testing.T) {
	for _, rule := range []repeat{repeatAlways, repeatUnsent} {
		tr := bareTransport(t, "hangs:1", "works:1")
		tr.logger = discard()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		var asked []string
		err := tr.try(ctx, plan{rule: rule, limited: true}, func(ctx context.Context, p *peer) error {
			asked = append(asked, p.address)
			if p.address == "hangs:1" {
				sentNotes{}.HandleRPC(ctx, outHeader())
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		if rule == repeatAlways && (err != nil || !slices.Equal(asked, []string{"hangs:1", "works:1"})) {
			t.Errorf("a read: asked %v, got %v", asked, err)
		}
		if rule == repeatUnsent && (apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_TIMEOUT || len(asked) != 1) {
			t.Errorf("an invocation: asked %v, got %v", asked, err)
		}
	}
}

func TestKnownAddressesAreBounded(t *testing.T) {
	tr := bareTransport(t, "a:1")
	status := &pb.StatusResponse{}
	for i := range 100 {
		status.Peers = append(status.Peers, &pb.PeerStatus{ApiAddress: "a" + string(rune('a'+i%26)) + ":" + string(rune('1'+i%9))})
	}
	tr.peers.learn(status)
	if n := len(tr.peers.order(false)); n != maxPeers {
		t.Errorf("%d addresses are kept", n)
	}
	if n := len(tr.peers.order(true)); n != 1 {
		t.Errorf("%d configured addresses", n)
	}
}

func TestLogPositionAfterABreak(t *testing.T) {
	start := time.Unix(1000, 0)
	tests := []struct {
		name      string
		req       *pb.FollowLogsRequest
		lineAt    time.Duration // after start; negative: no line came
		breakAt   time.Duration
		wantTail  int32
		wantSince time.Duration
	}{
		{name: "after a line", req: &pb.FollowLogsRequest{Tail: 10}, lineAt: 60 * time.Second, breakAt: 90 * time.Second, wantSince: 40 * time.Second},
		{name: "before any line", req: &pb.FollowLogsRequest{Tail: 10, Since: durationpb.New(time.Hour)}, lineAt: -1, breakAt: time.Second, wantTail: 10, wantSince: time.Hour},
		{name: "only new lines were asked for", req: &pb.FollowLogsRequest{Tail: -1}, lineAt: -1, breakAt: 4 * time.Second, wantSince: 4 * time.Second},
		{name: "only new lines, one came", req: &pb.FollowLogsRequest{Tail: -1}, lineAt: 60 * time.Second, breakAt: 70 * time.Second, wantSince: 20 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &logPosition{req: tt.req}
			if p.request(start) != tt.req {
				t.Error("the first request is not the caller's")
			}
			if tt.lineAt >= 0 {
				p.advance(&pb.LogEntry{InstanceId: "a", Time: timestamppb.New(start)}, start.Add(tt.lineAt))
			}
			got := p.request(start.Add(tt.breakAt))
			if got.GetTail() != tt.wantTail || got.GetSince().AsDuration() != tt.wantSince {
				t.Errorf("tail %d since %s, want %d %s", got.GetTail(), got.GetSince().AsDuration(), tt.wantTail, tt.wantSince)
			}
		})
	}
}

func TestReasonsAreReadable(t *testing.T) {
	err := apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, `connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`)
	if got := reason(err); got != "dial tcp 127.0.0.1:1: connect: connection refused" {
		t.Errorf("got %q", got)
	}
	if got := reason(context.DeadlineExceeded); got != "did not answer in time" {
		t.Errorf("got %q", got)
	}
	if got := identityFailure(errors.New(`x: "remote error: tls: expired certificate"`)); got != "remote error: tls: expired certificate" {
		t.Errorf("got %q", got)
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func outHeader() stats.RPCStats { return &stats.OutHeader{Client: true} }
