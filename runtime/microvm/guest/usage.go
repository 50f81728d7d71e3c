package guest

import (
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

// usageInterval is how often a call that takes long tells how much memory there is.
const usageInterval = 500 * time.Millisecond

// usage tells the host of memory that grows while no answer carries its size.
type usage struct {
	conn *channel.Conn

	mu sync.Mutex
	// next is when the host is told next; nil before begin.
	next *time.Timer
	// told is the size that was told last.
	told uint64
	// over is set by end, which a Stop may bring before begin.
	over bool
}

// begin tells of i until end.
func (u *usage) begin(i runtime.Instance) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.over {
		u.next = time.AfterFunc(usageInterval, func() { u.tell(i) })
	}
}

func (u *usage) tell(i runtime.Instance) {
	now := i.Usage().MemoryBytes
	u.mu.Lock()
	grown := now != u.told
	u.told = now
	u.mu.Unlock()
	if grown && u.conn.Send(channel.Usage, 0, channel.EncodeNumber(now)) != nil {
		return // the host has gone
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.over {
		u.next.Reset(usageInterval)
	}
}

// end tells nothing more, but for what is being told.
func (u *usage) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.over = true
	if u.next != nil {
		u.next.Stop()
	}
}
