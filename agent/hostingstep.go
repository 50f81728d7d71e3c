package agent

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// providerHave is what the goroutine of a provider last did.
type providerHave struct {
	open       bool
	stopped    bool // STOPPED was reported for generation
	generation uint64
	nodeEpoch  uint64
	replica    uint32
	// specVersion is what the driver is open with, or was last tried to be opened with.
	specVersion uint64
	// tried is what an open one could not be updated to; 0 when nothing failed.
	tried uint64
	due   time.Time // of the next try; zero when none failed
}

// placed takes up where and in which generation the provider is wanted.
func (p *providerHave) placed(want *pb.Provider) {
	p.generation, p.nodeEpoch = want.GetPlacement().GetGeneration(), want.GetPlacement().GetNodeEpoch()
	p.replica = want.GetReplica()
}

// same reports whether it is that very placement.
func (p *providerHave) same(want *pb.Provider) bool {
	return p.generation == want.GetPlacement().GetGeneration() && p.replica == want.GetReplica()
}

// status is a state of the present generation.
func (p *providerHave) status(state pb.ProviderState, message string) *pb.ProviderStatus {
	return &pb.ProviderStatus{
		State: state, Generation: p.generation, SpecVersion: p.specVersion, Message: oneLine(message),
		ChangedAt: timestamppb.New(time.Now()),
	}
}

// providerStep is what the goroutine of a provider does next.
type providerStep int

// The steps of a provider.
const (
	providerRest   providerStep = iota // wait for news
	providerAwait                      // wait for news, and until due
	providerOpen                       // open the driver, closing the old one first
	providerUpdate                     // give the open driver another configuration
	providerAdopt                      // go on under a new generation
	providerClose                      // drain and close the driver
	providerForget                     // nothing is left to do
)

// stepProvider decides what follows; it is pure. A new generation in a new epoch
// of the node is the same provider: the node was only away from the control plane.
// So is another replica: it was open here and is not to be closed for that. A new
// generation in the same epoch is a new start.
func stepProvider(want *pb.Provider, have providerHave, shutdown bool, now time.Time) providerStep {
	gone := want == nil || shutdown
	run := !gone && want.GetDesiredRunning()
	switch {
	case gone && !have.open:
		return providerForget
	case !run && have.open:
		return providerClose
	case !run && have.stopped && have.same(want):
		return providerRest
	case !run:
		return providerClose
	case have.open:
		return stepOpen(want, have, now)
	case have.specVersion == want.GetSpecVersion() && have.same(want) && now.Before(have.due):
		return providerAwait
	default:
		return providerOpen
	}
}

// stepOpen decides what follows for an open provider that is wanted.
func stepOpen(want *pb.Provider, have providerHave, now time.Time) providerStep {
	switch {
	case !have.same(want) && (have.nodeEpoch != want.GetPlacement().GetNodeEpoch() || have.replica != want.GetReplica()):
		return providerAdopt
	case !have.same(want):
		return providerOpen
	case have.specVersion == want.GetSpecVersion():
		return providerRest
	case have.tried == want.GetSpecVersion() && now.Before(have.due):
		return providerAwait
	default:
		return providerUpdate
	}
}
