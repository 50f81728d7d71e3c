package microvm

import (
	"context"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Settle waits until everything that goes on in the background has ended.
func (r *Runtime) Settle() { r.work.Wait() }

// Booting is a Runtime that makes no templates: each of its machines is booted.
type Booting struct{ *Runtime }

// Prepare implements runtime.Runtime.
func (r Booting) Prepare(ctx context.Context, spec runtime.Spec, host runtime.Host) (runtime.Instance, error) {
	spec.Concurrency = max(spec.Concurrency, 1)
	p, err := r.fromKernel(ctx, machineBytes(spec.MemoryBytes*uint64(spec.Concurrency)), spec)
	if err != nil {
		return nil, err
	}
	i := newInstance(r.Runtime, p, spec, host)
	return i, p.link.attach(i)
}
