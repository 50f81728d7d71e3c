package setting_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

func file(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// certificate returns files with a certificate and its key.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) string {
		return file(t, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})))
	}
	return block("CERTIFICATE", der), block("PRIVATE KEY", secret)
}

func TestFilesMustBeThere(t *testing.T) {
	there := file(t, "")
	r := setting.New("kv", "nats", map[string]string{"a": there, "empty": ""})
	if got := r.File("a") + r.File("empty") + r.File("none"); got != there || r.Done() != nil {
		t.Errorf("got %q, %v", got, r.Done())
	}
	missing := filepath.Join(t.TempDir(), "no")
	for _, c := range []struct {
		step string
		read func(*setting.Reader)
	}{
		{"stat", func(r *setting.Reader) { r.File("a") }},
		{"open", func(r *setting.Reader) { r.Secret("a") }},
		{"open", func(r *setting.Reader) { r.AddCertificates("a", x509.NewCertPool()) }},
	} {
		r := setting.New("kv", "nats", map[string]string{"a": missing})
		c.read(r)
		refused(t, r, "a", "setting a of kv driver nats: "+c.step+" "+missing+": no such file or directory")
		e, _ := errors.AsType[*provider.Error](r.Done())
		if e.Details["file"] != missing || e.Next == "" || !errors.Is(e, fs.ErrNotExist) {
			t.Errorf("%+v", e)
		}
	}
}

func TestSecretsAreReadAnew(t *testing.T) {
	name := file(t, "one\r\n")
	r := setting.New("kv", "redis", map[string]string{"p": name, "empty": ""})
	secret := r.Secret("p")
	if r.Secret("empty") != nil || r.Secret("none") != nil {
		t.Error("a secret that is not given")
	}
	if got, err := secret(); got != "one" || err != nil || r.Done() != nil {
		t.Errorf("got %q, %v, %v", got, err, r.Done())
	}
	if err := os.WriteFile(name, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := secret(); got != "two" || err != nil {
		t.Errorf("after a change: %q, %v", got, err)
	}
	void := file(t, "\n")
	r = setting.New("kv", "redis", map[string]string{"p": void})
	r.Secret("p")
	refused(t, r, "p", "setting p of kv driver redis: file "+void+" is empty")
}

func TestTLSIsReadFromFiles(t *testing.T) {
	cert, key := certificate(t)
	r := setting.New("kv", "redis", map[string]string{
		"tls_ca_file": cert, "tls_cert_file": cert, "tls_key_file": key, "tls_server_name": "db",
	})
	all := r.TLS("tls_")
	cfg := all.Config()
	if err := r.Done(); err != nil || !all.Given() {
		t.Fatalf("%v, %v", all.Given(), err)
	}
	if cfg.ServerName != "db" || len(cfg.Certificates) != 1 || cfg.RootCAs == nil || cfg.MinVersion == 0 {
		t.Errorf("got %+v", cfg)
	}
	r = setting.New("external", "grpc", map[string]string{"server_name": ""})
	none := r.TLS("")
	if cfg := none.Config(); none.Given() || r.Done() != nil || cfg.RootCAs != nil || cfg.Certificates != nil {
		t.Errorf("nothing is given: %+v, %v", cfg, r.Done())
	}
}

func TestTLSFilesAreChecked(t *testing.T) {
	cert, key := certificate(t)
	text := file(t, "text")
	for _, c := range []struct {
		given     map[string]string
		name, why string
	}{
		{map[string]string{"ca_file": text}, "ca_file", "setting ca_file of external driver grpc: " + text + " holds no certificate in PEM form"},
		{map[string]string{"cert_file": cert}, "key_file", "external driver grpc needs both of cert_file and key_file, or neither"},
		{map[string]string{"key_file": key}, "cert_file", "external driver grpc needs both of cert_file and key_file, or neither"},
		{
			map[string]string{"cert_file": cert, "key_file": text},
			"cert_file",
			"settings cert_file and key_file of external driver grpc: tls: failed to find any PEM data in key input",
		},
	} {
		r := setting.New("external", "grpc", c.given)
		r.TLS("").Config()
		refused(t, r, c.name, c.why)
	}
}
