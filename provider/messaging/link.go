package messaging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	connectTimeout = 5 * time.Second
	// apiTimeout bounds one question to the server.
	apiTimeout = 5 * time.Second
	// serverStart bounds the start of the embedded server, which reads its store.
	serverStart = 25 * time.Second
	// wirePayload is what the embedded server takes: a payload with its headers.
	wirePayload = 2 << 20
	// maxUnconfirmed bounds the stored messages whose confirmation is awaited.
	maxUnconfirmed = 8192
	// storeTimeout bounds the wait for one confirmation.
	storeTimeout = 30 * time.Second
)

// link is the connection to a NATS server, and how subjects are written on it.
type link struct {
	options
	log    *slog.Logger
	nc     *nats.Conn
	server *natsserver.Server  // nil for an external one
	js     jetstream.JetStream // nil unless durable

	mu     sync.Mutex
	onLost []func() // called when the connection broke
}

// openLink connects, having started the embedded server if it is that, and makes
// the stream. On an error nothing is left behind.
func openLink(ctx context.Context, o options, id string, log *slog.Logger) (_ *link, err error) {
	if o.requests == "" {
		o.requests = o.prefix
	}
	l := &link{options: o, log: log}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	connect := []nats.Option{
		nats.Name("wasmatrix " + id), nats.SyncQueueLen(o.deliver.pending), nats.Timeout(connectTimeout), nats.MaxReconnects(-1),
		nats.ReconnectWait(200 * time.Millisecond), nats.ReconnectJitter(100*time.Millisecond, 100*time.Millisecond),
		nats.IgnoreAuthErrorAbort(), nats.PingInterval(10 * time.Second), nats.MaxPingsOutstanding(2),
		nats.FlusherTimeout(10 * time.Second),
		// What cannot be sent now fails now; it must not be sent some time later.
		nats.ReconnectBufSize(-1),
		nats.DisconnectErrHandler(l.lost), nats.ReconnectHandler(l.back), nats.ErrorHandler(l.trouble),
	}
	target := ""
	if o.driver == driverEmbedded {
		if l.server, err = startServer(&o, id, log); err != nil {
			return nil, err
		}
		connect = append(connect, nats.InProcessServer(l.server))
	} else {
		var more []nats.Option
		if more, err = o.server.connectOptions(); err != nil {
			return nil, err
		}
		connect = append(connect, more...)
		target = strings.Join(o.server.urls, ",")
	}
	if l.nc, err = nats.Connect(target, connect...); err != nil {
		return nil, connectError(target, err)
	}
	if o.stream == nil {
		return l, nil
	}
	l.js, err = jetstream.New(l.nc, jetstream.WithDefaultTimeout(apiTimeout),
		jetstream.WithPublishAsyncMaxPending(maxUnconfirmed), jetstream.WithPublishAsyncTimeout(storeTimeout))
	if err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "JetStream: %s", err).Because(err)
	}
	return l, l.ensureStream(ctx)
}

// startServer starts a server that only this process can reach.
func startServer(o *options, id string, log *slog.Logger) (*natsserver.Server, error) {
	so := &natsserver.Options{
		ServerName: "wasmatrix-" + id, DontListen: true, NoSigs: true, MaxPayload: wirePayload,
		DisableJetStreamBanner: true, NoSystemAccount: false,
	}
	if o.stream != nil {
		so.JetStream, so.StoreDir = true, o.server.storeDir
		so.JetStreamMaxStore, so.JetStreamMaxMemory = o.stream.maxBytes, 64<<20
		so.SyncAlways = o.stream.fsync
		if err := os.MkdirAll(o.server.storeDir, 0o700); err != nil {
			return nil, provider.Errorf(provider.ErrInternal, "making the directory of provider %s: %s", id, err).Because(err)
		}
	}
	s, err := natsserver.NewServer(so)
	if err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "the embedded NATS server: %s", err).Because(err)
	}
	s.SetLoggerV2(serverLog{log}, false, false, false)
	s.Start()
	if !s.ReadyForConnections(serverStart) {
		stopServer(s)
		return nil, provider.Errorf(provider.ErrUnavailable, "the embedded NATS server did not start within %s", serverStart)
	}
	if o.stream != nil && !s.JetStreamEnabled() {
		stopServer(s)
		return nil, provider.Errorf(provider.ErrInternal, "the embedded NATS server cannot use its store in %s", o.server.storeDir).
			NextStep("look into the log of the provider's node; check the disk")
	}
	return s, nil
}

func stopServer(s *natsserver.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

// connectOptions are those that the settings ask for.
func (o *serverOptions) connectOptions() ([]nats.Option, error) {
	var out []nats.Option
	if o.caFile != "" {
		out = append(out, nats.RootCAs(o.caFile))
	}
	if o.certFile != "" {
		out = append(out, nats.ClientCert(o.certFile, o.keyFile))
	}
	if o.credsFile != "" {
		out = append(out, nats.UserCredentials(o.credsFile))
	}
	if o.password != nil {
		password, err := o.password()
		if err != nil {
			return nil, provider.Errorf(provider.ErrInvalid, "setting password_file: %s", err).With("setting", "password_file").Because(err)
		}
		out = append(out, nats.UserInfo(o.user, password))
	}
	return out, nil
}

func connectError(target string, err error) error {
	e := provider.Errorf(provider.ErrUnavailable, "connecting to NATS at %s: %s", target, err).Because(err)
	switch {
	case target == "":
		return provider.Errorf(provider.ErrInternal, "connecting to the embedded NATS server: %s", err).Because(err)
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired):
		return e.With("url", target).NextStep("check username, password_file and creds_file of the provider")
	default:
		return e.With("url", target).NextStep("check the provider's url, and that the server runs")
	}
}

// ensureStream makes the stream, or changes it to what the settings say.
func (l *link) ensureStream(ctx context.Context) error {
	cfg := jetstream.StreamConfig{
		Name: l.stream.name, Retention: jetstream.InterestPolicy, Storage: jetstream.FileStorage,
		// A full stream refuses new messages; it never drops one that was acknowledged.
		Discard: jetstream.DiscardNew, MaxBytes: l.stream.maxBytes, MaxAge: l.stream.maxAge,
		Replicas: l.stream.replicas, MaxMsgSize: wirePayload,
	}
	for _, text := range l.stream.texts {
		cfg.Subjects = append(cfg.Subjects, l.prefix+text)
	}
	if l.maxAge() != 0 && l.maxAge() < 2*time.Minute {
		cfg.Duplicates = l.maxAge()
	}
	ctx, cancel := context.WithTimeout(ctx, 2*apiTimeout)
	defer cancel()
	if _, err := l.js.CreateOrUpdateStream(ctx, cfg); err != nil {
		return provider.Errorf(provider.ErrUnavailable, "making the stream %s: %s", l.stream.name, err).
			With("stream", l.stream.name).NextStep("check that the server has JetStream, and the settings max_bytes, subjects and stream_replicas").
			Because(err)
	}
	return nil
}

func (l *link) maxAge() time.Duration { return l.stream.maxAge }

// keeps reports whether messages of a subject, or of all that a pattern matches,
// are stored.
func (l *link) keeps(subject string) bool {
	if l.stream == nil {
		return false
	}
	_, ok := l.stream.subjects.Allows(permission.Need{
		Capability: permission.Messaging, Action: permission.Subscribe, Resource: subject,
	})
	return ok
}

// checkPattern refuses a subscription of which only a part would be stored.
func (l *link) checkPattern(pattern string) error {
	if l.stream == nil || l.keeps(pattern) {
		return nil
	}
	for _, kept := range l.stream.texts {
		if overlap(kept, pattern) {
			return provider.Errorf(provider.ErrInvalid, "only a part of %s is stored by this provider, which stores %s", pattern, strings.Join(l.stream.texts, ", ")).
				With("subject", pattern).NextStep("subscribe to subjects that are stored, and to others, apart")
		}
	}
	return nil
}

// requestPrefix is that of requests for a subject or pattern.
func (l *link) requestPrefix(subject string) string {
	if l.keeps(subject) {
		return l.requests
	}
	return l.prefix
}

// guestSubject is a subject as guests name it; false for one that is not theirs.
func (l *link) guestSubject(wire string) (string, bool) {
	subject, ok := strings.CutPrefix(wire, l.prefix)
	if l.requests != l.prefix {
		if s, request := strings.CutPrefix(wire, l.requests); request {
			subject, ok = s, true
		}
	}
	return subject, ok && subjectProblem([]byte(subject), false) == ""
}

// watchLoss calls f each time that the connection breaks.
func (l *link) watchLoss(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onLost = append(l.onLost, f)
}

func (l *link) lost(nc *nats.Conn, err error) {
	if err != nil {
		l.log.Warn("the connection to NATS is lost", "error", err)
	}
	l.mu.Lock()
	watchers := l.onLost
	l.mu.Unlock()
	for _, f := range watchers {
		f()
	}
}

func (l *link) back(nc *nats.Conn) {
	l.log.Info("connected to NATS again", "url", nc.ConnectedUrlRedacted())
}

// trouble takes errors that belong to no call. A subscription that is too slow
// counts its own losses.
func (l *link) trouble(_ *nats.Conn, _ *nats.Subscription, err error) {
	if !errors.Is(err, nats.ErrSlowConsumer) {
		l.log.Warn("trouble with NATS", "error", err)
	}
}

// close ends the connection and the embedded server.
func (l *link) close() {
	if l.nc != nil {
		l.nc.Close()
	}
	if l.server != nil {
		stopServer(l.server)
	}
}

// natsError puts an error of the client into the sentinels. sent says whether the
// message may have left.
func natsError(err error, sent bool) error {
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return provider.Errorf(provider.ErrInvalid, "the message is larger than the NATS server takes").Because(err)
	case sent:
		return provider.Errorf(provider.ErrCommunication, "the connection to NATS broke before the answer came: %s", err).
			With(provider.DetailOutcome, provider.OutcomeUnknown).Because(err)
	default:
		return provider.Errorf(provider.ErrUnavailable, "the provider is not connected to NATS: %s", err).Because(err)
	}
}

// storeError is natsError for a message that was to be stored.
func storeError(err error) error {
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && (strings.Contains(api.Description, "maximum") || api.Code == 507 || strings.Contains(api.Description, "insufficient")):
		return provider.Errorf(provider.ErrExhausted, "the message was not stored: %s", api.Description).
			NextStep("let subscribers catch up, remove ended workloads, or raise the provider's max_bytes").Because(err)
	case errors.As(err, &api):
		return provider.Errorf(provider.ErrUnavailable, "the message was not stored: %s", api.Description).Because(err)
	case errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrNoResponders):
		return provider.Errorf(provider.ErrUnavailable, "the message was not stored: no stream answers").Because(err)
	case errors.Is(err, jetstream.ErrTooManyStalledMsgs):
		return provider.Errorf(provider.ErrExhausted, "too many messages wait to be stored").Because(err)
	default:
		return natsError(err, true)
	}
}

// serverLog passes what the embedded server says on to the node's log.
type serverLog struct{ log *slog.Logger }

func (s serverLog) say(level slog.Level, format string, v ...any) {
	s.log.Log(context.Background(), level, "nats: "+fmt.Sprintf(format, v...)) //nolint:forbidigo // the server's log has no call
}
func (s serverLog) Noticef(format string, v ...any) { s.say(slog.LevelDebug, format, v...) }
func (s serverLog) Warnf(format string, v ...any)   { s.say(slog.LevelWarn, format, v...) }
func (s serverLog) Fatalf(format string, v ...any)  { s.say(slog.LevelError, format, v...) }
func (s serverLog) Errorf(format string, v ...any)  { s.say(slog.LevelError, format, v...) }
func (s serverLog) Debugf(format string, v ...any)  { s.say(slog.LevelDebug, format, v...) }
func (s serverLog) Tracef(format string, v ...any)  { s.say(slog.LevelDebug, format, v...) }
