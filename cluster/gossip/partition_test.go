package gossip

import (
	"errors"
	"io"
	"log"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

var errCut = errors.New("the network is cut")

// network is the loopback with two sides that can be cut apart.
type network struct {
	mu    sync.Mutex
	sides map[string]int // by address
	cut   bool
}

// set cuts the sides apart, or joins them.
func (n *network) set(cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
}

func (n *network) reachable(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cut || n.sides[from] == n.sides[to]
}

// joint is where one member meets the network.
type joint struct {
	*memberlist.NetTransport
	net     *network
	address string
}

func (j *joint) WriteTo(b []byte, addr string) (time.Time, error) {
	return j.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// WriteToAddress loses a packet to the other side without a word, as networks do.
func (j *joint) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	if !j.net.reachable(j.address, to.Addr) {
		return time.Now(), nil
	}
	return j.NetTransport.WriteToAddress(b, to)
}

func (j *joint) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return j.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

func (j *joint) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if !j.net.reachable(j.address, to.Addr) {
		return nil, errCut
	}
	return j.NetTransport.DialAddressTimeout(to, timeout)
}

// member starts a member on a side of the network; memberlist forgets the dead
// after a moment, where by default it takes 30 s.
func (n *network) member(t *testing.T, id string, side int, join ...string) (*testMember, string) {
	t.Helper()
	transport, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{"127.0.0.1"}, Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(transport.GetAutoBindPort()))
	n.mu.Lock()
	n.sides[address] = side
	n.mu.Unlock()
	return start(t, Config{Bind: address, Join: join, Rejoin: 200 * time.Millisecond, tune: func(c *memberlist.Config) {
		c.Transport = &joint{transport, n, address}
		c.ProbeInterval, c.ProbeTimeout = 50*time.Millisecond, 20*time.Millisecond
		c.SuspicionMult, c.GossipInterval = 2, 20*time.Millisecond
		c.GossipToTheDeadTime = 100 * time.Millisecond
	}}, metadata(id)), address
}

// held is how many members memberlist itself still knows, dead or alive.
func held(m *testMember) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.list.NumMembers()
}

func TestSidesFindEachOtherAfterALongPartition(t *testing.T) {
	n := &network{sides: map[string]int{}}
	a, at := n.member(t, "n1", 1)
	b, _ := n.member(t, "n2", 1, at)
	// Nobody knows the other side by configuration, as when all addresses in it are outdated.
	c, other := n.member(t, "n3", 2)
	d, _ := n.member(t, "n4", 2, other)
	if _, err := a.list.Join([]string{other}); err != nil {
		t.Fatal(err)
	}
	all := []*testMember{a, b, c, d}
	for _, m := range all {
		eventually(t, "all know each other", func() bool { return alive(m.Gossip) == "n1 n2 n3 n4" })
	}
	n.set(true)
	for i, m := range all {
		eventually(t, "the sides have forgotten each other", func() bool {
			return alive(m.Gossip) == []string{"n1 n2", "n3 n4"}[i/2] && held(m) == 2
		})
	}
	// What memberlist keeps of the dead it drops in its next rounds of probes.
	gone := time.NewTimer(time.Second)
	<-gone.C
	n.set(false)
	for _, m := range all {
		eventually(t, "all know each other again", func() bool { return alive(m.Gossip) == "n1 n2 n3 n4" })
	}
}
