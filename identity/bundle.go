package identity

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

const (
	certFile = "node.crt"
	keyFile  = "node.key"
)

// Bundle is everything one subject needs to take part in a cluster, each part as PEM.
type Bundle struct {
	// Certificate is the subject's certificate.
	Certificate []byte
	// Key is the subject's private key in PKCS #8.
	Key []byte
	// CA is the certificate of the cluster's authority. It may hold several, so
	// that both the old and the new one are trusted while an authority is replaced.
	CA []byte
}

// Save writes the bundle to dir as node.crt, node.key and ca.crt, the key
// readable by its owner only. It makes dir when it does not exist. Each file is
// replaced as a whole or not at all.
func (b *Bundle) Save(dir string) error {
	err := writeFiles(dir, []file{
		{name: caCertFile, data: b.CA, mode: 0o644},
		{name: keyFile, data: b.Key, mode: 0o600},
		{name: certFile, data: b.Certificate, mode: 0o644},
	})
	if err != nil {
		return fmt.Errorf("save certificate: %w", err)
	}
	return nil
}

// LoadBundle reads what Save wrote. It does not check that the parts fit together; FromBundle does.
func LoadBundle(dir string) (*Bundle, error) {
	b := &Bundle{}
	for name, into := range map[string]*[]byte{certFile: &b.Certificate, keyFile: &b.Key, caCertFile: &b.CA} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("load certificate: %w", err)
		}
		*into = data
	}
	return b, nil
}

type file struct {
	name string
	data []byte
	mode os.FileMode
}

// writeFiles replaces files in dir. All are on disk under temporary names before
// the first is renamed, so that a full disk leaves the old set alone.
func writeFiles(dir string, files []file) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var staged []string
	defer func() {
		for _, path := range staged {
			_ = os.Remove(path)
		}
	}()
	for _, f := range files {
		path, err := stage(dir, f)
		if err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
		staged = append(staged, path)
	}
	for i, f := range files {
		if err := os.Rename(staged[i], filepath.Join(dir, f.name)); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

func stage(dir string, f file) (path string, err error) {
	tmp, err := os.CreateTemp(dir, "."+f.name+".*")
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, tmp.Close())
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	if err := tmp.Chmod(f.mode); err != nil {
		return "", err
	}
	if _, err := tmp.Write(f.data); err != nil {
		return "", err
	}
	return tmp.Name(), tmp.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// errNoCertificate: a file that should hold a certificate holds none.
var errNoCertificate = errors.New("no PEM certificate found")

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errNoCertificate
	}
	return out, nil
}

func parseKey(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("no PEM private key found")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("the private key cannot sign")
	}
	return signer, nil
}
