package provider_test

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
)

var farCaller = provider.Caller{Instance: "far", Generation: 7, NodeEpoch: 2, Node: "n2"}

func kvRequest(operation, payload string) provider.Request {
	return provider.Request{Provider: "kv", Capability: "kv", Operation: operation, Payload: []byte(payload)}
}

func TestServeCarriesOutWhatItsOwnDirectoryAllows(t *testing.T) {
	n := newNode(t, nil)
	for _, payload := range []string{"|x", "kv|x"} {
		got, err := n.router.Serve(t.Context(), farCaller, kvRequest("get", payload))
		if want := "far/far/7/far/get/" + payload; err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	got, err := n.router.Serve(t.Context(), provider.Caller{User: "alice", Bucket: "b"}, kvRequest("set", "|x"))
	if want := "/alice/0/b/set/|x"; err != nil || string(got) != want {
		t.Errorf("a user: %q, %v; want %q", got, err, want)
	}
}

func TestServeRefusals(t *testing.T) {
	tests := []struct {
		name   string
		caller provider.Caller
		req    provider.Request
		want   error
	}{
		{"forged instance", provider.Caller{Instance: "i", Generation: 3, Node: "n2"}, kvRequest("get", "|orders/1"), provider.ErrDenied},
		{"forged node", provider.Caller{Instance: "far", Generation: 7, Node: "n3"}, kvRequest("get", "|x"), provider.ErrDenied},
		{"old generation", provider.Caller{Instance: "far", Generation: 6, Node: "n2"}, kvRequest("get", "|x"), provider.ErrDenied},
		{"future generation", provider.Caller{Instance: "far", Generation: 8, Node: "n2"}, kvRequest("get", "|x"), provider.ErrDenied},
		{"old epoch", provider.Caller{Instance: "far", Generation: 7, NodeEpoch: 1, Node: "n2"}, kvRequest("get", "|x"), provider.ErrDenied},
		{"unknown instance", provider.Caller{Instance: "nope", Generation: 1, Node: "n2"}, kvRequest("get", "|x"), provider.ErrInstanceNotFound},
		{"nobody", provider.Caller{}, kvRequest("get", "|x"), provider.ErrDenied},
		{"unknown provider", farCaller, provider.Request{Provider: "x", Capability: "kv", Operation: "get", Payload: []byte("|x")}, provider.ErrNotFound},
		{"provider of another node", provider.Caller{User: "u"}, provider.Request{Provider: "there", Capability: "kv", Operation: "get", Payload: []byte("|x")}, provider.ErrUnavailable},
		{"payload for another provider", farCaller, kvRequest("get", "there|x"), provider.ErrInvalid},
		{"no provider", farCaller, provider.Request{Capability: "kv", Operation: "get", Payload: []byte("|x")}, provider.ErrInvalid},
		{"unknown capability", farCaller, provider.Request{Provider: "kv", Capability: "x", Operation: "get", Payload: []byte("|x")}, provider.ErrInvalid},
		{"capability of another type", farCaller, provider.Request{Provider: "kv", Capability: "http", Operation: "get", Payload: []byte("|x")}, provider.ErrInvalid},
		{"unknown operation", farCaller, kvRequest("drop", "|x"), provider.ErrInvalid},
	}
	n := newNode(t, func(c *provider.RouterConfig) { c.SettleWithin = -1 })
	for _, tt := range tests {
		if _, err := n.router.Serve(t.Context(), tt.caller, tt.req); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

// What the caller's node knows already reaches the serving node a moment later:
// the call waits for it instead of failing.
func TestServeWaitsForRecordsUnderWay(t *testing.T) {
	newcomer := provider.Caller{Instance: "new", Generation: 1, Node: "n2"}
	moved := provider.Caller{Instance: "far", Generation: 8, Node: "n3"}
	tests := []struct {
		name    string
		caller  provider.Caller
		payload string
		arrive  func(*testing.T, *provider.Directory)
	}{
		{"instance and assignment", newcomer, "|x", func(t *testing.T, d *provider.Directory) {
			d.PutInstance(provider.InstanceRecord{ID: "new", Name: "new", Node: "n2", Generation: 1})
			d.PutAssignment(provider.Assignment{Instance: "new", Provider: "kv", Permissions: set(t, "kv:read"), Bucket: "b"})
		}},
		{"generation", moved, "|x", func(_ *testing.T, d *provider.Directory) {
			d.PutInstance(provider.InstanceRecord{ID: "far", Name: "far", Node: "n3", Generation: 8})
		}},
		{"permission", farCaller, "|x", func(t *testing.T, d *provider.Directory) {
			d.PutAssignment(provider.Assignment{Instance: "far", Provider: "kv", Permissions: set(t, "kv:read"), Bucket: "far"})
		}},
		{"provider's move to this node", farCaller, "|x", func(_ *testing.T, d *provider.Directory) {
			d.PutProvider(provider.ProviderRecord{ID: "kv", Type: "kv", Node: "n1", Running: true})
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, nil)
				switch tt.name {
				case "permission":
					n.dir.RemoveAssignment("far", "kv")
				case "provider's move to this node":
					n.dir.PutProvider(provider.ProviderRecord{ID: "kv", Type: "kv", Node: "n2", Running: true})
				}
				began := time.Now()
				result := make(chan error, 1)
				go func() {
					_, err := n.router.Serve(t.Context(), tt.caller, kvRequest("get", tt.payload))
					result <- err
				}()
				time.Sleep(300 * time.Millisecond) // virtual
				synctest.Wait()
				n.dir.PutNode(provider.NodeRecord{ID: "n8"}) // a change that does not help
				synctest.Wait()
				select {
				case err := <-result:
					t.Fatalf("it did not wait: %v", err)
				default:
				}
				tt.arrive(t, n.dir)
				if err := <-result; err != nil {
					t.Errorf("after the record arrived: %v", err)
				}
				if took := time.Since(began); took != 300*time.Millisecond {
					t.Errorf("it took %v, want to go on at the change", took)
				}
			})
		})
	}
}

func TestServeWaitsNoLongerThanItsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, nil)
		began := time.Now()
		_, err := n.router.Serve(t.Context(), provider.Caller{Instance: "nope", Generation: 1, Node: "n2"}, kvRequest("get", "|x"))
		if took := time.Since(began); !errors.Is(err, provider.ErrInstanceNotFound) || took != provider.DefaultSettleWithin {
			t.Errorf("%v after %v, want ErrInstanceNotFound after %v", err, took, provider.DefaultSettleWithin)
		}
		began = time.Now()
		_, err = n.router.Serve(t.Context(), provider.Caller{Instance: "far", Generation: 6, Node: "n2"}, kvRequest("get", "|x"))
		if took := time.Since(began); !errors.Is(err, provider.ErrDenied) || took != 0 {
			t.Errorf("an old generation: %v after %v, want a refusal at once", err, took)
		}
	})
}

// Forged calls cannot pile up: beyond a bound they are refused at once.
func TestServeBoundsThoseThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, nil)
		var wg sync.WaitGroup
		var mu sync.Mutex
		atOnce := 0
		for range 1000 {
			wg.Go(func() {
				began := time.Now()
				_, err := n.router.Serve(t.Context(), provider.Caller{Instance: "nope", Generation: 1, Node: "n2"}, kvRequest("get", "|x"))
				if !errors.Is(err, provider.ErrInstanceNotFound) {
					t.Error(err)
				}
				if time.Since(began) == 0 {
					mu.Lock()
					atOnce++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if atOnce != 1000-256 {
			t.Errorf("%d refused at once, want %d", atOnce, 1000-256)
		}
	})
}

func TestServeSeesARevocationAtOnce(t *testing.T) {
	n := newNode(t, func(c *provider.RouterConfig) { c.SettleWithin = -1 })
	if _, err := n.router.Serve(t.Context(), farCaller, kvRequest("get", "|x")); err != nil {
		t.Fatal(err)
	}
	n.dir.PutAssignment(provider.Assignment{Instance: "far", Provider: "kv", Permissions: set(t, "kv:write"), Bucket: "far"})
	if _, err := n.router.Serve(t.Context(), farCaller, kvRequest("get", "|x")); !errors.Is(err, provider.ErrDenied) {
		t.Errorf("after the revocation: %v", err)
	}
}
