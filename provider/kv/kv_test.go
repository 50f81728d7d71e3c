package kv_test

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

func open(t testing.TB, now func() time.Time, cfg provider.Config) provider.Provider {
	t.Helper()
	p, err := kv.New(kv.Options{Now: now}).Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return p
}

func TestMemoryConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{ID: "kv", Driver: "memory"})
	})
}

func TestBboltConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{
			ID: "kv", Dir: filepath.Join(t.TempDir(), "kv"), Settings: map[string]string{"fsync": "false"},
		})
	})
}

func TestBboltWithSyncConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		if t.Name() == "TestBboltWithSyncConforms/a_random_history_agrees_with_a_model" {
			t.Skip("thousands of syncs; TestBboltConforms runs it without")
		}
		return open(t, now, provider.Config{ID: "kv", Driver: "bbolt", Dir: t.TempDir()})
	})
}

func payload(t *testing.T, m proto.Message) []byte { return encoded(t, m) }

func encoded(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKindNamesProviderAndPermission(t *testing.T) {
	tests := []struct {
		operation string
		request   proto.Message
		need      string
	}{
		{"get", &pb.KvGetRequest{Provider: "p", Key: []byte("orders/1")}, "kv:read:orders/1"},
		{"list", &pb.KvListRequest{Provider: "p", Prefix: []byte("orders/"), Cursor: []byte("secrets/")}, "kv:read:orders/"},
		{"list", &pb.KvListRequest{Provider: "p"}, "kv:read"},
		{"set", &pb.KvSetRequest{Provider: "p", Key: []byte("k"), Value: []byte("v")}, "kv:write:k"},
		{"cas", &pb.KvCasRequest{Provider: "p", Key: []byte("k")}, "kv:write:k"},
		{"delete", &pb.KvDeleteRequest{Provider: "p", Key: []byte("k")}, "kv:delete:k"},
	}
	kind := kv.New(kv.Options{})
	for _, tt := range tests {
		b := payload(t, tt.request)
		demand, err := kind.Demand(tt.operation, b)
		need := demand.Need
		if err != nil || demand.Provider != "p" || need.String() != tt.need || need.Capability != kind.Type() {
			t.Errorf("%s: demand %+v, %v; want %q of provider p", tt.operation, demand, err, tt.need)
		}
		if got := kind.Repeatable(tt.operation); got != (tt.operation == "get" || tt.operation == "list") {
			t.Errorf("%s: repeatable %v", tt.operation, got)
		}
		if action, ok := permission.ForImport("kv", tt.operation); !ok || action.Action != need.Action {
			t.Errorf("%s: the import needs %+v, the call %+v", tt.operation, action, need)
		}
	}
	for operation, b := range map[string][]byte{"drop": nil, "get": {0xff}, "set": payload(t, &pb.KvSetRequest{Value: []byte("v")})} {
		if _, err := kind.Demand(operation, b); !errors.Is(err, provider.ErrInvalid) {
			t.Errorf("%s %q: %v, want ErrInvalid", operation, b, err)
		}
	}
}

// A closed provider lets go of its file at once, so that it can be replaced.
func TestBboltIsReplacedByAHost(t *testing.T) {
	defer goleak.VerifyNone(t)
	host := provider.NewHost(slog.New(slog.DiscardHandler), kv.New(kv.Options{}))
	cfg := provider.Config{ID: "kv", Dir: t.TempDir()}
	call := func(operation string, m proto.Message) error {
		_, err := host.Invoke(t.Context(), "kv", "kv", provider.Call{Bucket: "b", Operation: operation, Payload: payload(t, m)})
		return err
	}
	for i := range 3 {
		if err := host.Start(t.Context(), "kv", cfg); err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
		if err := call("set", &pb.KvSetRequest{Key: []byte("k"), Value: []byte("v")}); err != nil {
			t.Error(err)
		}
	}
	if err := host.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := call("get", &pb.KvGetRequest{Key: []byte("k")}); !errors.Is(err, provider.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}
