package agent

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

// portFunc is a port of one function.
type portFunc func(ctx context.Context, capability, operation string, payload []byte) ([]byte, error)

func (f portFunc) Call(ctx context.Context, capability, operation string, payload []byte) ([]byte, error) {
	return f(ctx, capability, operation, payload)
}

func (f portFunc) End() {}

func (f portFunc) Settle(context.Context) error { return nil }

func testHost(p portFunc) *host {
	book := newLogBook("n1", time.Now)
	inst := &pb.Instance{Id: "web-1", Name: "web", CorrelationId: "start", Placement: &pb.Placement{Generation: 3}}
	return &host{inst: inst, log: book.open("web-1", "web"), port: p, toAPI: apierror.From}
}

// refusal decodes what a guest gets of a failed call.
func refusal(t *testing.T, err error) *pb.Error {
	t.Helper()
	var f *runtime.Failure
	if !errors.As(err, &f) {
		t.Fatalf("%v is no *runtime.Failure", err)
	}
	e := &pb.Error{}
	if err := proto.Unmarshal(f.Encoded, e); err != nil {
		t.Fatal(err)
	}
	if uint32(e.GetCode()) != f.Code || f.Code == 0 || e.GetTimestamp() == nil {
		t.Fatalf("code %d and error %v", f.Code, e)
	}
	return e
}

func TestCallsOutsideAnInvocationCarryTheIDOfTheStart(t *testing.T) {
	var seen string
	h := testHost(func(ctx context.Context, _, _ string, _ []byte) ([]byte, error) {
		seen = correlation.ID(ctx)
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "it is stopped")
	})
	_, err := h.Call(t.Context(), "kv", "get", nil)
	if e := refusal(t, err); e.GetCorrelationId() != "start" || e.GetCode() != pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE || seen != "start" {
		t.Fatalf("the guest gets %v, the provider %q", e, seen)
	}
	if _, err = h.Call(correlation.With(t.Context(), "call"), "kv", "get", nil); refusal(t, err).GetCorrelationId() != "call" || seen != "call" {
		t.Fatalf("within a call the guest gets %v, the provider %q", err, seen)
	}
}

func TestMalformedCallsOfTheAgentsOwnCapabilities(t *testing.T) {
	h := testHost(nil)
	for _, c := range []struct{ capability, operation, payload string }{
		{"log", "read", ""}, {"log", "write", "\xff"}, {"context", "set", ""}, {"context", "get", "\xff"},
	} {
		_, err := h.Call(t.Context(), c.capability, c.operation, []byte(c.payload))
		if e := refusal(t, err); e.GetCode() != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
			t.Errorf("%+v: %v", c, e)
		}
	}
}

func TestAFailureThatCannotBeEncodedIsStillAFailure(t *testing.T) {
	h := testHost(func(context.Context, string, string, []byte) ([]byte, error) {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "\xff")
	})
	_, err := h.Call(t.Context(), "kv", "get", nil)
	var f *runtime.Failure
	if !errors.As(err, &f) || f.Code != uint32(pb.ErrorCode_ERROR_CODE_CONFLICT) || len(f.Encoded) == 0 {
		t.Fatalf("got %v", err)
	}
}

func TestLogCallsKeepTheirLevelAndAttributes(t *testing.T) {
	h := testHost(nil)
	for _, level := range []pb.LogLevel{pb.LogLevel_LOG_LEVEL_WARN, pb.LogLevel_LOG_LEVEL_UNSPECIFIED, 77} {
		payload, err := proto.Marshal(&pb.LogWriteRequest{Level: level, Message: "m", Attributes: map[string]string{"k": "v"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Call(t.Context(), "log", "write", payload); err != nil {
			t.Fatal(err)
		}
	}
	entries := h.log.entries
	if entries[0].GetLevel() != pb.LogLevel_LOG_LEVEL_WARN || entries[1].GetLevel() != pb.LogLevel_LOG_LEVEL_INFO ||
		entries[2].GetLevel() != pb.LogLevel_LOG_LEVEL_INFO || entries[0].GetAttributes()["k"] != "v" ||
		entries[0].GetGeneration() != 3 || entries[0].GetCorrelationId() != "start" || entries[0].GetNodeId() != "n1" {
		t.Fatalf("logged %v", entries)
	}
}
