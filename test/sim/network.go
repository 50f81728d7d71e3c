package sim

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// errGone is what a machine that is down, or was cut off by a crash, looks like.
var errGone = errors.New("sim: the connection was reset")

// route is one direction between two machines.
type route struct{ from, to string }

// weather is how a route carries what is sent on it. The zero weather is a calm
// local network.
type weather struct {
	// cut: nothing arrives before the cut heals. Bytes of connections wait, as TCP
	// sends them again; messages of Raft are lost or wait, as the dice say.
	cut bool
	// held: everything waits until the machine runs again.
	held bool
	// slow is added to the delay of everything, up to twice.
	slow time.Duration
	// loss is the part of Raft's messages that never arrive.
	loss float64
	// twice is the part of Raft's messages that arrive a second time, later.
	twice float64
	// late is the part of Raft's messages that are very late, up to lateBy: an
	// answer may come after whoever asked has given up.
	late   float64
	lateBy time.Duration
}

// Network connects machines by name. A machine's IP address follows from its
// name, so that addresses look like real ones to gRPC.
type Network struct {
	counts *Counts

	mu        sync.Mutex
	rand      *rand.Rand
	base      time.Duration
	routes    map[route]*weather
	reasons   map[route]map[string]weather // by fault
	waiting   map[route][]func()
	listeners map[string]*listener
	transport map[string]*raftTransport
	pipes     map[*pipe]struct{}
	hosts     map[string]string // by IP address
	troubled  map[string]time.Time
}

func newNetwork(seed uint64, counts *Counts) *Network {
	return &Network{
		counts: counts, rand: rand.New(rand.NewPCG(seed, 0x6e6574)), base: 200 * time.Microsecond,
		routes: map[route]*weather{}, reasons: map[route]map[string]weather{}, waiting: map[route][]func(){},
		listeners: map[string]*listener{}, transport: map[string]*raftTransport{}, pipes: map[*pipe]struct{}{},
		hosts: map[string]string{}, troubled: map[string]time.Time{},
	}
}

// address gives a machine its IP address.
func (n *Network) address(host string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ip, known := range n.hosts {
		if known == host {
			return ip
		}
	}
	ip := fmt.Sprintf("10.0.0.%d", len(n.hosts)+1)
	n.hosts[ip] = host
	return ip
}

// weatherLocked returns the weather of a route.
func (n *Network) weatherLocked(r route) weather {
	if w := n.routes[r]; w != nil && r.from != r.to {
		return *w
	}
	return weather{}
}

// delayLocked draws how long something takes on a route.
func (n *Network) delayLocked(r route, w weather) time.Duration {
	if r.from == r.to {
		return 10 * time.Microsecond
	}
	d := n.base + time.Duration(n.rand.ExpFloat64()*float64(n.base)/2)
	if w.slow > 0 {
		d += w.slow + time.Duration(n.rand.Int64N(int64(w.slow)))
	}
	return d
}

// Disturb puts weather on a route for a reason; several reasons add up.
func (n *Network) Disturb(reason string, r route, w weather) {
	n.change(func() {
		if n.reasons[r] == nil {
			n.reasons[r] = map[string]weather{}
		}
		n.reasons[r][reason] = w
		n.recomputeLocked(r)
	})
}

// Calm takes away all that was put on routes for a reason.
func (n *Network) Calm(reason string) {
	n.change(func() {
		for r, reasons := range n.reasons {
			if _, ok := reasons[reason]; ok {
				delete(reasons, reason)
				n.recomputeLocked(r)
			}
		}
	})
}

func (n *Network) recomputeLocked(r route) {
	var sum weather
	for _, w := range n.reasons[r] {
		sum.cut, sum.held = sum.cut || w.cut, sum.held || w.held
		sum.slow, sum.lateBy = max(sum.slow, w.slow), max(sum.lateBy, w.lateBy)
		sum.loss, sum.twice, sum.late = max(sum.loss, w.loss), max(sum.twice, w.twice), max(sum.late, w.late)
	}
	n.routes[r] = &sum
}

// change runs f and lets everything go on that may go on afterwards.
func (n *Network) change(f func()) {
	n.mu.Lock()
	f()
	var due []func()
	for r, waiting := range n.waiting {
		if w := n.weatherLocked(r); w.cut || w.held {
			continue
		}
		due = append(due, waiting...)
		delete(n.waiting, r)
	}
	pipes := make([]*pipe, 0, len(n.pipes))
	for p := range n.pipes {
		pipes = append(pipes, p)
	}
	n.mu.Unlock()
	for _, f := range due {
		time.AfterFunc(n.base, f)
	}
	for _, p := range pipes {
		p.pump()
	}
}

// open reports whether a route carries anything now.
func (n *Network) open(r route) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.weatherLocked(r)
	return !w.cut && !w.held
}

// send brings one message over a route: deliver runs when it arrives, which is
// never for some, and twice for others.
func (n *Network) send(r route, deliver func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.weatherLocked(r)
	n.counts.Messages.Add(1)
	switch {
	case w.held, w.cut && n.rand.IntN(2) == 0:
		if len(n.waiting[r]) < maxWaiting {
			n.waiting[r] = append(n.waiting[r], deliver)
		}
		return
	case w.cut, w.loss > 0 && n.rand.Float64() < w.loss:
		n.counts.Lost.Add(1)
		return
	}
	d := n.delayLocked(r, w)
	if w.late > 0 && n.rand.Float64() < w.late {
		n.counts.Late.Add(1)
		d += time.Duration(n.rand.Int64N(int64(w.lateBy) + 1))
	}
	time.AfterFunc(d, deliver)
	if w.twice > 0 && n.rand.Float64() < w.twice {
		n.counts.Twice.Add(1)
		time.AfterFunc(d+n.delayLocked(r, w)*time.Duration(1+n.rand.IntN(50)), deliver)
	}
}

// maxWaiting bounds the messages that wait for one cut to heal.
const maxWaiting = 256

// crash breaks all connections of a machine and forgets its listeners. What it
// had sent still arrives.
func (n *Network) crash(host string) {
	n.mu.Lock()
	var broken []*pipe
	for p := range n.pipes {
		if p.route.from == host || p.route.to == host {
			broken = append(broken, p)
		}
	}
	var gone []*listener
	for at, l := range n.listeners {
		if l.host == host {
			gone = append(gone, l)
			delete(n.listeners, at)
		}
	}
	t := n.transport[host]
	delete(n.transport, host)
	n.mu.Unlock()
	for _, p := range broken {
		p.breakOff(errGone)
	}
	for _, l := range gone {
		_ = l.Close()
	}
	if t != nil {
		_ = t.Close()
	}
}

func (n *Network) raftAt(host string) *raftTransport {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.transport[host]
}

// pipe is one direction of a connection: bytes in order, each chunk not before
// its time, and none while the route is cut or held.
type pipe struct {
	net   *Network
	route route

	mu       sync.Mutex
	cond     sync.Cond
	flying   []chunk
	last     time.Time
	ready    []byte
	ended    bool
	deaf     bool // nobody reads any more
	broken   error
	deadline time.Time
	alarm    *time.Timer
}

type chunk struct {
	at   time.Time
	data []byte // nil for the end
}

func (n *Network) newPipe(r route) *pipe {
	p := &pipe{net: n, route: r}
	p.cond.L = &p.mu
	n.mu.Lock()
	n.pipes[p] = struct{}{}
	n.mu.Unlock()
	return p
}

// write sends a copy of data, or the end for nil.
func (p *pipe) write(data []byte) error {
	p.net.mu.Lock()
	d := p.net.delayLocked(p.route, p.net.weatherLocked(p.route))
	p.net.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != nil || p.deaf {
		return p.broken
	}
	at := time.Now().Add(d)
	if at.Before(p.last) {
		at = p.last
	}
	p.last = at
	p.flying = append(p.flying, chunk{at: at, data: append([]byte(nil), data...)})
	if data == nil {
		p.flying[len(p.flying)-1].data = nil
	}
	time.AfterFunc(time.Until(at), p.pump)
	return nil
}

// pump lets arrive what is due.
func (p *pipe) pump() {
	if !p.net.open(p.route) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for len(p.flying) > 0 && !p.flying[0].at.After(now) {
		if data := p.flying[0].data; data != nil {
			p.ready = append(p.ready, data...)
		} else {
			p.ended = true
		}
		p.flying[0] = chunk{}
		p.flying = p.flying[1:]
	}
	p.cond.Broadcast()
}

func (p *pipe) read(into []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.broken != nil:
			return 0, p.broken
		case p.deaf:
			return 0, net.ErrClosed
		case len(p.ready) > 0:
			k := copy(into, p.ready)
			if p.ready = p.ready[k:]; len(p.ready) == 0 {
				p.ready = nil
			}
			return k, nil
		case p.ended:
			return 0, io.EOF
		case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
			return 0, errDeadline
		}
		p.cond.Wait()
	}
}

func (p *pipe) setDeadline(t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	if p.alarm != nil {
		p.alarm.Stop()
		p.alarm = nil
	}
	if !t.IsZero() {
		p.alarm = time.AfterFunc(time.Until(t), p.cond.Broadcast)
	}
	p.cond.Broadcast()
}

// breakOff ends the pipe at once for both sides.
func (p *pipe) breakOff(err error) {
	p.stop(func() {
		if p.broken == nil {
			p.broken = err
		}
	})
}

// abandon ends the pipe for its reader. What is written is lost, and its writer
// does not know: a write that fails while reads go on waiting is what no network
// does, and gRPC tries again without a pause then.
func (p *pipe) abandon() { p.stop(func() { p.deaf = true }) }

func (p *pipe) stop(mark func()) {
	p.net.mu.Lock()
	delete(p.net.pipes, p)
	p.net.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	mark()
	if p.alarm != nil {
		p.alarm.Stop()
	}
	p.flying = nil
	p.cond.Broadcast()
}
