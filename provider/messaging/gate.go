package messaging

import (
	"sync"

	"github.com/wasmatrix/wasmatrix/provider"
)

// gate lets calls have their effect: of any instance never one of an older
// placement after one of a newer.
type gate struct {
	mu    sync.RWMutex
	fence provider.Fence
}

// do runs the effect of a call unless it is superseded or late. Nothing comes in
// between the decision and the effect; effects of several calls run at once.
func (g *gate) do(call *provider.Call, effect func() error) error {
	for mark := call.Mark(); ; {
		g.mu.RLock()
		if g.fence.Seen(call.Instance) == mark {
			err := call.Admit()
			if err == nil {
				err = effect()
			}
			g.mu.RUnlock()
			return err
		}
		g.mu.RUnlock()
		if err := g.raise(call); err != nil {
			return err
		}
	}
}

// raise takes up that a placement calls, and refuses an older one.
func (g *gate) raise(call *provider.Call) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if newest := g.fence.Seen(call.Instance); call.Mark().Before(newest) {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	if err := call.Admit(); err != nil {
		return err
	}
	g.fence.Raise(call.Instance, call.Mark())
	return nil
}
