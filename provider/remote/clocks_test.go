package remote

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"pgregory.net/rapid"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// farAgent is an agent whose clock differs and runs at another speed; its answers
// take their time. Real time is the test's own.
type farAgent struct {
	pb.NodeAgentServiceClient
	real  *time.Duration
	there func(real time.Duration) time.Duration
	out   time.Duration
	back  time.Duration
	asked int
}

func (a *farAgent) ReadClock(context.Context, *pb.ReadClockRequest, ...grpc.CallOption) (*pb.ReadClockResponse, error) {
	a.asked++
	*a.real += a.out
	at := a.there(*a.real)
	*a.real += a.back
	return &pb.ReadClockResponse{Clock: &pb.AgentClock{Id: 7, Now: int64(at)}}, nil
}

// However the two clocks differ, within their drift, and however long messages
// take: when the other clock has come to the limit, it is not later than the
// moment that was meant, by this one.
func TestALimitComesNoLaterThanItShould(t *testing.T) {
	speeds := func(t *rapid.T, name string) float64 {
		return rapid.Float64Range(0.9951, 1.0049).Draw(t, name) // together less than 1 %
	}
	rapid.Check(t, func(t *rapid.T) {
		real := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "start"))
		mine, theirs := speeds(t, "speed here"), speeds(t, "speed there")
		offset := time.Duration(rapid.Int64Range(int64(time.Hour), int64(100*time.Hour)).Draw(t, "offset"))
		here := func(real time.Duration) time.Duration { return time.Duration(mine * float64(real)) }
		there := func(real time.Duration) time.Duration { return offset + time.Duration(theirs*float64(real)) }
		way := func(name string) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(time.Second)).Draw(t, name))
		}
		agent := &farAgent{real: &real, there: there, out: way("out"), back: way("back")}
		c := newClocks(func() time.Duration { return here(real) })
		for range rapid.IntRange(1, 5).Draw(t, "calls") {
			notAfter := here(real) + time.Duration(rapid.Int64Range(0, int64(30*time.Second)).Draw(t, "left"))
			var caller pb.InstanceCaller
			if err := c.limit(t.Context(), agent, "b:1", &caller, notAfter); err != nil {
				t.Fatal(err)
			}
			if caller.GetClock() != 7 || caller.GetNotAfter() <= 0 {
				t.Fatalf("the limit is %v", &caller)
			}
			// The real moment at which the other clock shows the limit.
			passes := time.Duration(float64(time.Duration(caller.GetNotAfter())-offset) / theirs)
			if late := here(passes) - notAfter; late > time.Microsecond {
				t.Fatalf("it comes %s too late", late)
			}
			real += time.Duration(rapid.Int64Range(0, int64(8*time.Second)).Draw(t, "pause"))
		}
	})
}

func TestAClockIsReadAgainWhenTheReadingIsOld(t *testing.T) {
	var real time.Duration
	agent := &farAgent{real: &real, there: func(real time.Duration) time.Duration { return real + time.Hour }}
	c := newClocks(func() time.Duration { return real })
	for _, step := range []struct {
		pause time.Duration
		asked int
	}{{0, 1}, {readEvery, 1}, {1, 2}, {time.Second, 2}} {
		real += step.pause
		if err := c.limit(t.Context(), agent, "b:1", &pb.InstanceCaller{}, real+time.Second); err != nil || agent.asked != step.asked {
			t.Errorf("after %s it was asked %d times, want %d: %v", step.pause, agent.asked, step.asked, err)
		}
	}
	real += readEvery
	c.learn("b:1", &pb.AgentClock{Id: 8, Now: int64(real)})
	var caller pb.InstanceCaller
	if err := c.limit(t.Context(), agent, "b:1", &caller, real+time.Second); err != nil || agent.asked != 2 || caller.GetClock() != 8 {
		t.Errorf("an answer's reading was not taken up: asked %d times, clock %d, %v", agent.asked, caller.GetClock(), err)
	}
}
