package gossip

import (
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// switchedLink lets everything pass, or nothing.
type switchedLink struct {
	cut     atomic.Bool
	refused atomic.Int64
}

func (l *switchedLink) Send(_ string, send func()) {
	if !l.cut.Load() {
		send()
	}
}

func (l *switchedLink) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	if l.cut.Load() {
		l.refused.Add(1)
		return nil, errors.New("the link is cut")
	}
	return net.DialTimeout(network, address, timeout)
}

func TestWhatGoesOutGoesOverTheLink(t *testing.T) {
	link := &switchedLink{}
	link.cut.Store(true)
	n1 := start(t, Config{}, metadata("n1"))
	n2 := start(t, Config{Join: []string{n1.Address()}, Rejoin: 20 * time.Millisecond, Link: link}, metadata("n2"))
	eventually(t, "n2 to have tried", func() bool { return link.refused.Load() > 2 })
	if got := alive(n1.Gossip); got != "n1" {
		t.Fatalf("n1 knows %s across a link that is cut", got)
	}
	link.cut.Store(false)
	eventually(t, "both know each other", func() bool { return alive(n1.Gossip) == alive(n2.Gossip) && alive(n1.Gossip) != "n1" })
}
