package kv_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
)

func file(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// refused opens a provider that must not open, and returns why as a user sees it.
func refused(t *testing.T, driver string, settings map[string]string, kind error, mentions string) string {
	t.Helper()
	var log bytes.Buffer
	k := kv.New(kv.Options{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	begin := time.Now()
	p, err := k.Open(t.Context(), provider.Config{ID: "kv", Driver: driver, Settings: settings})
	if err == nil {
		t.Errorf("%s %v: it opened", driver, settings)
		_ = p.Close()
		return ""
	}
	if took := time.Since(begin); took > patience {
		t.Errorf("%s %v: it took %v", driver, settings, took)
	}
	var e *provider.Error
	if !errors.Is(err, kind) || !errors.As(err, &e) || !strings.Contains(err.Error()+e.Next, mentions) {
		t.Errorf("%s %v: %v, want %v that mentions %q", driver, settings, err, kind, mentions)
		return ""
	}
	if e.Next == "" && !errors.Is(kind, provider.ErrInvalid) {
		t.Errorf("%s %v: %v says nothing of what to do", driver, settings, err)
	}
	return err.Error() + e.Next + log.String()
}

func TestServerSettingsAreChecked(t *testing.T) {
	secret := file(t, "s3cret\n")
	tests := []struct {
		driver   string
		settings map[string]string
		mentions string
	}{
		{"redis", nil, "needs the setting url, for example redis://127.0.0.1:6379"},
		{"redis", map[string]string{"url": "http://h"}, "must begin with redis:// or rediss://"},
		{"redis", map[string]string{"url": "redis://u:s3cret@h"}, "password_file"},
		{"redis", map[string]string{"url": "redis://u:s3cret@h:x:y/%zz"}, "password_file"},
		{"redis", map[string]string{"url": "redis://h/x"}, "number of a database"},
		{"redis", map[string]string{"url": "redis://h/1", "cluster": "true"}, "none for a cluster"},
		{"redis", map[string]string{"url": "redis://h,i"}, "cluster=true"},
		{"redis", map[string]string{"url": "redis://"}, "expected host or host:port"},
		{"redis", map[string]string{"url": "redis://h?password=s3cret"}, "takes no options"},
		{"redis", map[string]string{"url": "redis://h", "pasword": "x"}, "has no setting pasword; expected url, username, password_file"},
		{"redis", map[string]string{"url": "redis://h", "timeout": "fast"}, "expected a duration"},
		{"redis", map[string]string{"url": "redis://h", "timeout": "1h"}, "from 10ms to 1m"},
		{"redis", map[string]string{"url": "redis://h", "pool_size": "0"}, "from 1 to 4096"},
		{"redis", map[string]string{"url": "redis://h", "namespace": "a:b"}, "letters, digits"},
		{"redis", map[string]string{"url": "redis://h", "namespace": ""}, "letters, digits"},
		{"redis", map[string]string{"url": "redis://h", "cluster": "maybe"}, "expected true or false"},
		{"redis", map[string]string{"url": "redis://h", "username": "u"}, "no password_file"},
		{"redis", map[string]string{"url": "redis://h", "password_file": "/does/not/exist"}, "/does/not/exist"},
		{"redis", map[string]string{"url": "redis://h", "password_file": file(t, "\n")}, "is empty"},
		{"redis", map[string]string{"url": "redis://h", "tls_ca_file": secret}, "write rediss://"},
		{"redis", map[string]string{"url": "rediss://h", "tls_ca_file": secret}, "holds no certificate"},
		{"redis", map[string]string{"url": "rediss://h", "tls_cert_file": secret}, "both of tls_cert_file and tls_key_file"},
		{"redis", map[string]string{"url": "rediss://h", "tls_cert_file": secret, "tls_key_file": secret}, "tls_cert_file"},
		{"nats", nil, "needs the setting url, for example nats://127.0.0.1:4222"},
		{"nats", map[string]string{"url": "nats://token@h"}, "password_file"},
		{"nats", map[string]string{"url": "nats://h/x"}, "ends with a path"},
		{"nats", map[string]string{"url": "nats://h", "replicas": "6"}, "from 1 to 5"},
		{"nats", map[string]string{"url": "nats://h", "storage": "disk"}, "expected file or memory"},
		{"nats", map[string]string{"url": "nats://h", "creds_file": "/does/not/exist"}, "/does/not/exist"},
		{"nats", map[string]string{"url": "nats://h", "creds_file": secret, "username": "u", "password_file": secret}, "one way to log in"},
		{"nats", map[string]string{"url": "nats://h", "username": "u"}, "both of username and password_file"},
		{"nats", map[string]string{"url": "nats://h", "fsync": "true"}, "has no setting fsync"},
	}
	for _, tt := range tests {
		if said := refused(t, tt.driver, tt.settings, provider.ErrInvalid, tt.mentions); strings.Contains(said, "s3cret") || strings.Contains(said, "token") {
			t.Errorf("%s %v: the secret is told: %s", tt.driver, tt.settings, said)
		}
	}
}

// A server that is not there, that takes connections and says nothing, and that
// is something else.
func TestOpenSaysWhyAServerCannotBeUsed(t *testing.T) {
	nobody := freeAddress(t)
	silent, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, driver := range []string{"redis", "nats"} {
		with := func(address string) map[string]string {
			return map[string]string{"url": driver + "://" + address, "timeout": "200ms", "dial_timeout": "200ms"}
		}
		if driver == "redis" {
			refused(t, driver, with(nobody), provider.ErrCommunication, "refused")
			refused(t, driver, with(silent.Addr().String()), provider.ErrTimeout, silent.Addr().String())
		} else {
			refused(t, driver, with(nobody), provider.ErrUnavailable, "nobody listens")
			refused(t, driver, with(silent.Addr().String()), provider.ErrUnavailable, silent.Addr().String())
		}
	}
	r, n := redisServer(t, "--requirepass", "s3cret", "--maxmemory-policy", "allkeys-lru"), natsServer(t, "authorization { user: u, password: s3cret }")
	wrong, right := file(t, "wr0ng"), file(t, "s3cret\n")
	for _, settings := range []map[string]string{
		{"url": "redis://" + r.address},
		{"url": "redis://" + r.address, "password_file": wrong},
		{"url": "redis://" + r.address, "password_file": wrong, "username": "u"},
	} {
		if said := refused(t, "redis", settings, provider.ErrUnavailable, "password_file"); strings.Contains(said, "wr0ng") {
			t.Errorf("the password is told: %s", said)
		}
	}
	refused(t, "redis", map[string]string{"url": "redis://" + r.address, "password_file": right}, provider.ErrInvalid, "maxmemory-policy noeviction")
	refused(t, "nats", map[string]string{"url": "nats://" + n.address}, provider.ErrUnavailable, "password_file")
	if said := refused(t, "nats", map[string]string{"url": "nats://" + n.address, "username": "u", "password_file": wrong}, provider.ErrUnavailable, "password_file"); strings.Contains(said, "wr0ng") {
		t.Errorf("the password is told: %s", said)
	}
	p := open(t, nil, provider.Config{ID: "kv", Driver: "nats", Settings: map[string]string{"url": "nats://" + n.address, "username": "u", "password_file": right}})
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	small := natsServer(t, "max_payload: 500000")
	refused(t, "nats", map[string]string{"url": "nats://" + small.address}, provider.ErrInvalid, "raise max_payload")
	p = open(t, nil, provider.Config{ID: "kv", Driver: "nats", Settings: map[string]string{"url": "nats://" + natsServer(t).address}})
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestNatsRefusesOtherStreams(t *testing.T) {
	s := natsServer(t)
	settings := map[string]string{"url": "nats://" + s.address}
	p := open(t, nil, provider.Config{ID: "kv", Driver: "nats", Settings: settings})
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	settings["storage"] = "memory"
	refused(t, "nats", settings, provider.ErrInvalid, "file storage, which cannot be changed")
	settings["storage"], settings["replicas"] = "file", "3"
	refused(t, "nats", settings, provider.ErrInvalid, "is no cluster")
	settings["namespace"] = "other"
	refused(t, "nats", settings, provider.ErrInvalid, "replicas")
}

// Redis asks for the password with each new connection: it can be changed.
func TestRedisTakesUpANewPassword(t *testing.T) {
	s := redisServer(t, "--requirepass", "one")
	password := file(t, "one")
	p := open(t, nil, redisConfig(s, map[string]string{"password_file": password}))
	defer p.Close()
	if err := os.WriteFile(password, []byte("two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.kill()
	for i, arg := range s.args {
		if arg == "one" {
			s.args[i] = "two"
		}
	}
	s.ready = answers("PING\r\n", "-NOAUTH")
	s.start()
	until(t, "a call with the new password works", func() bool {
		return invoke(t.Context(), p, "set", &pb.KvSetRequest{Key: []byte("k")}, &pb.KvSetResponse{}) == nil
	})
}
