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

// enter lets a call have its effect unless it is superseded or late: after a nil,
// the effect and then leave must follow. Nothing comes in between; effects of
// several calls run at once.
func (g *gate) enter(call *provider.Call) error {
	for mark := call.Mark(); ; {
		g.mu.RLock()
		if g.fence.Seen(call.Instance) == mark {
			err := call.Admit()
			if err != nil {
				g.mu.RUnlock()
			}
			return err
		}
		g.mu.RUnlock()
		if err := g.raise(call); err != nil {
			return err
		}
	}
}

func (g *gate) leave() { g.mu.RUnlock() }

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
