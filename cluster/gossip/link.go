package gossip

import (
	"net"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
)

// Link is the way from this member to others.
type Link interface {
	// Send calls send, at once or later, if a datagram to address, host:port, is to arrive.
	Send(address string, send func())
	// DialTimeout connects to a member; the caller closes the connection.
	DialTimeout(network, address string, timeout time.Duration) (net.Conn, error)
}

// linked is the usual transport of memberlist with a Link for all that goes out.
type linked struct {
	*memberlist.NetTransport
	link Link
}

var _ memberlist.NodeAwareTransport = (*linked)(nil)

func newLinked(cfg *memberlist.Config, link Link) (*linked, error) {
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{cfg.BindAddr}, BindPort: cfg.BindPort, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	return &linked{NetTransport: inner, link: link}, nil
}

// WriteTo sends a datagram. As with any datagram nobody is told when it is lost.
func (l *linked) WriteTo(b []byte, address string) (time.Time, error) {
	b = slices.Clone(b) // it may go out after the caller has used it again
	l.link.Send(address, func() { _, _ = l.NetTransport.WriteTo(b, address) })
	return time.Now(), nil
}

// WriteToAddress sends a datagram.
func (l *linked) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	return l.WriteTo(b, to.Addr)
}

// DialTimeout connects to a member.
func (l *linked) DialTimeout(address string, timeout time.Duration) (net.Conn, error) {
	return l.link.DialTimeout("tcp", address, timeout)
}

// DialAddressTimeout connects to a member.
func (l *linked) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return l.DialTimeout(to.Addr, timeout)
}
