package identity

import (
	"context"
	"fmt"
	"net/url"
	"strings"
)

// Kind tells nodes from users.
type Kind string

// The kinds of subject.
const (
	Node Kind = "node"
	User Kind = "user"
)

// Role says what a subject may be.
type Role string

// The roles of a node: a control-plane peer, a worker, or both; and the roles
// of a user.
const (
	RoleServer Role = "server"
	RoleWorker Role = "worker"
	RoleBoth   Role = "both"
	RoleAdmin  Role = "admin"
)

// Subject is who a certificate speaks for. In a certificate it stands as the
// URI spiffe://<cluster>/<kind>/<name>/<role>.
type Subject struct {
	// Cluster is the cluster's name.
	Cluster string
	// Kind is Node or User.
	Kind Kind
	// Name is the node's id or the user's name.
	Name string
	// Role is what the subject may be.
	Role Role
}

// IsPeer reports whether s is a control-plane peer.
func (s Subject) IsPeer() bool {
	return s.Kind == Node && (s.Role == RoleServer || s.Role == RoleBoth)
}

// IsWorker reports whether s is the agent of a worker node.
func (s Subject) IsWorker() bool {
	return s.Kind == Node && (s.Role == RoleWorker || s.Role == RoleBoth)
}

// IsAdmin reports whether s is a user who may do everything.
func (s Subject) IsAdmin() bool { return s.Kind == User && s.Role == RoleAdmin }

// String returns the subject as its URI.
func (s Subject) String() string {
	return fmt.Sprintf("spiffe://%s/%s/%s/%s", s.Cluster, s.Kind, s.Name, s.Role)
}

// ParseSubject reads a subject from its URI. It refuses anything but the exact form.
func ParseSubject(uri string) (Subject, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Subject{}, fmt.Errorf("parse subject %q: %w", uri, err)
	}
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	s := Subject{Cluster: u.Host}
	if len(parts) == 3 {
		s.Kind, s.Name, s.Role = Kind(parts[0]), parts[1], Role(parts[2])
	}
	nodeOK := s.Kind == Node && (s.IsPeer() || s.IsWorker())
	userOK := s.Kind == User && s.Role == RoleAdmin
	if u.Scheme != "spiffe" || s.Cluster == "" || s.Name == "" || !nodeOK && !userOK || s.String() != uri {
		return Subject{}, fmt.Errorf("parse subject %q: want spiffe://<cluster>/<node|user>/<name>/<role>", uri)
	}
	return s, nil
}

type callerKey struct{}

// WithCaller returns a context that carries the authenticated caller of a request.
func WithCaller(ctx context.Context, s Subject) context.Context {
	return context.WithValue(ctx, callerKey{}, s)
}

// Caller returns the authenticated caller of the request that ctx belongs to.
// It reports false outside a request.
func Caller(ctx context.Context) (Subject, bool) {
	s, ok := ctx.Value(callerKey{}).(Subject)
	return s, ok
}
