package agent

import (
	"context"
	"sync"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// maxReports is the most of each kind in one ReportStatusRequest, so that it
	// stays within the limit of a message even when all carry a long reason.
	maxReports = 4000
	// reportTimeout bounds one ReportStatus; it answers when it is committed.
	reportTimeout = 10 * time.Second
	// passingPatience is how long a state on the way to RUNNING is kept back: an
	// instance whose module is cached runs sooner, and its report must not wait
	// for the commit of one that is out of date by then.
	passingPatience = 100 * time.Millisecond
)

// reporter collects what was observed until it is committed in the registry. An
// idle path sends at once; what is observed while a batch is under way goes with
// the next one, the latest for each instance and provider.
type reporter struct {
	sent    func(err error)
	denials *denials // nil when nothing is refused here

	mu        sync.Mutex
	instances map[string]*pb.InstanceReport
	providers map[string]*pb.ProviderReport // by id: no two replicas of one are on a node
	sending   bool
	wake      chan struct{}
	settled   chan struct{} // closed and replaced after each batch
}

func newReporter(sent func(error)) *reporter {
	return &reporter{
		sent:      sent,
		instances: map[string]*pb.InstanceReport{}, providers: map[string]*pb.ProviderReport{},
		wake: make(chan struct{}, 1), settled: make(chan struct{}),
	}
}

// instance takes an observation of an instance; it replaces an older one that
// has not been sent. It is not modified afterwards.
func (r *reporter) instance(report *pb.InstanceReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.instances[report.GetInstanceId()] = report
	if passing(report.GetStatus()) {
		time.AfterFunc(passingPatience, r.poke)
		return
	}
	r.poke()
}

// passing reports whether st is a state on the way to RUNNING and nothing went wrong.
func passing(st *pb.InstanceStatus) bool {
	return st.GetState() < pb.InstanceState_INSTANCE_STATE_RUNNING && st.GetReason() == pb.ExitReason_EXIT_REASON_UNSPECIFIED
}

// provider takes an observation of a provider's replica; it is not modified afterwards.
func (r *reporter) provider(report *pb.ProviderReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.providers[report.GetProviderId()] = report
	r.poke()
}

func (r *reporter) poke() {
	poke(r.wake)
}

// run sends batches through one session until that breaks or ctx ends. A batch
// that was not acknowledged is kept for the next session.
func (r *reporter) run(ctx context.Context, client pb.AgentSessionServiceClient, node string, epoch uint64) error {
	for {
		req := r.take(node, epoch)
		if req == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-r.wake:
			}
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, reportTimeout)
		_, err := client.ReportStatus(bounded, req)
		cancel()
		r.done(req, err)
		if err != nil {
			return err
		}
	}
}

// take returns the next batch, nil when there is nothing to send.
func (r *reporter) take(node string, epoch uint64) *pb.ReportStatusRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	req := &pb.ReportStatusRequest{NodeId: node, Epoch: epoch}
	if r.denials != nil {
		req.Denials = r.denials.take()
	}
	if len(r.instances) == 0 && len(r.providers) == 0 && len(req.GetDenials()) == 0 {
		return nil
	}
	for id, report := range r.instances {
		if len(req.Instances) == maxReports {
			break
		}
		req.Instances = append(req.Instances, report)
		delete(r.instances, id)
	}
	for id, report := range r.providers {
		if len(req.Providers) == maxReports {
			break
		}
		req.Providers = append(req.Providers, report)
		delete(r.providers, id)
	}
	r.sending = true
	return req
}

// done takes back what was not acknowledged, unless something newer is known.
func (r *reporter) done(req *pb.ReportStatusRequest, err error) {
	r.sent(err)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		if r.denials != nil {
			r.denials.giveBack(req.GetDenials())
		}
		for _, i := range req.GetInstances() {
			if _, newer := r.instances[i.GetInstanceId()]; !newer {
				r.instances[i.GetInstanceId()] = i
			}
		}
		for _, p := range req.GetProviders() {
			if _, newer := r.providers[p.GetProviderId()]; !newer {
				r.providers[p.GetProviderId()] = p
			}
		}
	}
	r.sending = false
	close(r.settled)
	r.settled = make(chan struct{})
}

// flush waits until all is acknowledged or ctx ends.
func (r *reporter) flush(ctx context.Context) error {
	for {
		r.mu.Lock()
		idle, settled := !r.sending && len(r.instances) == 0 && len(r.providers) == 0, r.settled
		r.mu.Unlock()
		if r.denials != nil && r.denials.hurry() {
			idle = false
			r.poke()
		}
		if idle {
			return nil
		}
		select {
		case <-settled:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
