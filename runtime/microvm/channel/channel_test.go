package channel_test

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

func TestFramesArriveAsSent(t *testing.T) {
	var stream bytes.Buffer
	c := channel.New(&stream, 1<<20)
	large := bytes.Repeat([]byte("x"), 1<<20)
	for id, parts := range [][][]byte{nil, {[]byte("one"), nil, []byte("two")}, {large}, {[]byte("after")}} {
		if err := c.Send(channel.Invoke, uint64(id), parts...); err != nil {
			t.Fatal(err)
		}
		f, err := c.Receive()
		if err != nil || f.Kind != channel.Invoke || f.ID != uint64(id) || !bytes.Equal(f.Payload, bytes.Join(parts, nil)) {
			t.Fatalf("frame %d: kind %d, id %d, %d bytes, %v", id, f.Kind, f.ID, len(f.Payload), err)
		}
	}
}

func TestFramesThatAreTooLongAreRefusedUnread(t *testing.T) {
	var stream bytes.Buffer
	if err := channel.New(&stream, 1<<20).Send(channel.Call, 1, make([]byte, 101)); err != nil {
		t.Fatal(err)
	}
	if _, err := channel.New(&stream, 100).Receive(); !errors.Is(err, channel.ErrMalformed) {
		t.Fatalf("error %v", err)
	}
}

func TestMessagesArriveAsSent(t *testing.T) {
	spec := runtime.Spec{
		InstanceID: "a-1", Name: "a", Generation: 7, Digest: "sha256:00", MemoryBytes: 1 << 20, Timeout: time.Second,
		Concurrency: 3, Args: []string{"", "\xff\x00"}, Env: map[string]string{"A": "1", "": "\xfe"}, Stdin: []byte{0, 1},
	}
	if got, err := channel.DecodeSpec(channel.EncodeSpec(spec)); err != nil || !reflect.DeepEqual(got, spec) {
		t.Errorf("spec %+v, %v", got, err)
	}
	in := channel.Invocation{Handler: runtime.HandlerHTTP, Now: time.Unix(1, 2), Remaining: time.Minute, CorrelationID: "c", Input: []byte("in")}
	if got, err := channel.DecodeInvocation(append(in.Encode(), in.Input...)); err != nil || !reflect.DeepEqual(got, in) {
		t.Errorf("invocation %+v, %v", got, err)
	}
	call := channel.CapabilityCall{Invocation: 9, Capability: "kv", Operation: "get", Input: []byte("in")}
	if got, err := channel.DecodeCapabilityCall(append(call.Encode(), call.Input...)); err != nil || !reflect.DeepEqual(got, call) {
		t.Errorf("call %+v, %v", got, err)
	}
	exit := runtime.Exit{Reason: runtime.ExitCode, Code: -3, Message: "no"}
	if got, err := channel.DecodeExit(channel.EncodeExit(exit)); err != nil || got != exit {
		t.Errorf("exit %+v, %v", got, err)
	}
	failure := &runtime.Failure{Code: 6, Encoded: []byte("denied")}
	if got, err := channel.DecodeRefusal(channel.EncodeRefusal(failure)); err != nil || !reflect.DeepEqual(got, failure) {
		t.Errorf("refusal %+v, %v", got, err)
	}
}

// TestErrorsKeepWhatTheyWrap: the agent asks for the sentinels of the contract.
func TestErrorsKeepWhatTheyWrap(t *testing.T) {
	sent := fmt.Errorf("calling: %w: %w", runtime.ErrCrashed, runtime.ErrModuleInvalid)
	got, err := channel.DecodeFailure(channel.EncodeFailure(sent))
	if err != nil || got.Error() != sent.Error() {
		t.Fatalf("%v, %v", got, err)
	}
	for _, sentinel := range []error{runtime.ErrCrashed, runtime.ErrModuleInvalid} {
		if !errors.Is(got, sentinel) {
			t.Errorf("%v is lost", sentinel)
		}
	}
	for _, sentinel := range []error{runtime.ErrBusy, runtime.ErrNoHandler, runtime.ErrNotRunning, runtime.ErrTimeLimit} {
		if errors.Is(got, sentinel) {
			t.Errorf("%v was added", sentinel)
		}
	}
}

// FuzzMessages holds that no payload makes a decoder panic or take memory beyond it.
func FuzzMessages(f *testing.F) {
	f.Add(channel.EncodeSpec(runtime.Spec{Args: []string{"a"}, Env: map[string]string{"b": "c"}}))
	f.Add(channel.CapabilityCall{Capability: "kv"}.Encode())
	f.Add(bytes.Repeat([]byte{0xff}, 100))
	f.Fuzz(func(_ *testing.T, payload []byte) {
		_, _ = channel.DecodeSpec(payload)
		_, _ = channel.DecodeGreeting(payload)
		_, _ = channel.DecodeInvocation(payload)
		_, _ = channel.DecodeCapabilityCall(payload)
		_, _ = channel.DecodeRefusal(payload)
		_, _ = channel.DecodeExit(payload)
		_, _ = channel.DecodeFailure(payload)
		_, _, _ = channel.DecodeNumber(payload)
		_, _ = channel.New(bytes.NewBuffer(payload), 64).Receive()
	})
}
