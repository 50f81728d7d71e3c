package provider_test

import (
	"errors"
	"testing"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

func read(key string) permission.Need {
	return permission.Need{Capability: "kv", Action: "read", Resource: key}
}

// goodFacts and goodCaller are a call that is allowed; each row of the table
// breaks one thing.
func goodFacts(t testing.TB) provider.Facts {
	return provider.Facts{
		Instance:   &provider.InstanceRecord{ID: "i", Name: "hello", Node: "n1", NodeEpoch: 5, Generation: 3},
		Fence:      3,
		Provider:   &provider.ProviderRecord{ID: "kv", Type: "kv", Node: "n9", Running: true},
		Assignment: &provider.Assignment{Instance: "i", Provider: "kv", Permissions: set(t, "kv:read:orders/"), Bucket: "hello"},
	}
}

var goodCaller = provider.Caller{Instance: "i", Generation: 3, NodeEpoch: 5, Node: "n1"}

func TestDecideRefusesWhateverDoesNotFit(t *testing.T) {
	tests := []struct {
		name      string
		change    func(f *provider.Facts, c *provider.Caller)
		need      permission.Need
		want      error // nil is allowed
		mentions  string
		next      string
		unsettled bool
	}{
		{name: "all is well"},
		{name: "no epoch told", change: func(_ *provider.Facts, c *provider.Caller) { c.NodeEpoch = 0 }},
		{name: "a later epoch of the node", change: func(_ *provider.Facts, c *provider.Caller) { c.NodeEpoch = 6 }},
		{
			name: "nobody", change: func(_ *provider.Facts, c *provider.Caller) { *c = provider.Caller{} },
			want: provider.ErrDenied, mentions: "neither an instance nor a user",
		},
		{
			name: "no node", change: func(_ *provider.Facts, c *provider.Caller) { c.Node = "" },
			want: provider.ErrDenied, mentions: "neither",
		},
		{
			name: "unknown instance", change: func(f *provider.Facts, _ *provider.Caller) { f.Instance, f.Fence = nil, 0 },
			want: provider.ErrInstanceNotFound, mentions: "instance i is not known", unsettled: true,
		},
		{
			name: "facts of another instance", change: func(_ *provider.Facts, c *provider.Caller) { c.Instance = "j" },
			want: provider.ErrInstanceNotFound, unsettled: true,
		},
		{
			name: "another node", change: func(_ *provider.Facts, c *provider.Caller) { c.Node = "n2" },
			want: provider.ErrDenied, mentions: "not placed on node n2",
		},
		{
			name: "an older generation", change: func(_ *provider.Facts, c *provider.Caller) { c.Generation = 2 },
			want: provider.ErrDenied, mentions: "generation 2 of instance i was superseded by generation 3",
		},
		{
			name: "generation zero", change: func(_ *provider.Facts, c *provider.Caller) { c.Generation = 0 },
			want: provider.ErrDenied, mentions: "superseded",
		},
		{
			name: "a newer generation", change: func(_ *provider.Facts, c *provider.Caller) { c.Generation = 4 },
			want: provider.ErrDenied, mentions: "the newest is 3", unsettled: true,
		},
		{
			name: "an older generation of an instance that is gone",
			change: func(f *provider.Facts, _ *provider.Caller) {
				f.Instance, f.Fence = nil, 4
			},
			want: provider.ErrDenied, mentions: "superseded by generation 4",
		},
		{
			name: "an older epoch of the node", change: func(_ *provider.Facts, c *provider.Caller) { c.NodeEpoch = 4 },
			want: provider.ErrDenied, mentions: "later epoch",
		},
		{
			name: "unknown provider", change: func(f *provider.Facts, _ *provider.Caller) { f.Provider = nil },
			want: provider.ErrNotFound, mentions: "provider kv is not known", next: "wasmatrix provider list", unsettled: true,
		},
		{
			name: "facts of another provider", change: func(f *provider.Facts, _ *provider.Caller) { f.Provider.ID = "kv2" },
			want: provider.ErrNotFound, unsettled: true,
		},
		{
			name: "a provider of another type", change: func(f *provider.Facts, _ *provider.Caller) { f.Provider.Type = "messaging" },
			want: provider.ErrInvalid, mentions: "is of type messaging and does not serve kv",
		},
		{
			name: "not assigned", change: func(f *provider.Facts, _ *provider.Caller) { f.Assignment = nil },
			want: provider.ErrDenied, mentions: "hello was not granted provider kv",
			next: "wasmatrix grant hello kv:read:orders/1 --provider kv, or run it with --allow kv:read:orders/1", unsettled: true,
		},
		{
			name: "the assignment of another instance", change: func(f *provider.Facts, _ *provider.Caller) { f.Assignment.Instance = "j" },
			want: provider.ErrDenied, mentions: "not granted", unsettled: true,
		},
		{
			name: "the assignment of another provider", change: func(f *provider.Facts, _ *provider.Caller) { f.Assignment.Provider = "kv2" },
			want: provider.ErrDenied, mentions: "not granted", unsettled: true,
		},
		{
			name: "another key", need: read("secrets/1"),
			want: provider.ErrDenied, mentions: "not covered by kv:read:orders/", next: "kv:read:secrets/1", unsettled: true,
		},
		{
			name: "another action", need: permission.Need{Capability: "kv", Action: "write", Resource: "orders/1"},
			want: provider.ErrDenied, mentions: "kv:write:orders/1", next: "--allow kv:write:orders/1", unsettled: true,
		},
		{
			name: "no permission at all", change: func(f *provider.Facts, _ *provider.Caller) { f.Assignment.Permissions = permission.Set{} },
			want: provider.ErrDenied, mentions: "no permission for kv was granted", unsettled: true,
		},
		{
			name: "an instance that calls itself a user", change: func(f *provider.Facts, c *provider.Caller) {
				c.User, f.Assignment = "root", nil
			},
			want: provider.ErrDenied, mentions: "not granted", unsettled: true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, c, need := goodFacts(t), goodCaller, read("orders/1")
			if tt.change != nil {
				tt.change(&f, &c)
			}
			if tt.need != (permission.Need{}) {
				need = tt.need
			}
			grant, err := provider.Decide(&f, &c, "kv", need)
			if tt.want == nil {
				if err != nil || grant.Name != "hello" || grant.Bucket != "hello" || grant.Permission.String() != "kv:read:orders/" {
					t.Fatalf("got %+v, %v; want it allowed", grant, err)
				}
				return
			}
			wantError(t, err, tt.want, tt.mentions, tt.next)
			if grant != (provider.Grant{}) {
				t.Errorf("a refusal carries %+v", grant)
			}
			if provider.Unsettled(err) != tt.unsettled {
				t.Errorf("may heal: %v, want %v", provider.Unsettled(err), tt.unsettled)
			}
		})
	}
}

func TestDecideOnUsers(t *testing.T) {
	f := goodFacts(t)
	f.Instance, f.Assignment = nil, nil
	user := provider.Caller{User: "alice", Bucket: "b"}
	grant, err := provider.Decide(&f, &user, "kv", read("x"))
	if err != nil || grant.Name != "alice" || grant.Bucket != "b" {
		t.Errorf("a user: %+v, %v", grant, err)
	}
	f.Provider.Type = "http"
	if _, err := provider.Decide(&f, &user, "kv", read("x")); !errors.Is(err, provider.ErrInvalid) {
		t.Errorf("a user at a provider of another type: %v", err)
	}
	f.Provider = nil
	if _, err := provider.Decide(&f, &user, "kv", read("x")); !errors.Is(err, provider.ErrNotFound) {
		t.Errorf("a user at no provider: %v", err)
	}
}

func TestNextStepIsSafeToPasteIntoAShell(t *testing.T) {
	f := goodFacts(t)
	f.Provider.Type = "messaging"
	need := permission.Need{Capability: "messaging", Action: "subscribe", Resource: "it's.>"}
	_, err := provider.Decide(&f, &goodCaller, "kv", need)
	wantError(t, err, provider.ErrDenied, "", `wasmatrix grant hello 'msg:subscribe:it'\''s.>' --provider kv`)
}
