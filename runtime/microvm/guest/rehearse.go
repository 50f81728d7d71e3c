package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

const (
	// rehearsalTimeout bounds guest code in a rehearsal.
	rehearsalTimeout = time.Second
	// playBytes is the memory of the play.
	playBytes = 64 << 10
)

// play is a reactor that calls out once and answers with its input.
var play = []byte("\x00asm\x01\x00\x00\x00" + // header
	"\x01\x14\x03\x60\x04\x7f\x7f\x7f\x7f\x01\x7e\x60\x01\x7f\x01\x7f\x60\x02\x7f\x7f\x01\x7e" + // types
	"\x02\x1c\x01\x14wasmatrix:context/v1\x03get\x00\x00" + // imports
	"\x03\x03\x02\x01\x02" + // functions
	"\x05\x03\x01\x00\x01" + // memory: one page
	"\x07\x32\x03\x06memory\x02\x00\x0fwasmatrix_alloc\x00\x01\x13wasmatrix_on_invoke\x00\x02" + // exports
	"\x0a\x20\x02" + // code
	"\x05\x00\x41\x80\x08\x0b" + // alloc: 1024
	"\x18\x00\x41\x00\x41\x00\x41\x00\x41\xc0\x00\x10\x00\x1a" + // on_invoke: get(0, 0, 0, 64),
	"\x20\x00\xad\x42\x20\x86\x20\x01\xad\x84\x0b") // pointer<<32 | length

// settle makes a machine that has booted fit to be copied: the play is compiled and
// was performed once, so that what it needs is in the memory of all copies.
func (s *server) settle(ctx context.Context) error {
	if err := s.perform(ctx); err != nil {
		return err
	}
	s.machine.Settle()
	s.machine.Scrub()
	return nil
}

// rehearse goes through a start and a call that nobody sees, so that all code on the
// way has been fetched, and translated where the processor is emulated. The module
// of spec is initialised in a wasm instance of its own, which is thrown away: what
// that has drawn from the machine's random numbers goes with it. Its capability
// calls are refused and its output is dropped in here. What fails in the module is
// for its next instance to tell.
func (s *server) rehearse(ctx context.Context, payload []byte) error {
	spec, err := channel.DecodeSpec(payload)
	if err != nil {
		return err
	}
	s.budget(spec)
	if err := s.perform(ctx); err != nil {
		return err
	}
	a := s.audience(ctx)
	spec.Timeout = rehearsalTimeout
	if command, err := a.prepare(spec); err == nil && !command {
		_, _ = a.ask(channel.Start, channel.Invocation{Now: time.Now()}.Encode()) // see above
	}
	a.leave()
	// The slot that the rehearsal took is for the instance.
	return s.runtime.Warm(ctx, spec)
}

// perform goes through the start and a call of the play.
func (s *server) perform(ctx context.Context) error {
	sum := sha256.Sum256(play)
	a := s.audience(ctx)
	defer a.leave()
	if err := a.conn.Send(channel.Load, 0, play); err != nil {
		return err
	}
	_, err := a.prepare(runtime.Spec{
		InstanceID: "rehearsal", Digest: "sha256:" + hex.EncodeToString(sum[:]), MemoryBytes: playBytes, Timeout: rehearsalTimeout, Concurrency: 1,
	})
	if err != nil {
		return err
	}
	for _, step := range []channel.Kind{channel.Start, channel.Invoke} {
		if _, err := a.ask(step, channel.Invocation{Handler: runtime.HandlerInvoke, Now: time.Now()}.Encode(), []byte("x")); err != nil {
			return err
		}
	}
	return nil
}

// scenery stands for the machine in a rehearsal, which must not change it.
type scenery struct{}

func (scenery) Greet(channel.Greeting) error { return nil }
func (scenery) SetTime(time.Time)            {}
func (scenery) Settle()                      {}
func (scenery) Scrub()                       {}
func (scenery) Budget(uint64)                {}

// audience is the host's side of a rehearsal, and the server that it is played to.
type audience struct {
	conn   *channel.Conn
	end    net.Conn
	server *server
	cancel context.CancelFunc
	last   uint64
	done   chan struct{}
}

// audience begins a rehearsal; leave ends it.
func (s *server) audience(ctx context.Context) *audience {
	ours, theirs := net.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	a := &audience{
		conn: channel.New(ours, channel.MaxFromGuest), end: ours, cancel: cancel, done: make(chan struct{}),
		server: newServer(ctx, theirs, s.runtime, scenery{}, s.dir, slog.New(slog.DiscardHandler)),
	}
	go func() {
		defer close(a.done)
		_ = a.server.receive(ctx) // it ends with leave
	}()
	return a
}

func (a *audience) prepare(spec runtime.Spec) (command bool, err error) {
	answer, err := a.ask(channel.Prepare, channel.EncodeSpec(spec))
	if err != nil {
		return false, err
	}
	_, shape, err := channel.DecodeNumber(answer)
	return len(shape) > 0, err
}

// ask carries out an exchange. It refuses the guest's calls meanwhile.
func (a *audience) ask(kind channel.Kind, parts ...[]byte) ([]byte, error) {
	a.last++
	if err := a.conn.Send(kind, a.last, parts...); err != nil {
		return nil, err
	}
	for {
		f, err := a.conn.Receive()
		if err != nil {
			return nil, err
		}
		switch {
		case f.Kind == channel.Call:
			err = a.conn.Send(channel.Refusal, f.ID, channel.EncodeRefusal(&runtime.Failure{Code: 1}))
		case f.Kind == channel.Output:
			err = a.conn.Send(channel.Written, f.ID)
		case f.ID == a.last && f.Kind == channel.Done:
			return f.Payload, nil
		case f.ID == a.last && f.Kind == channel.Failed:
			failure, err := channel.DecodeFailure(f.Payload)
			return nil, errors.Join(failure, err)
		}
		if err != nil {
			return nil, err
		}
	}
}

// leave ends the rehearsal and frees the wasm instance.
func (a *audience) leave() {
	a.cancel()
	_ = a.end.Close() // nothing was buffered
	<-a.done
	a.server.close()
}
