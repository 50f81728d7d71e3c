package external_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/external"
)

func TestOnlySettingsThatAreSafeAreTaken(t *testing.T) {
	for _, c := range []struct {
		driver, settings string
		wrong            string // the setting that is named; "" when it opens
	}{
		{"", "address=127.0.0.1:1", ""},
		{"grpc", "address=localhost:1 timeout=3s", ""},
		{"grpc", "address=unix:/tmp/no-such-socket", ""},
		{"grpc", "address=10.0.0.1:1", ""}, // over TLS
		{"grpc", "address=10.0.0.1:1 insecure=true", ""},
		{"grpc", "address=127.0.0.1:1 server_name=shop", ""},
		{"rest", "address=127.0.0.1:1", "driver"},
		{"grpc", "", "address"},
		{"grpc", "address=127.0.0.1", "address"},
		{"grpc", "address=:9000", "address"},
		{"grpc", "address=dns:///x:9", "address"},
		{"grpc", "address=127.0.0.1:0", "address"},
		{"grpc", "address=127.0.0.1:70000", "address"},
		{"grpc", "address=unix:", "address"},
		{"grpc", "address=127.0.0.1:1 timeout=0", "timeout"},
		{"grpc", "address=127.0.0.1:1 timeout=11m", "timeout"},
		{"grpc", "address=127.0.0.1:1 insecure=yes", "insecure"},
		{"grpc", "address=127.0.0.1:1 insecure=true ca_file=x", "insecure"},
		{"grpc", "address=127.0.0.1:1 ca_file=/no/such/file", "ca_file"},
		{"grpc", "address=127.0.0.1:1 cert_file=x", "key_file"},
		{"grpc", "address=127.0.0.1:1 cert_file=x key_file=y", "cert_file"},
		{"grpc", "address=127.0.0.1:1 port=9", "port"},
	} {
		settings := map[string]string{}
		for pair := range strings.FieldsSeq(c.settings) {
			key, value, _ := strings.Cut(pair, "=")
			settings[key] = value
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // nobody waits for a server
		p, err := external.New(external.Options{}).Open(ctx, provider.Config{ID: "shop", Driver: c.driver, Settings: settings})
		if err == nil {
			if err := p.Close(); err != nil {
				t.Errorf("%s: close: %v", c.settings, err)
			}
		}
		e, _ := errors.AsType[*provider.Error](err)
		switch {
		case c.wrong == "" && err != nil:
			t.Errorf("%q: %v", c.settings, err)
		case c.wrong != "" && (!errors.Is(err, provider.ErrInvalid) || e.Details["setting"]+e.Details["driver"] == "" || !strings.Contains(err.Error(), c.wrong)):
			t.Errorf("%q: %v, want ErrInvalid for %s", c.settings, err, c.wrong)
		}
	}
}

func TestAServerMayComeLaterThanItsProvider(t *testing.T) {
	n, s := newNode(t), newServer()
	address := filepath.Join(t.TempDir(), "s")
	n.open(t, "unix:"+address)
	_, err := n.call(t.Context(), "all", "read", "x")
	if !errors.Is(err, provider.ErrUnavailable) || outcome(err) != "" {
		t.Fatalf("before it is there: %v", err)
	}
	s.start(t, address)
	within(t, "it serves", func() bool {
		_, err := n.call(t.Context(), "all", "read", "x")
		return err == nil
	})
}

func TestCallsFollowTheHealth(t *testing.T) {
	n, s := newNode(t), newServer()
	release := make(chan struct{})
	s.invoke = func(context.Context, *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		<-release
		return &pb.ProviderServiceInvokeResponse{Payload: []byte("done")}, nil
	}
	s.start(t, "")
	n.open(t, s.address)
	result := make(chan error, 1)
	arrived := make(chan struct{})
	inner := s.invoke
	s.invoke = func(ctx context.Context, r *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		close(arrived)
		return inner(ctx, r)
	}
	go func() {
		_, err := n.call(t.Context(), "all", "write", "x")
		result <- err
	}()
	<-arrived
	s.set(healthpb.HealthCheckResponse_NOT_SERVING)
	within(t, "new calls are refused", func() bool {
		_, err := n.call(t.Context(), "all", "no-such-operation", "x")
		return errors.Is(err, provider.ErrUnavailable) && strings.Contains(err.Error(), "NOT_SERVING")
	})
	close(release)
	if err := <-result; err != nil {
		t.Fatalf("the call under way: %v", err)
	}
	s.invoke = nil
	s.set(healthpb.HealthCheckResponse_SERVING)
	within(t, "calls are made again", func() bool {
		_, err := n.call(t.Context(), "all", "write", "x")
		return err == nil
	})
}

func TestAServerWithoutAHealthServiceServes(t *testing.T) {
	n, s := newNode(t), newServer()
	s.health = nil
	s.start(t, "")
	n.open(t, s.address)
	within(t, "it serves", func() bool {
		_, err := n.call(t.Context(), "all", "read", "x")
		return err == nil
	})
	s.grpc.Stop()
	within(t, "its end is noticed", func() bool {
		_, err := n.call(t.Context(), "all", "no-such-operation", "x")
		return errors.Is(err, provider.ErrUnavailable)
	})
}

func TestAServerIsAskedUntilItsOfferIsValid(t *testing.T) {
	n, s := newNode(t), newServer()
	var asked atomic.Int64
	s.describe = func() error {
		if asked.Add(1) < 3 {
			return status.Error(codes.Unavailable, "warming up")
		}
		return nil
	}
	s.operations = []*pb.ProviderOperation{{Name: "not a name"}}
	s.start(t, "")
	n.open(t, s.address)
	within(t, "the offer is refused with a reason", func() bool {
		_, err := n.call(t.Context(), "all", "read", "x")
		return errors.Is(err, provider.ErrUnavailable) && strings.Contains(err.Error(), `"not a name"`)
	})
}

func TestWhatTheServerGets(t *testing.T) {
	n, s := newNode(t), newServer()
	var got *pb.ProviderServiceInvokeRequest
	var id string
	var left time.Duration
	s.invoke = func(ctx context.Context, r *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		got, id = r, strings.Join(metadata.ValueFromIncomingContext(ctx, correlation.Header), ",")
		if deadline, ok := ctx.Deadline(); ok {
			left = time.Until(deadline)
		}
		return &pb.ProviderServiceInvokeResponse{Payload: []byte("fine")}, nil
	}
	s.start(t, "")
	n.open(t, s.address, "timeout", "7s")
	answer, err := n.call(correlation.With(t.Context(), "corr-1"), "all", "write", "x")
	if err != nil || answer != "fine" {
		t.Fatalf("%q, %v", answer, err)
	}
	if got.GetProviderId() != "shop" || got.GetOperation() != "write" || string(got.GetPayload()) != "x" || got.GetInstanceId() != "all" ||
		got.GetCaller() != "all" || got.GetGeneration() != 3 || got.GetCreatedIndex() != 7 || id != "corr-1" {
		t.Errorf("it got %v and correlation id %q", got, id)
	}
	if left <= 0 || left > 7*time.Second {
		t.Errorf("it had %s, want at most 7s", left)
	}
}

func TestFailuresOfAServerReachTheGuest(t *testing.T) {
	n, s := newNode(t), newServer()
	s.start(t, "")
	n.open(t, s.address, "timeout", "300ms")
	refusal := apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "sold out").With("item", "bolt").Next("order nuts")
	for _, c := range []struct {
		name     string
		err      error
		sentinel error
		unknown  bool
	}{
		{"its own error", refusal.GRPCStatus().Err(), provider.ErrConflict, false},
		{"invalid", status.Error(codes.InvalidArgument, "no"), provider.ErrInvalid, false},
		{"not found", status.Error(codes.NotFound, "no"), provider.ErrInvalid, false},
		{"denied", status.Error(codes.PermissionDenied, "no"), provider.ErrDenied, false},
		{"exhausted", status.Error(codes.ResourceExhausted, "no"), provider.ErrExhausted, false},
		{"precondition", status.Error(codes.FailedPrecondition, "no"), provider.ErrConflict, false},
		{"unknown", status.Error(codes.Unknown, "no"), provider.ErrInternal, false},
		{"unavailable", status.Error(codes.Unavailable, "no"), provider.ErrCommunication, true},
		{"cancelled by the server", status.Error(codes.Canceled, "no"), provider.ErrInternal, true},
		{"late", status.Error(codes.DeadlineExceeded, "no"), provider.ErrTimeout, true},
		{"no answer", nil, provider.ErrTimeout, true},
	} {
		s.invoke = func(ctx context.Context, _ *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
			if c.err == nil {
				<-ctx.Done()
			}
			return nil, c.err
		}
		_, err := n.call(t.Context(), "all", "write", "x")
		if !errors.Is(err, c.sentinel) || (outcome(err) == provider.OutcomeUnknown) != c.unknown {
			t.Errorf("%s: %v, outcome %q", c.name, err, outcome(err))
		}
		if e, _ := errors.AsType[*provider.Error](err); c.name == "its own error" && (e.Message != "sold out" || e.Details["item"] != "bolt" || e.Next != "order nuts") {
			t.Errorf("%s: %+v", c.name, e)
		}
	}
}

// A call that may have been carried out is made again only where that does no harm.
func TestOnlyIdempotentOperationsAreRepeated(t *testing.T) {
	n, s := newNode(t), newServer()
	var calls atomic.Int64
	s.invoke = func(context.Context, *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		if calls.Add(1) == 1 {
			return nil, status.Error(codes.Unavailable, "the connection broke")
		}
		return &pb.ProviderServiceInvokeResponse{}, nil
	}
	s.start(t, "")
	n.open(t, s.address)
	if _, err := n.call(t.Context(), "all", "read", "x"); err != nil || calls.Load() != 2 {
		t.Errorf("idempotent: %v after %d calls, want success after 2", err, calls.Load())
	}
	calls.Store(0)
	if _, err := n.call(t.Context(), "all", "write", "x"); !errors.Is(err, provider.ErrCommunication) || outcome(err) != provider.OutcomeUnknown || calls.Load() != 1 {
		t.Errorf("not idempotent: %v after %d calls, want one of unknown outcome", err, calls.Load())
	}
}

func TestSizesAreBounded(t *testing.T) {
	n, s := newNode(t), newServer()
	size := 0
	s.invoke = func(context.Context, *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		return &pb.ProviderServiceInvokeResponse{Payload: make([]byte, size)}, nil
	}
	s.start(t, "")
	n.open(t, s.address)
	for _, c := range []struct {
		in, out int
		want    error
	}{
		{external.MaxPayload, 1, nil},
		{external.MaxPayload + 1, 1, provider.ErrInvalid},
		{1, external.MaxPayload, nil},
		{1, external.MaxPayload + 1, provider.ErrExhausted},
		{1, external.MaxPayload + 1<<20, provider.ErrExhausted},
	} {
		size = c.out
		got, err := n.call(t.Context(), "all", "write", strings.Repeat("x", c.in))
		if !errors.Is(err, c.want) || err == nil && len(got) != c.out {
			t.Errorf("%d in, %d out: %d bytes, %v; want %v", c.in, c.out, len(got), err, c.want)
		}
	}
}

// Of an instance no older placement gets through after a newer one.
func TestOlderPlacementsAreRefused(t *testing.T) {
	s := newServer()
	var calls atomic.Int64
	s.invoke = func(context.Context, *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
		calls.Add(1)
		return &pb.ProviderServiceInvokeResponse{}, nil
	}
	s.start(t, "")
	p, err := external.New(external.Options{}).Open(t.Context(), provider.Config{ID: "shop", Settings: map[string]string{"address": s.address}})
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		mark provider.Mark
		let  bool
	}{
		{provider.Mark{Created: 5, Generation: 2}, true},
		{provider.Mark{Created: 5, Generation: 1}, false},
		{provider.Mark{Created: 5, Generation: 3}, true},
		{provider.Mark{Created: 5, Generation: 2}, false},
		{provider.Mark{Created: 9, Generation: 1}, true},
		{provider.Mark{Created: 5, Generation: 8}, false},
	} {
		before := calls.Load()
		_, err := p.Invoke(t.Context(), provider.Call{
			Instance: "i", Generation: c.mark.Generation, Created: c.mark.Created, Operation: "call", Payload: []byte("\x12\x05write"),
		})
		if c.let != (err == nil) || !c.let && !errors.Is(err, provider.ErrDenied) || (calls.Load() > before) != c.let {
			t.Errorf("step %d: %v, %d calls", i, err, calls.Load()-before)
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := p.Invoke(t.Context(), provider.Call{Operation: "call", Payload: []byte("\x12\x05write")}); !errors.Is(err, provider.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestTLSIsVerified(t *testing.T) {
	dir := t.TempDir()
	pair := certificate(t, dir, "shop.test")
	s := newServer()
	s.start(t, "127.0.0.1:0", grpc.Creds(credentials.NewServerTLSFromCert(&pair)))
	for _, c := range []struct {
		settings []string
		works    bool
	}{
		{[]string{"ca_file", filepath.Join(dir, "ca.pem"), "server_name", "shop.test"}, true},
		{[]string{"ca_file", filepath.Join(dir, "ca.pem"), "server_name", "other.test"}, false},
		{[]string{"server_name", "shop.test"}, false},
		{nil, false}, // in the clear
	} {
		n := newNode(t)
		n.open(t, s.address, c.settings...)
		_, err := n.call(t.Context(), "all", "read", "x")
		if c.works != (err == nil) || !c.works && !errors.Is(err, provider.ErrUnavailable) {
			t.Errorf("%v: %v", c.settings, err)
		}
	}
}

// certificate makes a self-signed certificate and writes it to ca.pem.
func certificate(t *testing.T, dir, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
