package microvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// entropyBytes is how much entropy a machine gets.
const entropyBytes = 64

// errLost: the machine has ended.
var errLost = errors.New("the virtual machine has ended")

// owner is told what a machine says of itself. Its methods must not block; an
// error of one ends the machine.
type owner interface {
	called(id uint64, payload []byte) error
	abandoned(id uint64)
	wrote(id uint64, payload []byte) error
	ended(payload []byte) error
	grown(payload []byte) error
	// lost: the machine has ended, in this way.
	lost(ending vmm.Ending)
}

// link is the conversation with one machine.
type link struct {
	machine vmm.Machine
	fleet   *fleet
	conn    *channel.Conn
	ready   chan struct{}

	mu      sync.Mutex
	next    uint64
	replies map[uint64]chan channel.Frame
	owner   owner
	// broken is why the host ended the machine, "" when it did not.
	broken string
	// over is set when no answers come any more.
	over bool
}

// newLink begins the conversation with a machine; it ends with the machine.
func newLink(m vmm.Machine, f *fleet) *link {
	l := &link{
		machine: m, fleet: f, conn: channel.New(m.Channel(), channel.MaxFromGuest),
		ready: make(chan struct{}), replies: map[uint64]chan channel.Frame{},
	}
	f.set(l, starting)
	go l.receive()
	return l
}

func (l *link) receive() {
	for {
		f, err := l.conn.Receive()
		if err == nil {
			err = l.take(f)
		}
		if err != nil {
			if errors.Is(err, channel.ErrMalformed) {
				l.breakOff(err.Error())
			}
			break
		}
	}
	// Without its channel a machine is of no use.
	l.machine.Kill()
	ending := l.machine.Ending()
	l.fleet.remove(l)
	l.mu.Lock()
	l.over = true
	if l.broken != "" {
		ending = vmm.Ending{Message: l.broken}
	}
	o := l.owner
	for _, r := range l.replies {
		close(r)
	}
	l.replies = nil
	l.mu.Unlock()
	if o != nil {
		o.lost(ending)
	}
}

// breakOff ends the machine for a reason.
func (l *link) breakOff(reason string) {
	l.mu.Lock()
	if l.broken == "" {
		l.broken = reason
	}
	l.mu.Unlock()
	l.machine.Kill()
}

// take handles one frame; it never waits.
func (l *link) take(f channel.Frame) error {
	l.mu.Lock()
	o := l.owner
	reply := l.replies[f.ID]
	if f.Kind == channel.Done || f.Kind == channel.Failed {
		delete(l.replies, f.ID)
	}
	l.mu.Unlock()
	unexpected := fmt.Errorf("%w: kind %d", channel.ErrMalformed, f.Kind)
	switch f.Kind {
	case channel.Ready:
		select {
		case <-l.ready:
			return unexpected
		default:
			close(l.ready)
			return nil
		}
	case channel.Done, channel.Failed:
		if reply != nil { // else nobody waits any more
			reply <- f
		}
		return nil
	default:
	}
	if o == nil {
		return unexpected
	}
	switch f.Kind {
	case channel.Call:
		return o.called(f.ID, f.Payload)
	case channel.Abandon:
		o.abandoned(f.ID)
		return nil
	case channel.Output:
		return o.wrote(f.ID, f.Payload)
	case channel.Ended:
		return o.ended(f.Payload)
	case channel.Usage:
		return o.grown(f.Payload)
	default:
		return unexpected
	}
}

// attach sets who is told what the machine says. It fails when the machine has ended.
func (l *link) attach(o owner) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return errLost
	}
	l.owner = o
	return nil
}

// pending is an exchange that waits for its end.
type pending struct {
	id    uint64
	reply chan channel.Frame
}

// open makes the id of an exchange.
func (l *link) open() (pending, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return pending{}, errLost
	}
	l.next++
	p := pending{id: l.next, reply: make(chan channel.Frame, 1)}
	l.replies[p.id] = p.reply
	return p, nil
}

// close gives up an exchange.
func (l *link) close(p pending) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.replies, p.id)
}

// finish waits for the end of an exchange that was sent: the payload of Done, or
// the *channel.Failure of the guest.
func (l *link) finish(ctx context.Context, p pending) ([]byte, error) {
	select {
	case f, ok := <-p.reply:
		switch {
		case !ok:
			return nil, errLost
		case f.Kind == channel.Failed:
			failure, err := channel.DecodeFailure(f.Payload)
			if err != nil {
				l.breakOff(err.Error())
				return nil, err
			}
			return nil, failure
		}
		return f.Payload, nil
	case <-ctx.Done():
		l.close(p)
		return nil, ctx.Err()
	}
}

// ask carries out an exchange.
func (l *link) ask(ctx context.Context, kind channel.Kind, parts ...[]byte) ([]byte, error) {
	p, err := l.open()
	if err != nil {
		return nil, err
	}
	if err := l.conn.Send(kind, p.id, parts...); err != nil {
		l.close(p)
		return nil, fmt.Errorf("%w: %w", errLost, err)
	}
	return l.finish(ctx, p)
}

// booted waits until a machine that was booted is ready.
func (l *link) booted(ctx context.Context) error {
	select {
	case <-l.ready:
		return nil
	case <-l.machine.Ended():
		return fmt.Errorf("%w: %s", errLost, l.machine.Ending().Message)
	case <-ctx.Done():
		return fmt.Errorf("waiting for the virtual machine to boot: %w", ctx.Err())
	}
}

// greet makes a machine unlike all others.
func (l *link) greet(ctx context.Context) error {
	entropy := make([]byte, entropyBytes)
	if _, err := rand.Read(entropy); err != nil {
		return fmt.Errorf("taking entropy: %w", err)
	}
	if _, err := l.ask(ctx, channel.Hello, channel.Greeting{Now: time.Now(), Entropy: entropy}.Encode()); err != nil {
		return fmt.Errorf("greeting the virtual machine: %w", err)
	}
	return nil
}

// load sends a module.
func (l *link) load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading the module: %w", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	piece := make([]byte, channel.Piece)
	for {
		n, err := io.ReadFull(f, piece)
		// An empty module travels too, so that the guest refuses it.
		if sendErr := l.conn.Send(channel.Load, 0, piece[:n]); sendErr != nil {
			return fmt.Errorf("%w: %w", errLost, sendErr)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("reading the module: %w", err)
		}
	}
}
