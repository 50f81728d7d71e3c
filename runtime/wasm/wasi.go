package wasm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"io"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"

	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// buildWASI adds WASI preview 1. poll_oneoff is ours: wazero's sleeps without
// looking at the context and allocates for as many subscriptions as a guest claims.
func buildWASI(r wazero.Runtime) wazero.HostModuleBuilder {
	b := r.NewHostModuleBuilder(guestabi.WASI)
	wasi_snapshot_preview1.NewFunctionExporter().ExportFunctions(b)
	exportStrings(b)
	i32 := api.ValueTypeI32
	b.NewFunctionBuilder().
		WithGoModuleFunction(api.GoModuleFunc(pollOneoff), []api.ValueType{i32, i32, i32, i32}, []api.ValueType{i32}).
		Export("poll_oneoff")
	return b
}

// moduleConfig is what a slot sees of the world through WASI: standard streams,
// clocks and random numbers, each of the instance that the slot belongs to when
// the guest asks; no file, no socket. For arguments and environment see exportStrings.
func (s *slot) moduleConfig() wazero.ModuleConfig {
	return wazero.NewModuleConfig().
		WithName("").
		WithStartFunctions().
		WithStdin(&guestReader{slot: s}).
		WithStdout(&guestWriter{slot: s, to: func(spec *runtime.Spec) io.Writer { return spec.Stdout }}).
		WithStderr(&guestWriter{slot: s, to: func(spec *runtime.Spec) io.Writer { return spec.Stderr }}).
		WithRandSource(guestRandom{s}).
		WithWalltime(walltime, sys.ClockResolution(time.Microsecond)).
		WithNanotime(func() int64 { return s.instance.nanotime() }, 1).
		WithNanosleep(func(ns int64) { s.sleep(time.Duration(ns)) })
}

// guestReader is a guest's standard input; each slot reads it from its beginning.
type guestReader struct {
	slot *slot
	at   int
}

// Read copies what comes next.
func (r *guestReader) Read(p []byte) (int, error) {
	rest := r.slot.instance.spec.Stdin[r.at:]
	if len(rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, rest)
	r.at += n
	return n, nil
}

func walltime() (sec int64, nsec int32) {
	now := time.Now()
	return now.Unix(), int32(now.Nanosecond())
}

// guestWriter takes a guest's output. One call of fd_write can ask for any
// number of writes of all of its memory, so each write can be interrupted.
type guestWriter struct {
	slot *slot
	to   func(*runtime.Spec) io.Writer
}

// Write hands on what the guest writes; the slots of an instance take turns.
func (w *guestWriter) Write(p []byte) (int, error) {
	w.slot.interruptible()
	w.slot.instance.output.Lock()
	defer w.slot.instance.output.Unlock()
	to := w.to(&w.slot.instance.spec)
	for rest := p; len(rest) > 0; {
		part := rest[:min(len(rest), 1<<20)]
		if _, err := to.Write(part); err != nil {
			// A guest is not told about trouble with its log.
			break
		}
		rest = rest[len(part):]
		w.slot.interruptible()
	}
	return len(p), nil
}

// guestRandom is the system's random source in pieces, between which a guest
// that asks for all of its memory at once can be interrupted.
type guestRandom struct{ slot *slot }

// Read fills p up to 64 KiB.
func (g guestRandom) Read(p []byte) (int, error) {
	g.slot.interruptible()
	return rand.Read(p[:min(len(p), 64<<10)])
}

// sleep waits, at most as long as the call may take.
func (s *slot) sleep(d time.Duration) {
	if !s.call.deadline.IsZero() {
		d = min(d, time.Until(s.call.deadline))
	}
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.call.done:
		case <-s.instance.dying:
		}
	}
	s.interruptible()
}

// Layout and numbers of WASI preview 1,
// https://github.com/WebAssembly/WASI/blob/snapshot-01/phases/snapshot/docs.md
const (
	subscriptionBytes = 48
	eventBytes        = 32
	maxSubscriptions  = 4096

	eventClock   = 0
	eventFdRead  = 1
	eventFdWrite = 2

	errnoSuccess = 0
	errnoBadf    = 8
	errnoFault   = 21
	errnoInval   = 28

	clockRealtime  = 0
	clockMonotonic = 1
)

// pollOneoff waits for clocks and for the standard streams, which are always
// ready.
func pollOneoff(ctx context.Context, mod api.Module, stack []uint64) {
	s := slotOf(ctx)
	n := uint32(stack[2])
	if n == 0 || n > maxSubscriptions {
		stack[0] = errnoInval
		return
	}
	mem := mod.Memory()
	in, okIn := mem.Read(uint32(stack[0]), n*subscriptionBytes)
	out, okOut := mem.Read(uint32(stack[1]), n*eventBytes)
	if !okIn || !okOut {
		stack[0] = errnoFault
		return
	}
	p := poll{instance: s.instance, in: bytes.Clone(in), out: out}
	if p.read() > 0 {
		p.wait = 0
	}
	if p.invalid {
		stack[0] = errnoInval
		return
	}
	s.sleep(p.wait)
	p.clocks()
	stack[0] = errnoSuccess
	if !mem.WriteUint32Le(uint32(stack[3]), p.events) {
		stack[0] = errnoFault
	}
}

// poll is one call of poll_oneoff.
type poll struct {
	instance *instance
	in, out  []byte
	events   uint32
	// due is how long each clock takes from the call on, wait the shortest.
	due     []time.Duration
	wait    time.Duration
	invalid bool
}

// read writes the events of streams, finds out how long the nearest clock takes,
// and returns the number of events.
func (p *poll) read() uint32 {
	p.wait = time.Duration(1<<63 - 1)
	p.due = make([]time.Duration, len(p.in)/subscriptionBytes)
	for i := range p.due {
		sub := p.in[i*subscriptionBytes:][:subscriptionBytes]
		switch sub[8] {
		case eventClock:
			p.due[i] = max(p.remaining(sub), 0)
			p.wait = min(p.wait, p.due[i])
		case eventFdRead, eventFdWrite:
			errno := uint16(errnoSuccess)
			if binary.LittleEndian.Uint32(sub[16:]) > 2 {
				errno = errnoBadf
			}
			p.event(sub, errno)
		default:
			p.invalid = true
		}
	}
	return p.events
}

// clocks writes the events of the clocks that have come.
func (p *poll) clocks() {
	for i, due := range p.due {
		sub := p.in[i*subscriptionBytes:][:subscriptionBytes]
		if sub[8] == eventClock && due <= p.wait {
			p.event(sub, errnoSuccess)
		}
	}
}

// remaining returns how long a clock subscription takes from now on; an absolute
// time may lie in the past.
func (p *poll) remaining(sub []byte) time.Duration {
	at := int64(min(binary.LittleEndian.Uint64(sub[24:]), 1<<63-1))
	if binary.LittleEndian.Uint16(sub[40:])&1 == 0 {
		return time.Duration(at)
	}
	switch binary.LittleEndian.Uint32(sub[16:]) {
	case clockRealtime:
		return time.Duration(at - time.Now().UnixNano())
	case clockMonotonic:
		return time.Duration(at - p.instance.nanotime())
	default:
		p.invalid = true
		return 0
	}
}

func (p *poll) event(sub []byte, errno uint16) {
	e := p.out[p.events*eventBytes:][:eventBytes]
	clear(e)
	copy(e, sub[:8])
	binary.LittleEndian.PutUint16(e[8:], errno)
	e[10] = sub[8]
	p.events++
}
