package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/identity"
)

func newCA(t *testing.T, cluster string) *identity.CA {
	t.Helper()
	ca, err := identity.NewCA(cluster)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *identity.CA, kind identity.Kind, name string, role identity.Role) *identity.Identity {
	t.Helper()
	b, err := ca.Issue(identity.Subject{Kind: kind, Name: name, Role: role}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// handshake runs a TLS handshake and one byte each way, and returns what the client and the server got.
func handshake(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	done := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = raw.Close() }()
		conn := tls.Server(raw, server)
		if err := conn.Handshake(); err != nil {
			done <- err
			return
		}
		_, err = conn.Write([]byte("x"))
		done <- err
	}()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", l.Addr().String(), client)
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		_ = conn.Close()
	} else {
		_ = l.Close()
	}
	return err, <-done
}

func TestHandshakeAcceptsOnlyTheMeantSubjects(t *testing.T) {
	ca, other := newCA(t, "dev"), newCA(t, "dev")
	server := issue(t, ca, identity.Node, "n1", identity.RoleBoth)
	worker := issue(t, ca, identity.Node, "w1", identity.RoleWorker)
	user := issue(t, ca, identity.User, "ann", identity.RoleAdmin)
	stranger := issue(t, other, identity.Node, "n1", identity.RoleBoth)

	tests := []struct {
		name       string
		client     *tls.Config
		server     *tls.Config
		wantClient error
		wantRemote string
	}{
		{name: "a worker calls a peer", client: worker.ClientTLS(identity.Subject.IsPeer), server: server.ServerTLS()},
		{name: "a user calls any node", client: user.ClientTLS(nil), server: worker.ServerTLS()},
		{name: "the server is not of the allowed kind", client: user.ClientTLS(identity.Subject.IsPeer), server: worker.ServerTLS(), wantClient: identity.ErrNotAllowed},
		{name: "the server is of another authority with the same name", client: user.ClientTLS(nil), server: stranger.ServerTLS(), wantClient: identity.ErrUntrusted},
		{name: "the client is of another authority with the same name", client: trusting(stranger), server: server.ServerTLS(), wantRemote: "unknown certificate authority"},
		{name: "a user cannot serve", client: worker.ClientTLS(nil), server: user.ServerTLS(), wantClient: identity.ErrUntrusted},
		{name: "a client without a certificate", client: &tls.Config{InsecureSkipVerify: true}, server: server.ServerTLS(), wantRemote: "certificate required"},
		{name: "TLS 1.2 is refused", client: withMaxVersion(user.ClientTLS(nil), tls.VersionTLS12), server: server.ServerTLS(), wantRemote: "protocol version"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, gotServer := handshake(t, tt.client, tt.server)
			switch {
			case tt.wantClient != nil:
				if !errors.Is(got, tt.wantClient) {
					t.Errorf("client got %v, want %v", got, tt.wantClient)
				}
			case tt.wantRemote != "":
				if got == nil || !strings.Contains(got.Error(), tt.wantRemote) || gotServer == nil {
					t.Errorf("client got %v, server got %v, want both to fail with %q", got, gotServer, tt.wantRemote)
				}
			case got != nil || gotServer != nil:
				t.Errorf("client got %v, server got %v, want success", got, gotServer)
			}
		})
	}
}

// trusting returns a client configuration with client's certificate that does not
// look at the server, as an attacker would use it.
func trusting(client *identity.Identity) *tls.Config {
	c := client.ClientTLS(nil)
	c.VerifyConnection = nil
	return c
}

func withMaxVersion(c *tls.Config, v uint16) *tls.Config {
	c.MinVersion, c.MaxVersion = tls.VersionTLS12, v
	return c
}

func TestSubjectOfAnotherClusterIsRefusedEvenFromATrustedAuthority(t *testing.T) {
	dev, prod := newCA(t, "dev"), newCA(t, "prod")
	both := func(ca *identity.CA, name string) *identity.Identity {
		b, err := ca.Issue(identity.Subject{Kind: identity.Node, Name: name, Role: identity.RoleServer}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		b.CA = append(append([]byte{}, dev.Certificate()...), prod.Certificate()...)
		id, err := identity.FromBundle(b)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	a, b := both(dev, "n1"), both(prod, "n1")
	if err, _ := handshake(t, a.ClientTLS(nil), b.ServerTLS()); !errors.Is(err, identity.ErrWrongCluster) {
		t.Errorf("client got %v, want ErrWrongCluster", err)
	}
	if _, err := handshake(t, trusting(b), a.ServerTLS()); !errors.Is(err, identity.ErrWrongCluster) {
		t.Errorf("server got %v, want ErrWrongCluster", err)
	}
}

func TestExpiredCertificateIsRefusedWithItsName(t *testing.T) {
	ca := newCA(t, "dev")
	b, err := ca.Issue(identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}, time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	_, err = identity.FromBundle(b)
	if !errors.Is(err, identity.ErrExpired) || !strings.Contains(err.Error(), "spiffe://dev/user/ann/admin expired at") {
		t.Errorf("got %v, want ErrExpired that names the subject", err)
	}
}

func TestBundleSurvivesSaveAndLoad(t *testing.T) {
	ca := newCA(t, "dev")
	dir := filepath.Join(t.TempDir(), "ca")
	if err := ca.Save(dir); err != nil {
		t.Fatal(err)
	}
	loaded, err := identity.LoadCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	if loaded.Cluster() != "dev" || loaded.Fingerprint() != ca.Fingerprint() {
		t.Errorf("loaded authority of %q %s, want dev %s", loaded.Cluster(), loaded.Fingerprint(), ca.Fingerprint())
	}
	b, err := loaded.Issue(identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleBoth}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	nodeDir := filepath.Join(t.TempDir(), "n1")
	for range 2 {
		if err := b.Save(nodeDir); err != nil {
			t.Fatal(err)
		}
	}
	id, err := identity.Load(nodeDir)
	if err != nil {
		t.Fatal(err)
	}
	if got := id.Self().String(); got != "spiffe://dev/node/n1/both" {
		t.Errorf("loaded %s", got)
	}
	for _, key := range []string{filepath.Join(dir, "ca.key"), filepath.Join(nodeDir, "node.key")} {
		info, err := os.Stat(key)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", key, info.Mode().Perm())
		}
	}
	entries, err := os.ReadDir(nodeDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 3 {
		t.Errorf("%d files after saving twice, want 3: no temporary file stays", len(entries))
	}
}

func TestFromBundleRefusesPartsThatDoNotFit(t *testing.T) {
	ca, other := newCA(t, "dev"), newCA(t, "dev")
	subject := identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleBoth}
	good, err := ca.Issue(subject, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	second, err := ca.Issue(subject, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]*identity.Bundle{
		"another key":        {Certificate: good.Certificate, Key: second.Key, CA: good.CA},
		"another authority":  {Certificate: good.Certificate, Key: good.Key, CA: other.Certificate()},
		"no authority":       {Certificate: good.Certificate, Key: good.Key},
		"not PEM":            {Certificate: []byte("x"), Key: good.Key, CA: good.CA},
		"authority as leaf":  {Certificate: ca.Certificate(), Key: good.Key, CA: good.CA},
		"key in place of CA": {Certificate: good.Certificate, Key: good.Key, CA: good.Key},
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := identity.FromBundle(b); err == nil {
				t.Error("it was accepted")
			}
		})
	}
}

func TestIssueRefusesWhatIsNoSubjectOfTheCluster(t *testing.T) {
	ca := newCA(t, "dev")
	tests := map[string]identity.Subject{
		"another cluster": {Cluster: "prod", Kind: identity.Node, Name: "n1", Role: identity.RoleBoth},
		"no name":         {Kind: identity.Node, Role: identity.RoleBoth},
		"slash in name":   {Kind: identity.Node, Name: "a/b", Role: identity.RoleBoth},
		"upper case":      {Kind: identity.Node, Name: "N1", Role: identity.RoleBoth},
		"node as admin":   {Kind: identity.Node, Name: "n1", Role: identity.RoleAdmin},
		"user as server":  {Kind: identity.User, Name: "ann", Role: identity.RoleServer},
	}
	for name, s := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := ca.Issue(s, time.Hour); err == nil {
				t.Errorf("%s was certified", s)
			}
		})
	}
	if _, err := identity.NewCA("Dev Cluster"); err == nil {
		t.Error("a cluster name with a space was accepted")
	}
}

func TestCertificateDoesNotOutliveItsAuthority(t *testing.T) {
	ca := newCA(t, "dev")
	b, err := ca.Issue(identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleBoth}, 50*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if got, limit := notAfter(t, b.Certificate), notAfter(t, ca.Certificate()); got.After(limit) {
		t.Errorf("certificate ends %s, its authority %s", got, limit)
	}
}

func notAfter(t *testing.T, data []byte) time.Time {
	t.Helper()
	block, _ := pem.Decode(data)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert.NotAfter
}
