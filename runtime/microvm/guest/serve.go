package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
)

// idleModules is how many modules stay compiled: that of the instance and the one
// for rehearsals.
const idleModules = 2

// Machine is what serving changes of the machine around it.
type Machine interface {
	// Greet sets the clock and seeds the random numbers, so that no two copies of
	// a machine share them.
	Greet(g channel.Greeting) error
	// SetTime corrects the clock if it has gone wrong.
	SetTime(now time.Time)
	// Settle gives back all memory that is not needed, before the machine is copied.
	Settle()
	// Scrub makes sure that free memory holds nothing of what the boot left there.
	Scrub()
	// Budget tells the machine how much memory linear memories may take, so that
	// the rest of the process keeps clear of it.
	Budget(linear uint64)
}

// server executes one instance.
type server struct {
	conn    *channel.Conn
	machine Machine
	log     *slog.Logger
	runtime *wasm.Runtime
	// dir is for the module's file; module is what was loaded since the last
	// exchange that took it. Both belong to receive.
	dir    string
	module *moduleFile
	usage  usage

	// answering is held for reading while an exchange is under way, and for
	// writing by Ended, which comes after the answers of all of them.
	answering sync.RWMutex
	work      sync.WaitGroup
	// over ends when the channel does; the instance then has nobody to serve.
	over context.Context //nolint:containedctx // it is the life of the channel

	mu       sync.Mutex
	instance runtime.Instance
	// invocations holds what ends the waiting of the Invoke with an id.
	invocations map[uint64]context.CancelFunc
	// replies holds where the answer to a Call or an Output goes.
	replies map[uint64]chan channel.Frame
	next    uint64
}

// Serve executes what the host asks for until the stream ends, and returns why it
// ended: nil at its orderly end. It keeps the module in dir while it is compiled.
func Serve(ctx context.Context, stream io.ReadWriter, machine Machine, dir string, log *slog.Logger) error {
	rt, err := wasm.New(ctx, wasm.Config{Logger: log, IdleModules: idleModules, SingleUse: true})
	if err != nil {
		return err
	}
	over, cancel := context.WithCancel(ctx)
	s := newServer(over, stream, rt, machine, dir, log)
	defer func() { err = errors.Join(err, rt.Close(ctx)) }()
	if err := s.conn.Send(channel.Ready, 0); err != nil {
		cancel()
		return err
	}
	err = s.receive(ctx)
	cancel()
	s.close()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// newServer makes a server that serves over a stream until over ends.
func newServer(over context.Context, stream io.ReadWriter, rt *wasm.Runtime, machine Machine, dir string, log *slog.Logger) *server {
	conn := channel.New(stream, channel.MaxFromHost)
	return &server{
		conn: conn, usage: usage{conn: conn}, machine: machine, log: log, runtime: rt, dir: dir, over: over,
		module: &moduleFile{}, invocations: map[uint64]context.CancelFunc{}, replies: map[uint64]chan channel.Frame{},
	}
}

// close ends the instance and waits for all that goes on; over has ended.
func (s *server) close() {
	s.mu.Lock()
	i := s.instance
	s.mu.Unlock()
	if i != nil {
		_ = i.Close(context.WithoutCancel(s.over)) // it does not fail
	}
	s.work.Wait()
}

// receive takes frames until the stream ends. Nothing in it waits for a guest.
func (s *server) receive(ctx context.Context) error {
	for {
		f, err := s.conn.Receive()
		if err == nil {
			err = s.dispatch(ctx, f)
		}
		if err != nil {
			return err
		}
	}
}

func (s *server) dispatch(ctx context.Context, f channel.Frame) error {
	switch f.Kind {
	case channel.Hello:
		g, err := channel.DecodeGreeting(f.Payload)
		if err == nil {
			err = s.machine.Greet(g)
		}
		return s.answer(f.ID, nil, err)
	case channel.Load:
		return s.module.add(s.dir, f.Payload)
	case channel.Settle, channel.Prepare, channel.Warm, channel.Rehearse, channel.Start, channel.Invoke:
		s.begin(ctx, f)
	case channel.Stop:
		grace, _, err := channel.DecodeNumber(f.Payload)
		if err != nil {
			return err
		}
		s.stop(ctx, time.Duration(grace))
	case channel.Cancel:
		s.mu.Lock()
		cancel := s.invocations[f.ID]
		s.mu.Unlock()
		if cancel != nil {
			cancel()
		}
	case channel.Answer, channel.Refusal, channel.Written:
		s.mu.Lock()
		reply := s.replies[f.ID]
		delete(s.replies, f.ID)
		s.mu.Unlock()
		if reply != nil {
			reply <- f
		}
	default:
		return fmt.Errorf("%w: kind %d from the host", channel.ErrMalformed, f.Kind)
	}
	return nil
}

// begin carries out an exchange beside the others. What ends the waiting of an
// Invoke is known before the next frame, which may be its Cancel.
func (s *server) begin(ctx context.Context, f channel.Frame) {
	module := s.module
	if f.Kind == channel.Prepare || f.Kind == channel.Warm {
		s.module = &moduleFile{}
	}
	ctx, cancel := context.WithCancel(ctx)
	s.mu.Lock()
	s.invocations[f.ID] = cancel
	s.mu.Unlock()
	s.work.Go(func() {
		s.answering.RLock()
		defer s.answering.RUnlock()
		var answer []byte
		var err error
		switch f.Kind {
		case channel.Prepare:
			answer, err = s.prepare(ctx, module, f.Payload)
		case channel.Warm:
			err = s.warm(ctx, module, f.Payload)
		case channel.Settle:
			err = s.settle(ctx)
		case channel.Rehearse:
			err = s.rehearse(ctx, f.Payload)
		case channel.Start:
			err = s.start(ctx, f)
		default:
			answer, err = s.invoke(ctx, f)
		}
		s.mu.Lock()
		delete(s.invocations, f.ID)
		s.mu.Unlock()
		cancel()
		if err := s.answer(f.ID, answer, err); err != nil {
			s.log.Error("answering the host", "error", err)
		}
	})
}

// answer ends an exchange.
func (s *server) answer(id uint64, answer []byte, err error) error {
	if err != nil {
		return s.conn.Send(channel.Failed, id, channel.EncodeFailure(err))
	}
	return s.conn.Send(channel.Done, id, channel.EncodeNumber(s.memory()), answer)
}

// memory returns the size of the instance's linear memories.
func (s *server) memory() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.instance == nil {
		return 0
	}
	return s.instance.Usage().MemoryBytes
}

// budget tells the machine what the instance may take.
func (s *server) budget(spec runtime.Spec) {
	s.machine.Budget(spec.MemoryBytes * uint64(max(spec.Concurrency, 1)))
}

func (s *server) warm(ctx context.Context, module *moduleFile, payload []byte) error {
	spec, err := channel.DecodeSpec(payload)
	if err != nil {
		return err
	}
	s.budget(spec)
	spec.ModulePath = module.path()
	if err = errors.Join(s.runtime.Warm(ctx, spec), module.remove()); err != nil {
		return err
	}
	s.machine.Settle()
	// The play once more: what the heap and the stacks need again after the collection
	// is in the template then, and no clone has to fetch it.
	return s.perform(ctx)
}

func (s *server) prepare(ctx context.Context, module *moduleFile, payload []byte) (shape []byte, err error) {
	spec, err := channel.DecodeSpec(payload)
	if err != nil {
		return nil, err
	}
	s.budget(spec)
	spec.ModulePath = module.path()
	spec.Stdout = &output{server: s, stream: channel.Stdout}
	spec.Stderr = &output{server: s, stream: channel.Stderr}
	i, err := s.runtime.Prepare(ctx, spec, &host{server: s})
	if err = errors.Join(err, module.remove()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.instance != nil {
		return nil, errors.Join(errors.New("this machine has its instance already"), i.Close(ctx))
	}
	s.instance = i
	s.work.Go(func() { s.announceEnd(ctx, i) })
	if c, ok := i.(interface{ Command() bool }); ok && c.Command() {
		shape = []byte{channel.IsCommand}
	}
	return shape, nil
}

// announceEnd tells the host how the instance ended, after all answers.
func (s *server) announceEnd(ctx context.Context, i runtime.Instance) {
	ctx = context.WithoutCancel(ctx)
	exit, err := i.Wait(ctx)
	s.usage.end()
	s.answering.Lock()
	defer s.answering.Unlock()
	if err == nil {
		err = s.conn.Send(channel.Ended, 0, channel.EncodeExit(exit))
	}
	if err != nil && s.over.Err() == nil {
		s.log.Error("telling the host how the instance ended", "error", err)
	}
}

// prepared returns the instance.
func (s *server) prepared() (runtime.Instance, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.instance == nil {
		return nil, fmt.Errorf("nothing was prepared: %w", runtime.ErrNotRunning)
	}
	return s.instance, nil
}

// invocationContext is the context of one exchange: it ends with the caller's
// patience, and calls out carry its id.
func (s *server) invocationContext(ctx context.Context, id uint64, in channel.Invocation) (context.Context, context.CancelFunc) {
	s.machine.SetTime(in.Now)
	ctx = context.WithValue(ctx, invocationKey{}, id)
	if in.CorrelationID != "" {
		ctx = correlation.With(ctx, in.CorrelationID)
	}
	if in.Remaining > 0 {
		return context.WithTimeout(ctx, in.Remaining)
	}
	return context.WithCancel(ctx)
}

func (s *server) start(ctx context.Context, f channel.Frame) error {
	i, err := s.prepared()
	if err != nil {
		return err
	}
	in, err := channel.DecodeInvocation(f.Payload)
	if err != nil {
		return err
	}
	// The run of a command outlasts its Start, and so must its context.
	ctx, cancel := s.invocationContext(context.WithoutCancel(ctx), f.ID, in)
	context.AfterFunc(s.over, cancel)
	s.usage.begin(i)
	return i.Start(ctx)
}

func (s *server) invoke(ctx context.Context, f channel.Frame) ([]byte, error) {
	i, err := s.prepared()
	if err != nil {
		return nil, err
	}
	in, err := channel.DecodeInvocation(f.Payload)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.invocationContext(ctx, f.ID, in)
	defer cancel()
	return i.Invoke(ctx, in.Handler, in.Input)
}

// stop ends the instance; announceEnd tells the host.
func (s *server) stop(ctx context.Context, grace time.Duration) {
	i, err := s.prepared()
	if err != nil {
		return
	}
	s.work.Go(func() {
		if err := i.Stop(ctx, grace); err != nil {
			s.log.Error("stopping the instance", "error", err)
		}
	})
}
