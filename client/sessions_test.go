package client_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// sessionPeer is a peer that gives sessions, and a client of it.
func sessionPeer(t *testing.T, cfg client.Config) (*fakePeer, *client.Client) {
	t.Helper()
	w := newWorld(t)
	p := w.serve(t, w.issue(t, identity.Node, "n1", identity.RoleServer))
	p.sessions = true
	cfg.Addresses = []string{p.address}
	return p, w.client(t, cfg)
}

func (p *fakePeer) placed() []*pb.WriteOptions {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*pb.WriteOptions(nil), p.places...)
}

func stopping(ctx context.Context, c *client.Client, id string) error {
	_, err := c.StopInstance(ctx, &pb.StopInstanceRequest{Target: "w", RequestId: id})
	return err
}

// fails says what became of a write as the server says it.
func fails(code pb.ErrorCode, outcome string, details ...string) error {
	e := apierror.New(code, "x").With(apierror.DetailOutcome, outcome)
	for i := 0; i+1 < len(details); i += 2 {
		e = e.With(details[i], details[i+1])
	}
	return e
}

func sessionGone(id string) error {
	return fails(pb.ErrorCode_ERROR_CODE_CONFLICT, apierror.OutcomeUnknown, "session", id, apierror.DetailAttempt, apierror.OutcomeFailed)
}

func TestASessionIsOpenedByTheFirstWriteAndUsedAgain(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	if _, err := c.ListNodes(t.Context(), &pb.ListNodesRequest{}); err != nil {
		t.Fatal(err)
	}
	if p.count("open") != 0 {
		t.Error("a read opened a session")
	}
	for range 3 {
		if err := stopping(t.Context(), c, ""); err != nil {
			t.Fatal(err)
		}
	}
	for i, w := range p.placed() {
		if n := uint64(i) + 1; w.GetSessionId() != "s1" || w.GetSequence() != n || w.GetFirstOutstanding() != n {
			t.Errorf("write %d stands at %v", n, w)
		}
	}
	var group sync.WaitGroup
	for range 40 {
		group.Go(func() {
			if err := stopping(t.Context(), c, ""); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	seen := map[uint64]bool{}
	for _, w := range p.placed() {
		if seen[w.GetSequence()] || w.GetFirstOutstanding() > w.GetSequence() {
			t.Errorf("a write stands at %v", w)
		}
		seen[w.GetSequence()] = true
	}
	if p.count("open") != 1 {
		t.Errorf("%d sessions were opened", p.count("open"))
	}
	// A condition goes along, and a session that the caller has chosen is left alone.
	_, err := c.StopInstance(t.Context(), &pb.StopInstanceRequest{Target: "w", Write: &pb.WriteOptions{IfIndex: 9}})
	if w := p.placed()[43]; err != nil || w.GetIfIndex() != 9 || w.GetSessionId() != "s1" {
		t.Errorf("a conditional write stands at %v, %v", w, err)
	}
	own := &pb.WriteOptions{SessionId: "mine", Sequence: 7}
	_, err = c.StopInstance(t.Context(), &pb.StopInstanceRequest{Target: "w", RequestId: "r", Write: own})
	if w := p.placed()[44]; err != nil || w.GetSessionId() != "mine" || w.GetSequence() != 7 {
		t.Errorf("a write of the caller's own session stands at %v, %v", w, err)
	}
}

func TestManyWritersShareOneOpening(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	var group sync.WaitGroup
	for range 50 {
		group.Go(func() {
			if err := stopping(t.Context(), c, ""); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if p.count("open") != 1 || p.count("stop") != 50 {
		t.Errorf("%d sessions, %d writes", p.count("open"), p.count("stop"))
	}
}

func TestAClusterWithoutSessionsIsWrittenToAllTheSame(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	p.sessions = false
	for range 3 {
		if err := stopping(t.Context(), c, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range p.placed() {
		if w.GetSessionId() != "" {
			t.Errorf("a write stands at %v", w)
		}
	}
	full, c2 := sessionPeer(t, client.Config{})
	full.answers(func(call string, _ int) error {
		if call == "open" {
			return fails(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, apierror.OutcomeFailed)
		}
		return nil
	})
	for range 3 {
		if err := stopping(t.Context(), c2, ""); err != nil {
			t.Fatal(err)
		}
	}
	if full.count("open") != 1 {
		t.Errorf("a full cluster was asked %d times", full.count("open"))
	}
}

func TestASessionThatIsGoneIsReplacedWhenNothingIsInDoubt(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	p.answers(func(call string, n int) error {
		if call == "stop" && n == 2 {
			return sessionGone("s1")
		}
		return nil
	})
	for i := range 3 {
		if err := stopping(t.Context(), c, fmt.Sprint("r", i)); err != nil {
			t.Fatal(err)
		}
	}
	places := p.placed()
	if len(places) != 4 || p.count("open") != 2 || places[2].GetSessionId() != "s2" || places[2].GetSequence() != 1 || places[3].GetSessionId() != "s2" {
		t.Errorf("%d sessions, places %v", p.count("open"), places)
	}
}

func TestAWriteInDoubtIsNotBegunAgain(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	p.answers(func(call string, n int) error {
		switch {
		case call == "stop" && n == 1:
			return status.Error(codes.Unavailable, "connection lost") // nobody knows
		case call == "stop":
			return sessionGone("s1")
		}
		return nil
	})
	err := stopping(t.Context(), c, "r")
	e := apierror.From(err)
	if e.Code() != pb.ErrorCode_ERROR_CODE_CONFLICT || e.Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown || e.Detail(apierror.DetailRequestID) != "r" {
		t.Errorf("got %v", e.Proto(t.Context()))
	}
	if p.count("open") != 1 || p.count("stop") != 2 {
		t.Errorf("%d sessions, %d attempts", p.count("open"), p.count("stop"))
	}
}

// TestDoubtIsNotForgottenOnTheWay: the last attempt of a write certainly failed,
// the one before may not have. The caller's own repetition is the same write.
func TestDoubtIsNotForgottenOnTheWay(t *testing.T) {
	p, c := sessionPeer(t, client.Config{Timeout: 300 * time.Millisecond})
	p.answers(func(call string, n int) error {
		switch {
		case call == "stop" && n == 1:
			return fails(pb.ErrorCode_ERROR_CODE_NO_LEADER, apierror.OutcomeUnknown)
		case call == "stop":
			return fails(pb.ErrorCode_ERROR_CODE_NO_LEADER, apierror.OutcomeFailed)
		}
		return nil
	})
	e := apierror.From(stopping(t.Context(), c, "r"))
	if e.Code() != pb.ErrorCode_ERROR_CODE_NO_LEADER || e.Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown {
		t.Fatalf("got %v", e.Proto(t.Context()))
	}
	p.answers(nil)
	if err := stopping(t.Context(), c, "another"); err != nil {
		t.Fatal(err)
	}
	if err := stopping(t.Context(), c, "r"); err != nil {
		t.Fatal(err)
	}
	if err := stopping(t.Context(), c, "last"); err != nil {
		t.Fatal(err)
	}
	places := p.placed()
	n := len(places)
	first, other, again, last := places[0], places[n-3], places[n-2], places[n-1]
	if other.GetSequence() != 2 || other.GetFirstOutstanding() != 1 {
		t.Errorf("a write after the one in doubt stands at %v", other)
	}
	if again.GetSessionId() != first.GetSessionId() || again.GetSequence() != first.GetSequence() {
		t.Errorf("the repetition stands at %v, the first attempt at %v", again, first)
	}
	if last.GetFirstOutstanding() != 3 {
		t.Errorf("after the answer the next stands at %v", last)
	}
}

// TestAnAnswerEndsTheDoubt: the state has refused the request for good, so what
// an earlier attempt did is known.
func TestAnAnswerEndsTheDoubt(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	p.answers(func(call string, n int) error {
		switch {
		case call == "stop" && n == 1:
			return fails(pb.ErrorCode_ERROR_CODE_NO_LEADER, apierror.OutcomeUnknown)
		case call == "stop" && n == 2:
			return fails(pb.ErrorCode_ERROR_CODE_CONFLICT, apierror.OutcomeFailed, apierror.DetailIndex, "9")
		}
		return nil
	})
	if e := apierror.From(stopping(t.Context(), c, "r")); e.Detail(apierror.DetailOutcome) != apierror.OutcomeFailed {
		t.Errorf("got %v", e.Proto(t.Context()))
	}
	if err := stopping(t.Context(), c, ""); err != nil {
		t.Fatal(err)
	}
	if w := p.placed()[2]; w.GetFirstOutstanding() != 2 {
		t.Errorf("the next stands at %v", w)
	}
}

func TestWhatWasNeverSentHasFailed(t *testing.T) {
	w := newWorld(t)
	c := w.client(t, client.Config{Addresses: []string{"127.0.0.1:1"}, Timeout: 200 * time.Millisecond})
	e := apierror.From(stopping(t.Context(), c, "r"))
	if e.Code() != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE || e.Detail(apierror.DetailOutcome) != apierror.OutcomeFailed || e.Detail(apierror.DetailRequestID) != "r" {
		t.Errorf("got %v", e.Proto(t.Context()))
	}
	// A read has no outcome.
	_, err := c.ListNodes(t.Context(), &pb.ListNodesRequest{})
	if e := apierror.From(err); e.Detail(apierror.DetailOutcome) != "" {
		t.Errorf("a read: %v", e.Proto(t.Context()))
	}
}

// TestALongSessionIsFollowedByTheNext: one write that stays in doubt does not hold
// up the others.
func TestALongSessionIsFollowedByTheNext(t *testing.T) {
	p, c := sessionPeer(t, client.Config{})
	gone, cancel := context.WithCancel(t.Context())
	p.answers(func(call string, n int) error {
		if call == "stop" && n == 1 {
			cancel()
			return status.Error(codes.Unavailable, "lost")
		}
		return nil
	})
	if err := stopping(gone, c, "doubtful"); err == nil {
		t.Fatal("no error")
	}
	for range 450 {
		if err := stopping(t.Context(), c, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range p.placed() {
		if w.GetSequence()-w.GetFirstOutstanding() >= 256 {
			t.Fatalf("a write stands at %v", w)
		}
	}
	if n := p.count("open"); n != 2 {
		t.Errorf("%d sessions for one write in doubt", n)
	}
}
