package identity_test

import (
	"testing"

	"github.com/wasmatrix/wasmatrix/identity"
)

func TestParseSubjectTakesTheExactFormOnly(t *testing.T) {
	for uri, want := range map[string]identity.Subject{
		"spiffe://dev/node/n1/server":     {Cluster: "dev", Kind: identity.Node, Name: "n1", Role: identity.RoleServer},
		"spiffe://dev/node/n1/worker":     {Cluster: "dev", Kind: identity.Node, Name: "n1", Role: identity.RoleWorker},
		"spiffe://dev/node/n1/both":       {Cluster: "dev", Kind: identity.Node, Name: "n1", Role: identity.RoleBoth},
		"spiffe://dev/user/ann/admin":     {Cluster: "dev", Kind: identity.User, Name: "ann", Role: identity.RoleAdmin},
		"":                                {},
		"https://dev/node/n1/server":      {},
		"spiffe://dev/node/n1":            {},
		"spiffe://dev/node/n1/server/x":   {},
		"spiffe://dev/node/n1/server/":    {},
		"spiffe://dev//n1/server":         {},
		"spiffe:///node/n1/server":        {},
		"spiffe://dev/node//server":       {},
		"spiffe://dev/node/n1/admin":      {},
		"spiffe://dev/user/ann/server":    {},
		"spiffe://dev/user/ann/viewer":    {},
		"spiffe://dev/robot/r1/server":    {},
		"spiffe://a@dev/node/n1/server":   {},
		"spiffe://dev/node/n1/server?x=1": {},
		"spiffe://dev/node/n1/server#x":   {},
		"spiffe://dev/node/n%31/server":   {},
		"SPIFFE://dev/node/n1/server":     {},
	} {
		got, err := identity.ParseSubject(uri)
		if got != want || (err == nil) != (want != identity.Subject{}) {
			t.Errorf("ParseSubject(%q) = %+v, %v, want %+v", uri, got, err, want)
		}
	}
}

func TestRolesOfASubject(t *testing.T) {
	for _, tt := range []struct {
		kind                identity.Kind
		role                identity.Role
		peer, worker, admin bool
	}{
		{kind: identity.Node, role: identity.RoleServer, peer: true},
		{kind: identity.Node, role: identity.RoleWorker, worker: true},
		{kind: identity.Node, role: identity.RoleBoth, peer: true, worker: true},
		{kind: identity.User, role: identity.RoleAdmin, admin: true},
		{kind: identity.User, role: identity.RoleServer},
		{kind: identity.Node, role: identity.RoleAdmin},
	} {
		s := identity.Subject{Cluster: "dev", Kind: tt.kind, Name: "x", Role: tt.role}
		if s.IsPeer() != tt.peer || s.IsWorker() != tt.worker || s.IsAdmin() != tt.admin {
			t.Errorf("%s: peer %v, worker %v, admin %v", s, s.IsPeer(), s.IsWorker(), s.IsAdmin())
		}
	}
}
