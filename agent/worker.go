package agent

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// worker has one supervisor for each instance that is assigned to this node.
type worker struct {
	node    string
	exec    *executor
	logs    *logBook
	lease   *lease
	metrics *metrics
	log     *slog.Logger
	// report takes each change of a status; it must not block.
	report func(r *pb.InstanceReport)

	mu          sync.Mutex
	supervisors map[string]*supervisor
	fresh       []*supervisor // have no goroutine yet
	wake        chan struct{}
}

// run gives each supervisor its goroutine. When ctx ends it drains all instances
// at once and returns after the last.
func (w *worker) run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		w.mu.Lock()
		fresh := w.fresh
		w.fresh = nil
		w.mu.Unlock()
		for _, s := range fresh {
			running.Go(func() { s.run(ctx) })
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// put assigns an instance to this node, or tells of a change.
func (w *worker) put(inst *pb.Instance) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.supervisors[inst.GetId()]; ok {
		s.assign(inst)
		return
	}
	s := newSupervisor(w, inst)
	w.supervisors[s.id] = s
	w.fresh = append(w.fresh, s)
	poke(w.wake)
}

// remove says that an instance is no longer assigned to this node.
func (w *worker) remove(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.supervisors[id]; ok {
		s.remove()
	}
}

// replace makes instances the whole assignment.
func (w *worker) replace(instances map[string]*pb.Instance) {
	for _, id := range w.ids() {
		if _, ok := instances[id]; !ok {
			w.remove(id)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(instances)) {
		w.put(instances[id])
	}
}

// forget ends the supervisor's part unless the instance was assigned again. At
// shutdown its last status stays visible.
func (w *worker) forget(s *supervisor, shutdown bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		delete(w.supervisors, s.id)
		w.logs.drop(s.id)
		return true
	}
	return shutdown
}

// poke makes all supervisors look again, as after a change of the lease.
func (w *worker) poke() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.supervisors {
		s.poke()
	}
}

func (w *worker) ids() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.supervisors))
}

func (w *worker) all() []*supervisor {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.SortedFunc(maps.Values(w.supervisors), func(a, b *supervisor) int { return cmp.Compare(a.id, b.id) })
}
