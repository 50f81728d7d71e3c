package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

const (
	caCertFile = "ca.crt"
	caKeyFile  = "ca.key"

	// caLifetime is how long a new authority is valid.
	caLifetime = 10 * 365 * 24 * time.Hour
	// clockSkew is how far a new certificate reaches into the past, so that a
	// machine whose clock is a little late accepts it.
	clockSkew = 5 * time.Minute
)

// namePattern is what a cluster, a node and a user may be called.
var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CA is the certificate authority of one cluster. It is safe for concurrent use.
type CA struct {
	cluster string
	cert    *x509.Certificate
	key     crypto.Signer
}

// NewCA makes an authority with a new ECDSA P-256 key, valid for ten years. The
// cluster's name is 1 to 63 lower-case letters, digits and inner dashes.
func NewCA(cluster string) (*CA, error) {
	if !namePattern.MatchString(cluster) {
		return nil, fmt.Errorf("make certificate authority: cluster name %q: want 1 to 63 lower-case letters, digits and inner dashes", cluster)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make certificate authority: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"wasmatrix"}, CommonName: cluster + " authority"},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: cluster}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make certificate authority: %w", err)
	}
	return &CA{cluster: cluster, cert: cert, key: key}, nil
}

// LoadCA reads an authority that Save wrote to dir.
func LoadCA(dir string) (*CA, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, caCertFile))
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %w", err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %w", err)
	}
	certs, err := parseCertificates(certPEM)
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %s: %w", caCertFile, err)
	}
	cert := certs[0]
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %s: %w", caKeyFile, err)
	}
	if !samePublicKey(cert.PublicKey, key.Public()) {
		return nil, fmt.Errorf("load certificate authority: %s and %s in %s do not belong together", caCertFile, caKeyFile, dir)
	}
	if !cert.IsCA || len(cert.URIs) != 1 || cert.URIs[0].Scheme != "spiffe" {
		return nil, fmt.Errorf("load certificate authority: %s in %s is not the certificate of a wasmatrix authority", caCertFile, dir)
	}
	return &CA{cluster: cert.URIs[0].Host, cert: cert, key: key}, nil
}

// Save writes the authority to dir as ca.crt and ca.key, the key readable by its
// owner only. It makes dir when it does not exist.
func (c *CA) Save(dir string) error {
	keyPEM, err := encodeKey(c.key)
	if err != nil {
		return fmt.Errorf("save certificate authority: %w", err)
	}
	err = writeFiles(dir, []file{
		{name: caKeyFile, data: keyPEM, mode: 0o600},
		{name: caCertFile, data: c.Certificate(), mode: 0o644},
	})
	if err != nil {
		return fmt.Errorf("save certificate authority: %w", err)
	}
	return nil
}

// Cluster returns the name of the cluster the authority speaks for.
func (c *CA) Cluster() string { return c.cluster }

// Certificate returns the authority's certificate as PEM.
func (c *CA) Certificate() []byte { return encodeCertificate(c.cert.Raw) }

// Fingerprint returns the SHA-256 of the authority's public key in lower-case
// hex; it is what a join token pins.
func (c *CA) Fingerprint() string {
	sum := sha256.Sum256(c.cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Issue makes a key and a certificate for s that is valid for ttl from now, but
// no longer than the authority itself. An empty s.Cluster means the authority's
// own; another one is refused.
func (c *CA) Issue(s Subject, ttl time.Duration) (*Bundle, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	certPEM, err := c.Sign(key.Public(), s, ttl)
	if err != nil {
		return nil, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	return &Bundle{Certificate: certPEM, Key: keyPEM, CA: c.Certificate()}, nil
}

// Sign certifies a public key whose private half stays with its owner, and
// returns the certificate as PEM. The rules for s and ttl are those of Issue.
func (c *CA) Sign(public crypto.PublicKey, s Subject, ttl time.Duration) ([]byte, error) {
	if s.Cluster == "" {
		s.Cluster = c.cluster
	}
	if s.Cluster != c.cluster {
		return nil, fmt.Errorf("issue certificate for %s: this is the authority of cluster %s", s, c.cluster)
	}
	if _, err := ParseSubject(s.String()); err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	if !namePattern.MatchString(s.Name) {
		return nil, fmt.Errorf("issue certificate: name %q: want 1 to 63 lower-case letters, digits and inner dashes", s.Name)
	}
	if ttl <= 0 {
		return nil, fmt.Errorf("issue certificate for %s: lifetime %s is not positive", s, ttl)
	}
	now := time.Now()
	uri, err := url.Parse(s.String())
	if err != nil {
		return nil, fmt.Errorf("issue certificate for %s: %w", s, err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"wasmatrix"}, CommonName: s.Name},
		URIs:                  []*url.URL{uri},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              earlier(now.Add(ttl), c.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if s.Kind == Node {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	cert, err := sign(template, c.cert, public, c.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate for %s: %w", s, err)
	}
	return encodeCertificate(cert.Raw), nil
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func samePublicKey(a, b crypto.PublicKey) bool {
	own, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && own.Equal(b)
}
