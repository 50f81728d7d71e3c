package e2e

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
	"github.com/wasmatrix/wasmatrix/runtime/runtimetest"
	"github.com/wasmatrix/wasmatrix/runtime/wasm"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// goGuest builds a guest that is not among those that users get.
func goGuest(t *testing.T, name string, flags ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".wasm")
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", path}, flags...)
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./internal/"+name)...)
	cmd.Dir = "../../guest/go"
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the guest %s: %v\n%s", name, err, out)
	}
	return path
}

// scripted is a host that gives one answer to every call and keeps what was asked.
type scripted struct {
	mu      sync.Mutex
	called  string
	payload []byte
	answer  []byte
	fails   *runtime.Failure
}

func (s *scripted) Call(_ context.Context, capability, operation string, payload []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.called, s.payload = capability+" "+operation, append([]byte(nil), payload...)
	if s.fails != nil {
		return nil, s.fails
	}
	return s.answer, nil
}

// probe is the guest that makes every call of the SDK.
type probe struct {
	t        *testing.T
	host     *scripted
	instance runtime.Instance
}

func startProbe(t *testing.T) *probe {
	t.Helper()
	binary, _ := harness.Binary(t)
	module, err := os.ReadFile(goGuest(t, "probe", "-buildmode=c-shared"))
	if err != nil {
		t.Fatal(err)
	}
	rt, err := wasm.New(t.Context(), wasm.Config{
		CacheDir: t.TempDir(), CompileCommand: []string{binary, "internal", "compile"}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	p := &probe{t: t, host: &scripted{}}
	spec := runtimetest.Spec(t, module)
	spec.MemoryBytes = 64 << 20
	p.instance = runtimetest.Started(t, rt, spec, p.host)
	return p
}

func (p *probe) invoke(name string) *pb.InvokeResponse {
	p.t.Helper()
	in, err := proto.Marshal(&pb.InvokeRequest{Target: "me", Payload: []byte(name), ContentType: "x/"})
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := p.instance.Invoke(p.t.Context(), runtime.HandlerInvoke, in)
	if err != nil {
		p.t.Fatalf("%s: %v", name, err)
	}
	resp := &pb.InvokeResponse{}
	if err := proto.Unmarshal(out, resp); err != nil {
		p.t.Fatal(err)
	}
	return resp
}

// probed is what the guest says of one call.
type probed struct {
	Value  any
	Code   uint32
	Error  string
	Detail map[string]string
}

func (p *probe) call(name string) (got probed) {
	p.t.Helper()
	resp := p.invoke(name)
	if resp.GetError() != nil {
		p.t.Fatalf("%s: %v", name, resp.GetError())
	}
	if err := json.Unmarshal(resp.GetPayload(), &got); err != nil {
		p.t.Fatalf("%s: %v in %s", name, err, resp.GetPayload())
	}
	return got
}

// TestSDKSpeaksTheMessagesOfTheHost compares what the Go SDK writes and reads by
// hand with the generated messages, for each call and with every field set.
func TestSDKSpeaksTheMessagesOfTheHost(t *testing.T) {
	p := startProbe(t)
	const headers = `"headers": [{"name": "A", "value": "1"}, {"name": "a", "value": "2"}, {"name": "Empty"}]`
	large := strings.Repeat("large", 40_000)
	for _, tc := range []struct {
		name, request   string
		into, answer    proto.Message
		replied, wanted string // as JSON
	}{
		{"kv get", `{"provider": "p", "key": "aw=="}`, &pb.KvGetRequest{}, &pb.KvGetResponse{}, `{"found": true, "value": "dg==", "version": 7}`, `["dg==", 7]`},
		{"kv set", `{"provider": "p", "key": "aw==", "value": "dg==", "ttlMs": 2}`, &pb.KvSetRequest{}, &pb.KvSetResponse{}, `{"version": 7}`, `7`},
		{"kv delete", `{"provider": "p", "key": "aw=="}`, &pb.KvDeleteRequest{}, &pb.KvDeleteResponse{}, `{"existed": true}`, `true`},
		{
			"kv cas", `{"provider": "p", "key": "aw==", "expectedVersion": 7, "value": "dg==", "ttlMs": 1000}`,
			&pb.KvCasRequest{}, &pb.KvCasResponse{}, `{"swapped": true, "version": 8}`, `[true, 8]`,
		},
		{
			"kv list", `{"provider": "p", "prefix": "aw==", "limit": 3, "cursor": "Yw==", "keysOnly": true}`, &pb.KvListRequest{}, &pb.KvListResponse{},
			`{"entries": [{"key": "aw==", "value": "dg==", "version": 7}, {"key": "a2s="}], "nextCursor": "Yw=="}`,
			`{"Entries": [{"Key": "k", "Value": "dg==", "Version": 7}, {"Key": "kk", "Value": null, "Version": 0}], "Cursor": "Yw=="}`,
		},
		{
			"http get", `{"provider": "p", "method": "GET", "url": "http://h/"}`, &pb.HttpRequest{}, &pb.HttpResponse{},
			`{"status": 200, ` + headers + `, "body": "Yg==", "url": "http://h/2"}`,
			`{"Status": 200, "Headers": [{"Name": "A", "Value": "1"}, {"Name": "a", "Value": "2"}, {"Name": "Empty", "Value": ""}], "Body": "Yg==", "URL": "http://h/2"}`,
		},
		{
			"http post", `{"provider": "p", "method": "POST", "url": "http://h/", "headers": [{"name": "Content-Type", "value": "text/plain"}], "body": "Yg=="}`,
			&pb.HttpRequest{}, &pb.HttpResponse{}, `{"status": 204}`, `{"Status": 204, "Headers": null, "Body": null, "URL": ""}`,
		},
		{
			"http request", `{"provider": "p", "method": "PATCH", "url": "http://h/", ` + headers + `, "body": "Yg==", "timeoutMs": 2000, "maxResponseBytes": "99", "noRedirects": true}`,
			&pb.HttpRequest{}, &pb.HttpResponse{}, `{"status": 599}`, `{"Status": 599, "Headers": null, "Body": null, "URL": ""}`,
		},
		{
			"messaging publish", `{"provider": "p", "subject": "s", "payload": "Yg==", ` + headers + `}`,
			&pb.MsgPublishRequest{}, &pb.MsgPublishResponse{}, `{"sequence": "9"}`, `9`,
		},
		{
			"messaging request", `{"provider": "p", "subject": "s", "payload": "Yg==", ` + headers + `, "timeoutMs": 3000}`,
			&pb.MsgRequestRequest{}, &pb.MsgRequestResponse{}, `{"payload": "Yg==", "headers": [{"name": "A", "value": "1"}]}`,
			`{"Payload": "Yg==", "Headers": [{"Name": "A", "Value": "1"}]}`,
		},
		{"messaging subscribe", `{"provider": "p", "subject": "s.*"}`, &pb.MsgSubscribeRequest{}, &pb.MsgSubscribeResponse{}, `{}`, `null`},
		{"messaging unsubscribe", `{"provider": "p", "subject": "s.*"}`, &pb.MsgUnsubscribeRequest{}, &pb.MsgUnsubscribeResponse{}, `{"existed": true}`, `true`},
		{"provider call", `{"provider": "p", "operation": "op", "payload": "Yg=="}`, &pb.ProviderCallRequest{}, &pb.ProviderCallResponse{}, `{"payload": "Yg=="}`, `"Yg=="`},
		{"provider call", `{"provider": "p", "operation": "op", "payload": "Yg=="}`, &pb.ProviderCallRequest{}, &pb.ProviderCallResponse{}, `{"payload": "` + large + `"}`, `"` + large + `"`},
		{"log write", `{"level": "LOG_LEVEL_WARN", "message": "text", "attributes": {"a": "1", "g.b": "2"}}`, &pb.LogWriteRequest{}, &pb.LogWriteResponse{}, `{}`, `null`},
		{
			"context get", `{}`, &pb.ContextGetRequest{}, &pb.ContextGetResponse{},
			`{"instanceId": "i", "instanceName": "n", "generation": 2, "correlationId": "c", "deadlineMs": 5}`,
			`{"InstanceID": "i", "InstanceName": "n", "Generation": 2, "CorrelationID": "c", "Left": 5000000}`,
		},
	} {
		if err := protojson.Unmarshal([]byte(tc.replied), tc.answer); err != nil {
			t.Fatal(err)
		}
		p.host.answer, _ = proto.Marshal(tc.answer)
		got := p.call(tc.name)
		operation := tc.name
		if strings.HasPrefix(operation, "http ") {
			operation = "http request"
		}
		if p.host.called != operation || got.Error != "" {
			t.Errorf("%s: the host was asked for %s, the guest got %q", tc.name, p.host.called, got.Error)
		}
		want := proto.Clone(tc.into)
		if err := protojson.Unmarshal([]byte(tc.request), want); err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(p.host.payload, tc.into); err != nil || !proto.Equal(tc.into, want) {
			t.Errorf("%s: the host got %v, %v; want %v", tc.name, tc.into, err, want)
		}
		var wanted any
		if err := json.Unmarshal([]byte(tc.wanted), &wanted); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got.Value, wanted) {
			t.Errorf("%s: the guest got %v, want %v", tc.name, got.Value, wanted)
		}
	}
	p.failures(t)
	p.messages(t)
}

// failures checks that a guest sees the code, the text and the details of a refused
// call, and that its own refusal reaches the host.
func (p *probe) failures(t *testing.T) {
	t.Helper()
	refusal := &pb.Error{
		Code: pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, Message: strings.Repeat("no. ", 3000), Details: map[string]string{"a": "1", "b": "2"}, NextStep: "ask",
	}
	encoded, err := proto.Marshal(refusal)
	if err != nil {
		t.Fatal(err)
	}
	p.host.fails = &runtime.Failure{Code: uint32(refusal.GetCode()), Encoded: encoded}
	got := p.call("kv get")
	if got.Code != 6 || got.Error != refusal.GetMessage() || !reflect.DeepEqual(got.Detail, refusal.GetDetails()) {
		t.Errorf("a refused call: %+v", got)
	}
	p.host.fails = &runtime.Failure{Code: 10}
	if got := p.call("kv get"); got.Code != 10 || got.Error != "capability call failed with code 10" {
		t.Errorf("a failed call that says nothing: %+v", got)
	}
	p.host.fails = nil
	own := p.invoke("refuse")
	want := &pb.Error{Code: pb.ErrorCode_ERROR_CODE_CONFLICT, Message: "around: no", Details: map[string]string{"why": "told"}}
	if !proto.Equal(own.GetError(), want) || own.GetPayload() != nil {
		t.Errorf("the guest's own refusal: %v", own)
	}
	if resp := p.invoke("log write"); resp.GetContentType() != "x/me" {
		t.Errorf("content type and target: %v", resp)
	}
}

func (p *probe) messages(t *testing.T) {
	t.Helper()
	in := &pb.Message{
		Subject: "s.1", Headers: []*pb.MessageHeader{{Name: "A", Value: "1"}}, Subscription: "s.*", Provider: "p", Delivery: 3, WantsReply: true, Sequence: 9,
	}
	for payload, want := range map[string]*pb.MessageResult{
		"take": {Verdict: pb.MessageVerdict_MESSAGE_VERDICT_ACKNOWLEDGE, Reply: []byte(
			`{"Subject":"s.1","Payload":"dGFrZQ==","Headers":[{"Name":"A","Value":"1"}],"Subscription":"s.*","Provider":"p","Delivery":3,"WantsReply":true,"Sequence":9}`)},
		"reject": {Verdict: pb.MessageVerdict_MESSAGE_VERDICT_REJECT, Reason: "around: never"},
		"retry":  {Verdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, RetryAfterMs: 1500, Reason: "later"},
		"fail":   {Verdict: pb.MessageVerdict_MESSAGE_VERDICT_RETRY, Reason: "no store"},
	} {
		in.Payload = []byte(payload)
		raw, err := proto.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		out, err := p.instance.Invoke(t.Context(), runtime.HandlerMessage, raw)
		got := &pb.MessageResult{}
		if err != nil || proto.Unmarshal(out, got) != nil || !proto.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", payload, got, err, want)
		}
	}
	out, err := p.instance.Invoke(t.Context(), runtime.HandlerMessage, []byte{0xff})
	got := &pb.MessageResult{}
	if err != nil || proto.Unmarshal(out, got) != nil || got.GetVerdict() != pb.MessageVerdict_MESSAGE_VERDICT_REJECT {
		t.Errorf("a malformed message: %v, %v; want it rejected", got, err)
	}
}
