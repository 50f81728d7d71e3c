package agent

import (
	"fmt"
	"strconv"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// openStandalone takes up the journal, and the configuration's providers, at once.
// Instances that are to run begin a new generation: this process shares none
// with the one before.
func (a *Agent) openStandalone(recovered *pb.WatchAssignmentsResponse) error {
	a.standalone = &standalone{
		node: a.nodeID(), modules: a.modules, declared: map[string]*pb.ProviderSpec{},
		capacity: int(a.cfg.Node.GetCapacity().GetInstances()), now: time.Now,
		runtimes: func(name string) bool {
			if name == "" {
				name = a.cfg.DefaultRuntime
			}
			return a.cfg.Runtimes[name] != nil
		},
		accept: a.accept, instances: a.Instances, grantsOf: a.grantsOf, resolve: a.worker.resolveIDs,
		answers: map[string]remembered{},
	}
	set := newAssignments()
	if recovered != nil {
		if err := set.apply(recovered); err != nil {
			return fmt.Errorf("applying the journal: %w", err)
		}
	}
	for id, inst := range set.instances {
		if occupies(inst) && inst.GetDesiredRunning() {
			again := withStatus(inst, inst.GetStatus())
			again.Placement = &pb.Placement{
				NodeId: a.nodeID(), NodeEpoch: standaloneEpoch, Generation: inst.GetPlacement().GetGeneration() + 1,
			}
			set.instances[id] = again
		}
	}
	clear(set.providers)
	for _, spec := range a.cfg.Providers {
		a.standalone.declared[spec.GetId()] = spec
		set.providers[spec.GetId()] = &pb.Provider{
			Id: spec.GetId(), Spec: spec, DesiredRunning: true, SpecVersion: 1,
			Placement: &pb.Placement{NodeId: a.nodeID(), NodeEpoch: standaloneEpoch, Generation: 1},
		}
	}
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	a.assigned.set = set
	a.carryOutLocked(&pb.WatchAssignmentsResponse{Complete: true})
	return nil
}

// accept makes changes durable and then carries them out, in standalone mode.
func (a *Agent) accept(changes []*pb.AssignmentChange) error {
	if len(changes) == 0 {
		return nil
	}
	a.journal.mu.Lock()
	defer a.journal.mu.Unlock()
	a.assigned.mu.Lock()
	next := a.assigned.set.clone()
	a.assigned.mu.Unlock()
	msg := &pb.WatchAssignmentsResponse{AppliesTo: next.sequence, ResultsIn: next.sequence + 1, Changes: changes}
	if err := next.apply(msg); err != nil {
		return fmt.Errorf("changing the assignments: %w", err)
	}
	if err := a.journal.saveLocked(next.full(a.worker.status)); err != nil {
		return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "the request could not be made durable: %s", err).
			With("node", a.nodeID()).With("changes", strconv.Itoa(len(changes))).
			Next("check the disk of the data directory")
	}
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	a.assigned.set = next
	a.carryOutLocked(msg)
	return nil
}
