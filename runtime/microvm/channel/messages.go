package channel

import (
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Greeting is the payload of Hello: what two clones of one machine must not share.
type Greeting struct {
	// Now is the time of day.
	Now time.Time
	// Entropy seeds the machine's random numbers.
	Entropy []byte
}

// Encode returns the payload.
func (g Greeting) Encode() []byte {
	var e encoder
	e.number(uint64(g.Now.UnixNano()))
	e.bytes(g.Entropy)
	return e.b
}

// DecodeGreeting takes a payload apart.
func DecodeGreeting(payload []byte) (Greeting, error) {
	d := decoder{b: payload}
	g := Greeting{Now: time.Unix(0, int64(d.number())), Entropy: d.bytes()}
	return g, d.end("greeting")
}

// EncodeSpec returns the payload of Prepare, Warm and Rehearse. The path of the module and
// the outputs do not travel: the module does, and outputs come back as frames.
func EncodeSpec(s runtime.Spec) []byte {
	var e encoder
	e.text(s.InstanceID)
	e.text(s.Name)
	e.number(s.Generation)
	e.text(s.Digest)
	e.number(s.MemoryBytes)
	e.number(uint64(s.Timeout))
	e.number(uint64(s.Concurrency))
	e.number(uint64(len(s.Args)))
	for _, a := range s.Args {
		e.text(a)
	}
	e.number(uint64(len(s.Env)))
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		e.text(k)
		e.text(s.Env[k])
	}
	e.bytes(s.Stdin)
	return e.b
}

// DecodeSpec takes a payload apart.
func DecodeSpec(payload []byte) (runtime.Spec, error) {
	d := decoder{b: payload}
	s := runtime.Spec{
		InstanceID: d.text(), Name: d.text(), Generation: d.number(), Digest: d.text(),
		MemoryBytes: d.number(), Timeout: time.Duration(d.number()), Concurrency: int(d.number()),
	}
	for range d.count(4) {
		s.Args = append(s.Args, d.text())
	}
	if n := d.count(8); n > 0 {
		s.Env = map[string]string{}
		for range n {
			k := d.text()
			s.Env[k] = d.text()
		}
	}
	s.Stdin = d.bytes()
	return s, d.end("spec")
}

// Invocation is the payload of Invoke and, without handler and input, of Start.
type Invocation struct {
	// Handler is the handler to call.
	Handler runtime.Handler
	// Now is the time of day, which keeps the machine's clock true.
	Now time.Time
	// Remaining is how long the caller waits; 0 means for ever.
	Remaining time.Duration
	// CorrelationID is that of the call.
	CorrelationID string
	// Input is the handler's input.
	Input []byte
}

// Encode returns the payload without Input, which follows it.
func (i Invocation) Encode() []byte {
	var e encoder
	e.number(uint64(i.Now.UnixNano()))
	e.number(uint64(i.Remaining))
	e.text(string(i.Handler))
	e.text(i.CorrelationID)
	return e.b
}

// DecodeInvocation takes a payload apart; Input is a part of it.
func DecodeInvocation(payload []byte) (Invocation, error) {
	d := decoder{b: payload}
	i := Invocation{
		Now: time.Unix(0, int64(d.number())), Remaining: time.Duration(d.number()),
		Handler: runtime.Handler(d.text()), CorrelationID: d.text(),
	}
	i.Input = d.rest()
	return i, d.end("invocation")
}

// CapabilityCall is the payload of Call.
type CapabilityCall struct {
	// Invocation is the id of the Invoke or Start that the guest works on.
	Invocation uint64
	// Capability and Operation are as runtime.Host gets them.
	Capability, Operation string
	// Input is the encoded request.
	Input []byte
}

// Encode returns the payload without Input, which follows it.
func (c CapabilityCall) Encode() []byte {
	var e encoder
	e.number(c.Invocation)
	e.text(c.Capability)
	e.text(c.Operation)
	return e.b
}

// DecodeCapabilityCall takes a payload apart; Input is a part of it.
func DecodeCapabilityCall(payload []byte) (CapabilityCall, error) {
	d := decoder{b: payload}
	c := CapabilityCall{Invocation: d.number(), Capability: d.text(), Operation: d.text()}
	c.Input = d.rest()
	return c, d.end("capability call")
}

// EncodeRefusal returns the payload of Refusal.
func EncodeRefusal(f *runtime.Failure) []byte {
	var e encoder
	e.number(uint64(f.Code))
	e.bytes(f.Encoded)
	return e.b
}

// DecodeRefusal takes a payload apart.
func DecodeRefusal(payload []byte) (*runtime.Failure, error) {
	d := decoder{b: payload}
	f := &runtime.Failure{Code: uint32(d.number()), Encoded: d.bytes()}
	return f, d.end("refusal")
}

// EncodeExit returns the payload of Ended.
func EncodeExit(x runtime.Exit) []byte {
	var e encoder
	e.number(uint64(uint32(x.Reason)))
	e.number(uint64(uint32(x.Code)))
	e.text(x.Message)
	return e.b
}

// DecodeExit takes a payload apart.
func DecodeExit(payload []byte) (runtime.Exit, error) {
	d := decoder{b: payload}
	x := runtime.Exit{Reason: runtime.Reason(int32(d.number())), Code: int32(d.number()), Message: d.text()}
	return x, d.end("exit")
}

// EncodeNumber returns the payload of Usage and Stop, and of the Done of a call:
// the size of the linear memories, after which the answer follows.
func EncodeNumber(v uint64) []byte {
	var e encoder
	e.number(v)
	return e.b
}

// DecodeNumber returns the number that a payload begins with and what follows it.
func DecodeNumber(payload []byte) (v uint64, rest []byte, err error) {
	d := decoder{b: payload}
	v = d.number()
	rest = d.rest()
	return v, rest, d.end("number")
}

// sentinels are the errors of the contract that travel, each with its bit.
var sentinels = []error{
	runtime.ErrModuleInvalid, runtime.ErrBusy, runtime.ErrNoHandler,
	runtime.ErrNotRunning, runtime.ErrTimeLimit, runtime.ErrCrashed,
}

// Failure is an error of the other side: its words, and the sentinels of package
// runtime that it wraps.
type Failure struct {
	message string
	wraps   []error
}

// Error returns the words.
func (f *Failure) Error() string { return f.message }

// Unwrap returns the sentinels.
func (f *Failure) Unwrap() []error { return f.wraps }

// EncodeFailure returns the payload of Failed.
func EncodeFailure(err error) []byte {
	var e encoder
	var bits uint64
	for n, s := range sentinels {
		if errors.Is(err, s) {
			bits |= 1 << n
		}
	}
	e.number(bits)
	e.text(err.Error())
	return e.b
}

// DecodeFailure takes a payload apart.
func DecodeFailure(payload []byte) (*Failure, error) {
	d := decoder{b: payload}
	bits := d.number()
	f := &Failure{message: d.text()}
	for n, s := range sentinels {
		if bits&(1<<n) != 0 {
			f.wraps = append(f.wraps, s)
		}
	}
	return f, d.end("failure")
}
