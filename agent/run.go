package agent

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// journalPatience is how long an agent waits for the control plane before it
	// runs what its journal says: a full set would replace it at once.
	journalPatience = 2 * time.Second
	// lastReportTimeout bounds the final report.
	lastReportTimeout = time.Second
	// closeTimeout bounds the closing of providers that hosting left open.
	closeTimeout = drainTimeout + time.Second
)

// Run runs the agent until ctx ends: then it drains all instances within the
// grace, closes the providers, and reports what it can. The session goes on until
// that is done, so that the node is not taken for lost while it drains.
func (a *Agent) Run(ctx context.Context) error {
	outer, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, life := errgroup.WithContext(outer)
	g.Go(func() error { return a.lease.run(life) })
	g.Go(func() error { return a.journal.run(life) })
	if a.session != nil {
		g.Go(func() error { return a.session.run(life) })
		g.Go(func() error { return a.recover(life) })
	}
	hosting, stopHosting := context.WithCancel(life)
	defer stopHosting()
	hosted := make(chan struct{})
	g.Go(func() error {
		defer close(hosted)
		return a.hosting.run(hosting)
	})
	g.Go(func() error {
		defer end()
		work, stop := context.WithCancel(life)
		defer stop()
		defer context.AfterFunc(ctx, stop)()
		err := a.worker.run(work)
		stopHosting()
		<-hosted
		a.finish(context.WithoutCancel(ctx))
		return err
	})
	return g.Wait()
}

// finish ends what is left when no instance and no provider runs any more.
func (a *Agent) finish(ctx context.Context) {
	bounded, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	if err := a.providers.Close(bounded); err != nil {
		a.log.WarnContext(ctx, "closing the providers failed", "error", err)
	}
	a.logs.close()
	if a.session != nil && a.session.current().leader != "" {
		bounded, cancel := context.WithTimeout(ctx, lastReportTimeout)
		defer cancel()
		if err := a.reports.flush(bounded); err != nil {
			a.log.WarnContext(ctx, "the final report did not reach the control plane", "error", err)
		}
	}
	a.journal.flush(ctx)
}

// recover runs what the journal says unless the control plane speaks first.
func (a *Agent) recover(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(journalPatience):
	}
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	msg := a.assigned.recovered
	if msg == nil {
		return nil
	}
	a.assigned.recovered = nil
	a.log.WarnContext(ctx, "no control plane yet; running what the journal says", "index", msg.GetIndex())
	if err := a.assigned.set.apply(msg); err != nil {
		return fmt.Errorf("applying the journal: %w", err)
	}
	a.carryOutLocked(msg)
	return nil
}

// apply takes up a message of the assignment stream.
func (a *Agent) apply(msg *pb.WatchAssignmentsResponse) error {
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	if err := a.assigned.set.apply(msg); err != nil {
		return err
	}
	a.assigned.recovered = nil
	a.carryOutLocked(msg)
	a.journal.touch()
	return nil
}

// carryOutLocked makes the node as the set, which msg has just changed, wants
// it. The directory comes first, so that a guest finds its grants when it starts.
func (a *Agent) carryOutLocked(msg *pb.WatchAssignmentsResponse) {
	set := a.assigned.set
	if msg.GetComplete() {
		records, err := set.directoryRecords()
		a.warnPermissions(err)
		if stale := a.directory.Replace(records); len(stale) > 0 {
			a.log.Warn("ignoring old generations of instances", "instances", stale)
		}
		a.hosting.replace(set.providers)
		a.worker.replace(set.instances)
		return
	}
	for _, c := range msg.GetChanges() {
		a.warnPermissions(feed(a.directory, c))
		switch c := c.GetChange().(type) {
		case *pb.AssignmentChange_PutProvider:
			a.hosting.put(c.PutProvider)
		case *pb.AssignmentChange_RemoveProvider:
			a.hosting.remove(c.RemoveProvider)
		case *pb.AssignmentChange_PutInstance:
			a.worker.put(c.PutInstance)
		case *pb.AssignmentChange_RemoveInstance:
			a.worker.remove(c.RemoveInstance)
		}
	}
}

func (a *Agent) warnPermissions(err error) {
	if err != nil {
		a.log.Warn("leaving out permissions that cannot be read", "error", err)
	}
}

// resync makes the present state of everything go out again.
func (a *Agent) resync() {
	for _, s := range a.worker.all() {
		s.mu.Lock()
		if s.status.GetState() >= pb.InstanceState_INSTANCE_STATE_PREPARING {
			a.reports.instance(s.reportLocked())
		}
		s.mu.Unlock()
	}
	for _, r := range a.hosting.reports() {
		a.reports.provider(r)
	}
}

// observedInstance takes a change of an instance's status. What has ended for
// good goes into the journal, so that a restart does not run it again.
func (a *Agent) observedInstance(r *pb.InstanceReport) {
	if a.session != nil {
		a.reports.instance(r)
	}
	switch r.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_COMPLETED, pb.InstanceState_INSTANCE_STATE_STOPPED, pb.InstanceState_INSTANCE_STATE_FAILED:
		a.journal.touch()
	default:
	}
}

func (a *Agent) observedProvider(r *pb.ProviderReport) {
	if a.session != nil {
		a.reports.provider(r)
	}
}

// journalContent is the set with what was observed of its instances.
func (a *Agent) journalContent() *pb.WatchAssignmentsResponse {
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	return a.assigned.set.full(a.worker.status)
}

// grantsOf returns an instance's capability assignments.
func (a *Agent) grantsOf(id string) []*pb.CapabilityAssignment {
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	return a.assigned.set.grantsOf(id)
}

// index returns the Raft index of what the agent knows; 0 in standalone mode.
func (a *Agent) index() uint64 {
	a.assigned.mu.Lock()
	defer a.assigned.mu.Unlock()
	return a.assigned.set.index
}
