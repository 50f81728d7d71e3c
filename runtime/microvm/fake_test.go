package microvm_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/guest"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

// fakeDriver starts machines that are goroutines of the test: the real conversation
// with the real guest side, without a virtual machine around it.
type fakeDriver struct {
	t   testing.TB
	key atomic.Pointer[string]
	// serve is what runs in a machine instead of the guest's side, when set.
	serve func(conn *channel.Conn)
	// failing makes the next starts fail.
	failClones, failBoots atomic.Int32
	boots, clones, copies atomic.Int32
	live                  sync.WaitGroup
	latest                atomic.Pointer[fakeMachine]
}

// last returns the machine that was started last.
func (d *fakeDriver) last() *fakeMachine { return d.latest.Load() }

func newFakeDriver(t testing.TB) *fakeDriver {
	d := &fakeDriver{t: t}
	t.TempDir() // its removal comes after the runtime's end, which is registered later
	key := "fake"
	d.key.Store(&key)
	return d
}

func (d *fakeDriver) Key() string { return *d.key.Load() }

func (d *fakeDriver) Close() error {
	d.live.Wait()
	return nil
}

func (d *fakeDriver) Boot(context.Context, uint64) (vmm.Machine, error) {
	d.boots.Add(1)
	if d.failBoots.Add(-1) >= 0 {
		return nil, errors.New("it does not boot")
	}
	return d.start(nil), nil
}

// fakeTemplate is what the host had sent to a machine when it was copied.
type fakeTemplate struct{ frames []channel.Frame }

func (t *fakeTemplate) Bytes() uint64 { return 1 << 20 }
func (t *fakeTemplate) Close() error  { return nil }

func (d *fakeDriver) Copy(_ context.Context, m vmm.Machine) (vmm.Template, error) {
	f, ok := m.(*fakeMachine)
	if !ok {
		return nil, errors.New("not one of mine")
	}
	f.Kill()
	d.copies.Add(1)
	return &fakeTemplate{frames: f.sent()}, nil
}

func (d *fakeDriver) Clone(_ context.Context, t vmm.Template) (vmm.Machine, error) {
	d.clones.Add(1)
	if d.failClones.Add(-1) >= 0 {
		return nil, errors.New("it cannot be cloned")
	}
	f, ok := t.(*fakeTemplate)
	if !ok {
		return nil, errors.New("not one of mine")
	}
	return d.start(f.frames), nil
}

func (d *fakeDriver) Fork(ctx context.Context, t vmm.Template) (vmm.Machine, error) {
	return d.Clone(ctx, t)
}

// fakeMachine stands between host and guest and remembers what makes a template.
type fakeMachine struct {
	driver   *fakeDriver
	host     net.Conn // the host's end
	inner    net.Conn // our end towards the host
	toGuest  net.Conn
	clone    bool
	resume   chan struct{}
	once     sync.Once
	ended    chan struct{}
	killOnce sync.Once
	// replayed yields one value for each answer to what was replayed.
	replayed chan struct{}
	stopped  chan struct{}

	mu     sync.Mutex
	frames []channel.Frame
	ending vmm.Ending
}

// start starts a machine; frames are replayed to it first, and their answers dropped.
func (d *fakeDriver) start(frames []channel.Frame) *fakeMachine {
	host, inner := net.Pipe()
	toGuest, guestEnd := net.Pipe()
	m := &fakeMachine{
		driver: d, host: host, inner: inner, toGuest: toGuest, clone: frames != nil,
		replayed: make(chan struct{}, 8), stopped: make(chan struct{}),
		resume: make(chan struct{}), ended: make(chan struct{}), frames: frames,
		ending: vmm.Ending{Message: "killed"},
	}
	if !m.clone {
		close(m.resume)
	}
	d.live.Add(1)
	d.latest.Store(m)
	var work sync.WaitGroup
	work.Go(func() {
		defer m.stop()
		if d.serve != nil {
			d.serve(channel.New(guestEnd, channel.MaxFromHost))
			return
		}
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		_ = guest.Serve(context.Background(), guestEnd, fakeHardware{}, d.t.TempDir(), log)
	})
	up := channel.New(toGuest, channel.MaxFromGuest)
	work.Go(func() {
		defer m.stop()
		m.replay(up)
		<-m.resume
		m.pump(inner, up)
	})
	work.Go(func() {
		defer m.stop()
		m.down(up)
	})
	go func() {
		defer d.live.Done()
		work.Wait()
		_ = host.Close()
		close(m.ended)
	}()
	return m
}

// replay brings a clone to where its template was.
func (m *fakeMachine) replay(up *channel.Conn) {
	if !m.clone {
		return
	}
	for _, f := range m.frames {
		if up.Send(f.Kind, f.ID|1<<63, f.Payload) != nil {
			return
		}
		if f.Kind == channel.Warm {
			select {
			case <-m.replayed:
			case <-m.stopped:
				return
			}
		}
	}
}

// pump takes the host's frames to the guest.
func (m *fakeMachine) pump(inner net.Conn, up *channel.Conn) {
	in := channel.New(inner, channel.MaxFromHost)
	for {
		f, err := in.Receive()
		if err != nil {
			return
		}
		if f.Kind == channel.Load || f.Kind == channel.Warm {
			m.mu.Lock()
			m.frames = append(slices.Clip(m.frames), f)
			m.mu.Unlock()
		}
		if up.Send(f.Kind, f.ID, f.Payload) != nil {
			return
		}
	}
}

// down takes the guest's frames to the host, but for those that belong to the replay.
func (m *fakeMachine) down(up *channel.Conn) {
	out := channel.New(m.inner, channel.MaxFromGuest)
	for {
		f, err := up.Receive()
		if err != nil {
			return
		}
		if f.ID&(1<<63) != 0 {
			m.replayed <- struct{}{}
			continue
		}
		if m.clone && f.Kind == channel.Ready {
			continue
		}
		if out.Send(f.Kind, f.ID, f.Payload) != nil {
			return
		}
	}
}

func (m *fakeMachine) sent() []channel.Frame {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.frames == nil {
		return []channel.Frame{}
	}
	return m.frames
}

func (m *fakeMachine) stop() {
	m.killOnce.Do(func() {
		close(m.stopped)
		_ = m.inner.Close()
		_ = m.toGuest.Close()
		m.once.Do(func() {
			if m.clone {
				close(m.resume)
			}
		})
	})
}

// die ends the machine as if by itself.
func (m *fakeMachine) die(e vmm.Ending) {
	m.mu.Lock()
	m.ending = e
	m.mu.Unlock()
	m.stop()
}

func (m *fakeMachine) Channel() io.ReadWriter { return m.host }

func (m *fakeMachine) Resume(context.Context) error {
	m.once.Do(func() {
		if m.clone {
			close(m.resume)
		}
	})
	return nil
}

func (m *fakeMachine) Pause(context.Context) error { return nil }

func (m *fakeMachine) Kill() {
	m.stop()
	<-m.ended
}

func (m *fakeMachine) Ended() <-chan struct{} { return m.ended }

func (m *fakeMachine) Ending() vmm.Ending {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ending
}

func (m *fakeMachine) Process() int { return os.Getpid() }

// fakeHardware leaves the machine of the test as it is.
type fakeHardware struct{}

func (fakeHardware) Greet(channel.Greeting) error { return nil }
func (fakeHardware) SetTime(time.Time)            {}
func (fakeHardware) Scrub()                       {}
func (fakeHardware) Settle()                      {}
func (fakeHardware) Budget(uint64)                {}
