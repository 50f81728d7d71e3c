package remote_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/external"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/messaging"
	"github.com/wasmatrix/wasmatrix/provider/outbound"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// counted is a kind that decides as the real one does, and whose providers only
// count the calls that get through.
type counted struct {
	provider.Kind
	effects *atomic.Int64
}

func (k counted) Open(context.Context, provider.Config) (provider.Provider, error) {
	return counter{k.effects}, nil
}

type counter struct{ effects *atomic.Int64 }

func (c counter) Invoke(context.Context, provider.Call) ([]byte, error) {
	c.effects.Add(1)
	return nil, nil
}

func (counter) Close() error { return nil }

// attempt is one operation on one resource, as a guest asks for it.
type attempt struct {
	capability, operation string
	resource              string // as the oracle understands it
	payload               []byte
}

// matrix is a node b with one provider of each type, an instance "here" on it and
// an instance "far" on node a, which are granted the same.
type matrix struct {
	*network
	b       *agent
	effects atomic.Int64
	far     pb.NodeAgentServiceClient
	here    *provider.Port
}

// providers are the ids of the providers by capability, and their types.
var providers = map[string]string{"kv": "store", "http": "web", "messaging": "bus", "provider": "billing"}

func typeOf(capability string) string {
	if capability == "provider" {
		return "external"
	}
	return capability
}

func newMatrix(t *testing.T) *matrix {
	t.Helper()
	m := &matrix{network: newNetwork(t)}
	messages, err := messaging.New(messaging.Options{})
	if err != nil {
		t.Fatal(err)
	}
	web, err := outbound.New(outbound.Options{})
	if err != nil {
		t.Fatal(err)
	}
	kinds := []provider.Kind{kv.New(kv.Options{}), web, messages, external.New(external.Options{})}
	for i, k := range kinds {
		kinds[i] = counted{k, &m.effects}
	}
	self := m.issue(t, identity.Node, "b", identity.RoleWorker)
	m.b = &agent{id: "b", dir: provider.NewDirectory("b"), host: provider.NewHost(slog.New(slog.DiscardHandler), kinds...)}
	m.b.router, err = provider.NewRouter(provider.RouterConfig{
		Directory: m.b.dir, Host: m.b.host, Kinds: kinds, Remote: m.client(t, m.pool(t, self)), SettleWithin: -1, Clock: clock(),
	})
	if err != nil {
		t.Fatal(err)
	}
	m.serve(t, m.listen("b:1"), self, served(remote.NewServer(m.b.router)))
	for capability, id := range providers {
		if err := m.b.host.Start(t.Context(), typeOf(capability), provider.Config{ID: id}); err != nil {
			t.Fatal(err)
		}
		m.b.dir.PutProvider(provider.ProviderRecord{ID: id, Type: typeOf(capability), Node: "b", Running: true})
	}
	t.Cleanup(func() { _ = m.b.host.Close(context.Background()) })
	m.b.dir.PutInstance(provider.InstanceRecord{ID: "here", Name: "here", Node: "b", NodeEpoch: 2, Generation: 3, Created: 11})
	m.b.dir.PutInstance(provider.InstanceRecord{ID: "far", Name: "far", Node: "a", NodeEpoch: 5, Generation: 3, Created: 12})
	m.here = m.b.router.Port("here", 3, 2)
	m.far = m.as(t, identity.Node, "a", identity.RoleWorker)
	return m
}

// as is a client of node b's server with a certificate of a subject.
func (m *matrix) as(t *testing.T, kind identity.Kind, name string, role identity.Role) pb.NodeAgentServiceClient {
	t.Helper()
	conn, err := m.pool(t, m.issue(t, kind, name, role)).Conn("passthrough:///b:1")
	if err != nil {
		t.Fatal(err)
	}
	return pb.NewNodeAgentServiceClient(conn)
}

func (m *matrix) grant(t *testing.T, capability string, texts []string) {
	t.Helper()
	for _, id := range []string{"here", "far"} {
		m.b.dir.PutAssignment(provider.Assignment{Instance: id, Provider: providers[capability], Permissions: permissions(t, texts...), Bucket: "b"})
	}
}

// try makes an attempt on both ways and checks what came of it.
func (m *matrix) try(t *testing.T, granted []string, x attempt, allowed bool) {
	t.Helper()
	before := m.effects.Load()
	_, err := m.here.Call(t.Context(), x.capability, x.operation, x.payload)
	if got := m.effects.Load() - before; allowed && (err != nil || got != 1) || !allowed && (!errors.Is(err, provider.ErrDenied) || got != 0) {
		t.Errorf("%v, %s %s %q on the node itself: %d effects and %v, want allowed %t", granted, x.capability, x.operation, x.resource, got, err, allowed)
	}
	before = m.effects.Load()
	_, err = m.far.InvokeCapability(t.Context(), m.request(x, instanceCaller("far", 3, 5)))
	denied := apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
	if got := m.effects.Load() - before; allowed && (err != nil || got != 1) || !allowed && (!denied || got != 0) {
		t.Errorf("%v, %s %s %q from another node: %d effects and %v, want allowed %t", granted, x.capability, x.operation, x.resource, got, err, allowed)
	}
}

func (m *matrix) request(x attempt, caller *pb.InvokeCapabilityRequest_Instance) *pb.InvokeCapabilityRequest {
	return &pb.InvokeCapabilityRequest{
		Caller: caller, ProviderId: providers[x.capability], Capability: x.capability, Operation: x.operation, Payload: x.payload,
	}
}

// pools are permissions of the grammar; sets are drawn from them, now and then with
// one of another capability, which must not matter.
var pools = map[string][]string{
	"kv": {
		"kv:read", "kv:write", "kv:delete", "kv:read:orders/", "kv:write:orders/", "kv:delete:orders/", "kv:read:orders", "kv:write:orders/1",
		"kv:delete:a:b", "kv:read:x", "kv:write:ORDERS/", "kv:read:orders/1/2",
	},
	"http": {
		"http:request", "http:request", "http:request", "http:domain:example.com", "http:domain:*.example.com", "http:domain:example.com:443",
		"http:domain:10.0.0.0/8", "http:domain:[2001:db8::1]", "http:domain:127.0.0.1:8080", "http:domain:other.org", "http:domain:10.1.2.3:80",
	},
	"messaging": {
		"msg:publish", "msg:subscribe", "msg:publish:orders.*", "msg:publish:orders.>", "msg:publish:orders.new", "msg:publish:>",
		"msg:subscribe:orders.*", "msg:subscribe:orders.>", "msg:subscribe:orders.new", "msg:subscribe:>", "msg:subscribe:*", "msg:publish:*.new",
	},
	"provider": {
		"provider:billing:*", "provider:billing:charge", "provider:billing:refund", "provider:billing:v1/charge", "provider:other:*",
		"provider:other:charge", "provider:billing-2:*", "provider:billing:Charge",
	},
}

func attempts(t *testing.T) map[string][]attempt {
	t.Helper()
	all := map[string][]attempt{}
	add := func(capability, operation, resource string, message proto.Message) {
		all[capability] = append(all[capability], attempt{capability, operation, resource, encode(t, message)})
	}
	for _, key := range []string{"orders/1", "orders/", "orders", "orders-old", "order", "x", "a:b:c", "ORDERS/1", "orders/1/2/3", "\xff\x00"} {
		k := []byte(key)
		add("kv", "get", key, &pb.KvGetRequest{Key: k})
		add("kv", "list", key, &pb.KvListRequest{Provider: "store", Prefix: k})
		add("kv", "set", key, &pb.KvSetRequest{Key: k, Value: k})
		add("kv", "cas", key, &pb.KvCasRequest{Provider: "store", Key: k})
		add("kv", "delete", key, &pb.KvDeleteRequest{Key: k})
	}
	for url, host := range map[string]string{
		"https://example.com/": "example.com:443", "http://example.com/x?y": "example.com:80", "https://EXAMPLE.com./": "example.com:443",
		"https://www.example.com/": "www.example.com:443", "https://a.b.example.com:444/": "a.b.example.com:444",
		"https://notexample.com/": "notexample.com:443", "https://example.com.evil.org/": "example.com.evil.org:443",
		"http://10.1.2.3/": "10.1.2.3:80", "http://11.1.2.3/": "11.1.2.3:80", "http://127.0.0.1:8080/": "127.0.0.1:8080",
		"http://127.0.0.1/": "127.0.0.1:80", "https://[2001:db8::1]/": "[2001:db8::1]:443", "https://[2001:DB8:0::1]:9/": "[2001:db8::1]:9",
		"https://other.org/": "other.org:443",
	} {
		add("http", "request", host, &pb.HttpRequest{Method: "GET", Url: url})
		add("http", "request", host, &pb.HttpRequest{Provider: "web", Method: "POST", Url: url, Body: []byte("x")})
	}
	for _, subject := range []string{"orders", "orders.new", "orders.new.eu", "users.new", "new"} {
		add("messaging", "publish", subject, &pb.MsgPublishRequest{Subject: subject})
		add("messaging", "request", subject, &pb.MsgRequestRequest{Subject: subject})
	}
	for _, pattern := range []string{"orders", "orders.new", "orders.new.eu", "users.new", "orders.*", "orders.>", "orders.*.eu", "*", ">", "*.new", "*.>"} {
		add("messaging", "subscribe", pattern, &pb.MsgSubscribeRequest{Subject: pattern})
		add("messaging", "unsubscribe", pattern, &pb.MsgUnsubscribeRequest{Provider: "bus", Subject: pattern})
	}
	for _, operation := range []string{"charge", "refund", "Charge", "charg", "charge/x", "v1/charge", "charge.v2"} {
		for _, id := range []string{"", "billing"} {
			add("provider", "call", operation, &pb.ProviderCallRequest{Provider: id, Operation: operation, Payload: []byte("x")})
		}
	}
	return all
}

// TestPermissionMatrix: a call gets through exactly when docs/permissions.md says
// so, on the node itself and from another one.
func TestPermissionMatrix(t *testing.T) {
	m := newMatrix(t)
	random := rand.New(rand.NewPCG(4, 2))
	names, all := slices.Sorted(maps.Keys(pools)), attempts(t)
	cases, yes := 0, 0
	for _, capability := range names {
		sets := [][]string{nil}
		for _, p := range pools[capability] {
			sets = append(sets, []string{p})
		}
		for range 40 {
			set := []string{}
			for range 2 + random.IntN(3) {
				from := capability
				if random.IntN(6) == 0 {
					from = names[random.IntN(len(names))]
				}
				set = append(set, pools[from][random.IntN(len(pools[from]))])
			}
			sets = append(sets, set)
		}
		for _, set := range sets {
			m.grant(t, capability, set)
			for _, x := range all[capability] {
				allowed := oracle(set, x)
				m.try(t, set, x, allowed)
				cases += 2
				if allowed {
					yes += 2
				}
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if cases < 5000 || yes < cases/10 || yes > cases*9/10 {
		t.Errorf("%d cases, %d of them allowed: that proves little", cases, yes)
	}
	t.Logf("%d cases, %d of them allowed", cases, yes)
}

// TestForgedCallsOfEveryOperation: whoever is not the instance's own node, or names
// anything else than what is known, gets nowhere, whatever the operation.
func TestForgedCallsOfEveryOperation(t *testing.T) {
	m := newMatrix(t)
	m.b.dir.PutInstance(provider.InstanceRecord{ID: "reborn", Name: "reborn", Node: "a", NodeEpoch: 5, Generation: 1, Created: 30})
	m.b.dir.PutInstance(provider.InstanceRecord{ID: "gone", Name: "gone", Node: "a", NodeEpoch: 5, Generation: 1, Created: 31})
	for capability, id := range providers {
		m.grant(t, capability, []string{"kv:read", "kv:write", "kv:delete", "http:request", "msg:publish", "msg:subscribe", "provider:billing:*"})
		for _, instance := range []string{"reborn", "gone"} {
			m.b.dir.PutAssignment(provider.Assignment{Instance: instance, Provider: id, Permissions: permissions(t, "kv:read", "http:request", "msg:publish", "provider:billing:*"), Bucket: "b"})
		}
	}
	m.b.dir.RemoveRemoteInstance("gone")
	const (
		denied   = pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
		noOne    = pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND
		conflict = pb.ErrorCode_ERROR_CODE_CONFLICT
		ok       = pb.ErrorCode_ERROR_CODE_UNSPECIFIED
	)
	worker := func(name string) pb.NodeAgentServiceClient { return m.as(t, identity.Node, name, identity.RoleWorker) }
	a, c, b := m.far, worker("c"), worker("b")
	peer, both := m.as(t, identity.Node, "p", identity.RoleServer), m.as(t, identity.Node, "pw", identity.RoleBoth)
	admin := m.as(t, identity.User, "a", identity.RoleAdmin)
	instance := func(id string, generation, epoch uint64) *pb.InvokeCapabilityRequest {
		return &pb.InvokeCapabilityRequest{Caller: instanceCaller(id, generation, epoch)}
	}
	limited := func(clock uint64) *pb.InvokeCapabilityRequest {
		req := instance("far", 3, 5)
		req.GetInstance().NotAfter, req.GetInstance().Clock = 1, clock
		return req
	}
	reading, err := a.ReadClock(t.Context(), &pb.ReadClockRequest{})
	if err != nil {
		t.Fatal(err)
	}
	user := func(name string) *pb.InvokeCapabilityRequest {
		return &pb.InvokeCapabilityRequest{Caller: userCaller(name)}
	}
	forged := []struct {
		name string
		by   pb.NodeAgentServiceClient
		req  *pb.InvokeCapabilityRequest
		want pb.ErrorCode
	}{
		{"the true one", a, instance("far", 3, 5), ok},
		{"an instance that there is not", a, instance("nobody", 3, 5), noOne},
		{"an instance that was removed", a, instance("gone", 1, 5), noOne},
		{"an instance of the serving node", a, instance("here", 3, 2), denied},
		{"an older generation", a, instance("far", 2, 5), denied},
		{"generation zero", a, instance("far", 0, 5), denied},
		{"a later generation", a, instance("far", 4, 5), denied},
		{"an older epoch of the node", a, instance("far", 3, 4), denied},
		{"a generation of an instance that had the id before", a, instance("reborn", 7, 5), denied},
		{"another node", c, instance("far", 3, 5), denied},
		{"the serving node", b, instance("far", 3, 5), denied},
		{"a peer", peer, instance("far", 3, 5), denied},
		{"a peer that is a worker too", both, instance("far", 3, 5), denied},
		{"a user with the name of the node", admin, instance("far", 3, 5), denied},
		{"a node as a user", a, user("alice"), denied},
		{"a user as another", admin, user("alice"), denied},
		{"a time that is over", a, limited(reading.GetClock().GetId()), conflict},
		{"a time of another clock", a, limited(reading.GetClock().GetId() + 2), conflict},
	}
	for _, list := range attempts(t) {
		seen := map[string]bool{}
		for _, x := range list {
			if seen[x.operation] {
				continue
			}
			seen[x.operation] = true
			for _, f := range forged {
				before := m.effects.Load()
				req, _ := proto.Clone(f.req).(*pb.InvokeCapabilityRequest)
				req.ProviderId, req.Capability, req.Operation, req.Payload = providers[x.capability], x.capability, x.operation, x.payload
				_, err := f.by.InvokeCapability(t.Context(), req)
				if got := m.effects.Load() - before; apierror.CodeOf(err) != f.want || (got == 1) != (f.want == ok) {
					t.Errorf("%s %s as %s: %d effects and %v, want %v", x.capability, x.operation, f.name, got, err, f.want)
				}
			}
		}
	}
}

// oracle says what docs/permissions.md says, in other words than package permission.
func oracle(granted []string, x attempt) bool {
	switch x.capability {
	case "kv":
		action := map[string]string{"get": "kv:read", "list": "kv:read", "set": "kv:write", "cas": "kv:write", "delete": "kv:delete"}[x.operation]
		return slices.ContainsFunc(granted, func(p string) bool {
			prefix, scoped := strings.CutPrefix(p, action+":")
			return p == action || scoped && strings.HasPrefix(x.resource, prefix)
		})
	case "http":
		narrowed := slices.ContainsFunc(granted, func(p string) bool { return strings.HasPrefix(p, "http:domain:") })
		return slices.ContainsFunc(granted, func(p string) bool { return p == "http:request" }) && (!narrowed || slices.ContainsFunc(granted, func(p string) bool {
			rule, domain := strings.CutPrefix(p, "http:domain:")
			return domain && hostMatches(rule, x.resource)
		}))
	case "messaging":
		action := map[string]string{"publish": "msg:publish", "request": "msg:publish", "subscribe": "msg:subscribe", "unsubscribe": "msg:subscribe"}[x.operation]
		return slices.ContainsFunc(granted, func(p string) bool {
			pattern, scoped := strings.CutPrefix(p, action+":")
			return p == action || scoped && subjectMatches(strings.Split(pattern, "."), strings.Split(x.resource, "."))
		})
	default:
		return slices.ContainsFunc(granted, func(p string) bool { return p == "provider:billing:*" || p == "provider:billing:"+x.resource })
	}
}

// hostMatches knows the rules of the pool: resource is host:port.
func hostMatches(rule, resource string) bool {
	i := strings.LastIndex(resource, ":")
	host := resource[:i]
	switch {
	case rule == "10.0.0.0/8":
		var x, y, z int
		n, err := fmt.Sscanf(host, "10.%d.%d.%d", &x, &y, &z)
		return n == 3 && err == nil
	case strings.HasPrefix(rule, "*."):
		return strings.HasSuffix(host, rule[1:]) && len(host) > len(rule[1:])
	case strings.HasPrefix(rule, "[") && strings.HasSuffix(rule, "]"), !strings.Contains(rule, ":"):
		return rule == host
	default:
		return rule == resource
	}
}

// subjectMatches goes token by token: "*" is any one, a final ">" is one or more.
func subjectMatches(pattern, subject []string) bool {
	switch {
	case len(pattern) == 0 || len(subject) == 0:
		return len(pattern) == 0 && len(subject) == 0
	case pattern[0] == ">":
		return true
	case subject[0] == ">":
		return false
	case pattern[0] == "*" || pattern[0] == subject[0]:
		return subjectMatches(pattern[1:], subject[1:])
	default:
		return false
	}
}
