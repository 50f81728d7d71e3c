package runtimetest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

type valueKey struct{}

var capabilityTests = []conformance{
	{"calls reach the host and answers the guest", func(t *testing.T, r runtime.Runtime) {
		for module, functions := range map[string][]string{
			"kv": {"get", "set", "delete", "list", "cas"}, "http": {"request"},
			"messaging": {"publish", "request", "subscribe", "unsubscribe"},
			"provider":  {"call"}, "log": {"write"}, "context": {"get"},
		} {
			for _, function := range functions {
				host := HostFunc(func(_ context.Context, capability, operation string, payload []byte) ([]byte, error) {
					return []byte(capability + "." + operation + "(" + string(payload) + ")"), nil
				})
				i := Started(t, r, Spec(t, Caller("wasmatrix:"+module+"/v1", function)), host)
				want := "\x00\x00\x00\x00" + module + "." + function + "(in)"
				if got := invoke(t, i, "in"); got != want {
					t.Fatalf("answer %q, want %q", got, want)
				}
			}
		}
	}},
	{"an answer that does not fit is read afterwards", func(t *testing.T, r runtime.Runtime) {
		long := strings.Repeat("0123456789", 200)
		host := HostFunc(func(context.Context, string, string, []byte) ([]byte, error) { return []byte(long), nil })
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		if got := invoke(t, i, "in"); got != "\x00\x00\x00\x00"+long {
			t.Fatalf("answer of %d bytes", len(got))
		}
	}},
	{"a failure reaches the guest as status and message", func(t *testing.T, r runtime.Runtime) {
		host := HostFunc(func(context.Context, string, string, []byte) ([]byte, error) {
			return nil, fmt.Errorf("kv: %w", &runtime.Failure{Code: 6, Encoded: []byte("denied")})
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		if got := invoke(t, i, "in"); got != "\x06\x00\x00\x00denied" {
			t.Fatalf("answer %q", got)
		}
	}},
	{"a host that fails or panics is an internal error to the guest", func(t *testing.T, r runtime.Runtime) {
		var calls atomic.Int32
		host := HostFunc(func(context.Context, string, string, []byte) ([]byte, error) {
			if calls.Add(1) == 1 {
				return nil, errors.New("out of luck")
			}
			panic("out of luck")
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:kv/v1", "get")), host)
		for range 2 {
			if got := invoke(t, i, "in"); got[0] != 13 {
				t.Fatalf("answer %q", got)
			}
		}
	}},
	{"pointers and lengths outside of memory are refused", func(t *testing.T, r runtime.Runtime) {
		for _, args := range [][4]int32{
			{-1, 1, 0, 0},
			{0, -1, 0, 0},
			{1 << 20, 16, 0, 0},
			{0, 3 << 16, 0, 0},
			{0, 0, -1, 2},
			{0, 0, 8, -1},
			{0, 0, 2<<16 - 1, 2},
		} {
			i := Started(t, r, Spec(t, RawCaller("wasmatrix:kv/v1", "get", args)), NoHost(t))
			if got := invoke(t, i, ""); binary.LittleEndian.Uint32([]byte(got)[4:]) != 1 {
				t.Fatalf("%v answered %x, want status 1", args, got)
			}
		}
	}},
	{"values of the caller's context reach the host", func(t *testing.T, r runtime.Runtime) {
		host := HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
			return fmt.Append(nil, ctx.Value(valueKey{})), nil
		})
		i := Started(t, r, Spec(t, Caller("wasmatrix:context/v1", "get")), host)
		ctx := context.WithValue(t.Context(), valueKey{}, "from the caller")
		got, err := i.Invoke(ctx, runtime.HandlerInvoke, nil)
		if err != nil || string(got[4:]) != "from the caller" {
			t.Fatalf("answer %q, %v", got, err)
		}
	}},
	{"the host's context ends with the call's time", func(t *testing.T, r runtime.Runtime) {
		host := HostFunc(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		spec := Spec(t, Caller("wasmatrix:kv/v1", "get"))
		spec.Timeout = 50 * time.Millisecond
		i := Started(t, r, spec, host)
		if _, err := i.Invoke(t.Context(), runtime.HandlerInvoke, nil); !errors.Is(err, runtime.ErrTimeLimit) {
			t.Fatalf("error %v", err)
		}
		wantExit(t, i, runtime.TimeLimit)
	}},
}
