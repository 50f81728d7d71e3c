package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Sentinels that the errors of this package wrap.
var (
	// ErrExpired: a certificate is not valid at this time, by the local clock.
	ErrExpired = errors.New("certificate is not valid now")
	// ErrUntrusted: a certificate was not issued by the cluster's authority.
	ErrUntrusted = errors.New("certificate was not issued by this cluster's authority")
	// ErrWrongCluster: a certificate speaks for another cluster.
	ErrWrongCluster = errors.New("certificate belongs to another cluster")
	// ErrNotAllowed: the other side is who it says, and not who this connection is for.
	ErrNotAllowed = errors.New("subject is not allowed on this connection")
)

// Identity is one subject's certificate and key, and the authority it trusts. It
// is safe for concurrent use and not changed after it was made.
type Identity struct {
	self  Subject
	cert  tls.Certificate
	leaf  *x509.Certificate
	roots *x509.CertPool
	over  Network // nil for the machine's own
}

// Load reads a bundle from dir and checks it as FromBundle does.
func Load(dir string) (*Identity, error) {
	b, err := LoadBundle(dir)
	if err != nil {
		return nil, err
	}
	id, err := FromBundle(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return id, nil
}

// FromBundle makes an identity. It refuses a bundle whose parts do not belong
// together, a certificate that is expired (ErrExpired) and one that its
// authority did not issue (ErrUntrusted).
func FromBundle(b *Bundle) (*Identity, error) {
	authorities, err := parseCertificates(b.CA)
	if err != nil {
		return nil, fmt.Errorf("read authority's certificate: %w", err)
	}
	cert, err := tls.X509KeyPair(b.Certificate, b.Key)
	if err != nil {
		return nil, fmt.Errorf("read certificate and key: %w", err)
	}
	id := &Identity{cert: cert, leaf: cert.Leaf, roots: x509.NewCertPool()}
	for _, ca := range authorities {
		id.roots.AddCert(ca)
	}
	if id.self, err = subjectOf(id.leaf); err != nil {
		return nil, err
	}
	if err := id.verify([]*x509.Certificate{id.leaf}, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("own certificate: %w", err)
	}
	return id, nil
}

// Self returns the subject that the identity speaks for.
func (id *Identity) Self() Subject { return id.self }

// Expires returns when the identity's certificate ends.
func (id *Identity) Expires() time.Time { return id.leaf.NotAfter }

// ServerTLS returns the configuration of a server that accepts subjects of its
// own cluster only. Each call returns a new one that the caller may change.
func (id *Identity) ServerTLS() *tls.Config {
	return id.serverTLS(func(Subject) bool { return true })
}

// ClientTLS returns the configuration of a client that talks only to a node of
// its own cluster for which allow returns true; nil allows every node. The
// address that was dialled plays no part. Each call returns a new one that the
// caller may change.
func (id *Identity) ClientTLS(allow func(Subject) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			// The other side would only say "expired certificate", not whose.
			if err := checkTime(id.leaf); err != nil {
				return nil, fmt.Errorf("own certificate: %w", err)
			}
			return &id.cert, nil
		},
		RootCAs: id.roots,
		// The chain and the subject are checked below; what is left out is only
		// the comparison with the host name that was dialled.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			server, err := id.authenticate(cs, x509.ExtKeyUsageServerAuth)
			if err != nil {
				return err
			}
			if server.Kind != Node || allow != nil && !allow(server) {
				return fmt.Errorf("%w: %s answered; check that this address and port belong to the kind of node meant here",
					ErrNotAllowed, server)
			}
			return nil
		},
	}
}

func (id *Identity) serverTLS(allow func(Subject) bool) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    id.roots,
		VerifyConnection: func(cs tls.ConnectionState) error {
			client, err := id.authenticate(cs, x509.ExtKeyUsageClientAuth)
			if err != nil {
				return err
			}
			if !allow(client) {
				return fmt.Errorf("%w: %s called", ErrNotAllowed, client)
			}
			return nil
		},
	}
}

// authenticate checks the other side's chain, also on a resumed session, and
// returns its subject.
func (id *Identity) authenticate(cs tls.ConnectionState, usage x509.ExtKeyUsage) (Subject, error) {
	if len(cs.PeerCertificates) == 0 {
		return Subject{}, fmt.Errorf("%w: it sent none", ErrUntrusted)
	}
	if err := id.verify(cs.PeerCertificates, usage); err != nil {
		return Subject{}, err
	}
	s, err := subjectOf(cs.PeerCertificates[0])
	if err != nil {
		return Subject{}, err
	}
	if s.Cluster != id.self.Cluster {
		return Subject{}, fmt.Errorf("%w: it is %s and this is cluster %s; use the context of that cluster", ErrWrongCluster, s, id.self.Cluster)
	}
	return s, nil
}

func (id *Identity) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	if err := checkTime(chain[0]); err != nil {
		return err
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         id.roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	var unknown x509.UnknownAuthorityError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		return fmt.Errorf("%w: %s was issued by %s; use the certificate files of this cluster", ErrUntrusted, nameOf(chain[0]), chain[0].Issuer.CommonName)
	default:
		return fmt.Errorf("%w: %s: %w", ErrUntrusted, nameOf(chain[0]), err)
	}
}

func checkTime(cert *x509.Certificate) error {
	now := time.Now()
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("%w: %s expired at %s, %s ago; issue a new one",
			ErrExpired, nameOf(cert), cert.NotAfter.UTC().Format(time.RFC3339), now.Sub(cert.NotAfter).Round(time.Second))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%w: %s begins at %s, in %s; compare the clocks of both machines",
			ErrExpired, nameOf(cert), cert.NotBefore.UTC().Format(time.RFC3339), cert.NotBefore.Sub(now).Round(time.Second))
	}
	return nil
}

// subjectOf reads the subject from a certificate, which must carry that one URI and no other name.
func subjectOf(cert *x509.Certificate) (Subject, error) {
	if len(cert.URIs) != 1 || len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) > 0 {
		return Subject{}, fmt.Errorf("%w: %s does not carry exactly one wasmatrix subject", ErrUntrusted, nameOf(cert))
	}
	s, err := ParseSubject(cert.URIs[0].String())
	if err != nil {
		return Subject{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	return s, nil
}

// nameOf names a certificate for an error, also one that is not ours.
func nameOf(cert *x509.Certificate) string {
	if len(cert.URIs) == 1 {
		return cert.URIs[0].String()
	}
	return fmt.Sprintf("%q", cert.Subject.CommonName)
}
