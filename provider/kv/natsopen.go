package kv

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// natsMinPayload is the least max_payload of a server: a value is in two messages.
const natsMinPayload = MaxValue/2 + natsOverhead

// natsWindow is for how long the server remembers the ids of messages. We need
// only the last one, and the window is at least this.
const natsWindow = 100 * time.Millisecond

// natsOptions are the settings of driver nats.
type natsOptions struct {
	id        string
	server    server
	creds     string
	namespace string
	replicas  int
	storage   jetstream.StorageType
	timeout   time.Duration
	dial      time.Duration
	log       *slog.Logger
}

func natsSettings(cfg provider.Config, log *slog.Logger) (natsOptions, error) {
	r := setting.New(permission.KV, "nats", cfg.Settings)
	o := natsOptions{
		id: cfg.ID, log: log,
		server:    readServer(r, schemes{plain: "nats", secure: "tls", port: "4222"}),
		creds:     r.File("creds_file"),
		namespace: namespace(r),
		replicas:  r.Count("replicas", 1, 1, 5),
	}
	if r.Choice("storage", "file", "memory") == "memory" {
		o.storage = jetstream.MemoryStorage
	}
	o.timeout, o.dial = timeouts(r)
	if o.creds != "" && (o.server.username != "" || o.server.password != nil) {
		r.Fail("creds_file", "%s has both creds_file and username or password_file; expected one way to log in", r)
	}
	r.Both("username", "password_file")
	if o.server.path != "" {
		r.Fail("url", "setting url of %s ends with a path; expected none", r)
	}
	return o, r.Done()
}

// openNats opens a store. It fails when the server cannot be reached or does not
// let us in, so that whoever made the provider sees it; the agent tries again.
func openNats(ctx context.Context, o *natsOptions) (*natsStore, error) {
	s := &natsStore{
		subjects: newNatsSubjects(o.namespace), address: strings.Join(o.server.addresses, ","), timeout: o.timeout, log: o.log,
		keep: natsKeep,
		link: natsLink{changed: make(chan struct{}), broke: make(chan struct{}), restart: make(chan struct{}, 1)},
	}
	var err error
	if s.conn, err = nats.Connect(o.server.join(), s.connection(o)...); err != nil {
		return nil, natsRefused(s.address, err)
	}
	if err := s.open(ctx, o); err != nil {
		s.conn.Close()
		return nil, err
	}
	background, stop := context.WithCancel(context.Background()) //nolint:forbidigo // ends with close, not with the call that opened it
	s.stop = stop
	s.done.Go(func() { s.follow(background) })
	s.commits = newCommitter(s.commit)
	s.done.Go(s.commits.run)
	if err := s.load(ctx); err != nil {
		_ = s.close()
		return nil, err
	}
	return s, nil
}

// join returns the URLs of a server, as the client takes them.
func (s *server) join() string {
	scheme := "nats://"
	if s.secure {
		scheme = "tls://"
	}
	return scheme + strings.Join(s.addresses, ","+scheme)
}

func (s *natsStore) connection(o *natsOptions) []nats.Option {
	options := []nats.Option{
		nats.Name("wasmatrix kv " + o.id), nats.Timeout(o.dial), nats.NoCallbacksAfterClientClose(),
		nats.MaxReconnects(-1), nats.ReconnectWait(100 * time.Millisecond), nats.ReconnectJitter(50*time.Millisecond, 50*time.Millisecond),
		// Nothing is sent later than its call: that would be an effect without a caller.
		nats.ReconnectBufSize(-1), nats.IgnoreAuthErrorAbort(),
		nats.PingInterval(time.Second), nats.MaxPingsOutstanding(2), nats.FlusherTimeout(o.timeout),
		nats.DisconnectErrHandler(s.lost), nats.ReconnectHandler(func(*nats.Conn) { s.begin() }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { o.log.Debug("nats", "error", err) }),
	}
	if o.server.tls != nil {
		options = append(options, nats.Secure(o.server.tls))
	}
	if o.creds != "" {
		options = append(options, nats.UserCredentials(o.creds))
	}
	if o.server.password != nil {
		options = append(options, nats.UserInfoHandler(func() (string, string) {
			password, err := o.server.password()
			if err != nil {
				o.log.Warn("password_file", "error", err)
			}
			return o.server.username, password
		}))
	}
	return options
}

func natsRefused(address string, err error) error {
	why := err.Error()
	if errors.Is(err, nats.ErrNoServers) {
		why = "nobody listens there"
	}
	e := provider.Errorf(provider.ErrUnavailable, "nats at %s cannot be reached: %s", address, why).With("address", address).Because(err)
	if errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) {
		return e.NextStep("check the provider's username and password_file, or its creds_file")
	}
	return e.NextStep("check the provider's url, and that the NATS server runs")
}

// open checks the server and makes the stream.
func (s *natsStore) open(ctx context.Context, o *natsOptions) error {
	if have := s.conn.MaxPayload(); have < natsMinPayload {
		return provider.Errorf(provider.ErrInvalid, "max_payload of nats at %s is %d bytes; kv needs at least %d", s.address, have, natsMinPayload).
			With("address", s.address).NextStep("raise max_payload in the configuration of the NATS server")
	}
	var err error
	if s.js, err = jetstream.New(s.conn, jetstream.WithPublishAsyncMaxPending(4*maxBatchJobs)); err != nil {
		return s.failure(ctx, err, false, false)
	}
	ctx, cancel := s.bound(ctx)
	defer cancel()
	want := jetstream.StreamConfig{
		Name: o.namespace + "-kv", Description: "key-value data of wasmatrix", Subjects: []string{s.subjects.all()},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew, Storage: o.storage, Replicas: o.replicas,
		MaxMsgsPerSubject: 1, MaxMsgs: -1, MaxBytes: -1, MaxMsgSize: -1, MaxConsumers: -1, Duplicates: natsWindow,
		DenyPurge: true, AllowDirect: o.replicas == 1, // others than the leader may be behind
	}
	s.stream, err = s.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s.stream, err = s.js.CreateStream(ctx, want)
	}
	if err == nil {
		err = s.adopt(ctx, want)
	}
	if err == nil {
		s.created = s.stream.CachedInfo().Created
		return nil
	}
	if errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
		return provider.Errorf(provider.ErrUnavailable, "nats at %s has no JetStream", s.address).With("address", s.address).
			NextStep("start the NATS server with jetstream enabled: nats-server --jetstream").Because(err)
	}
	return s.failure(ctx, err, true, false)
}

// adopt takes a stream that is there, if it is one of ours, and gives it the
// number of replicas that is wanted now.
func (s *natsStore) adopt(ctx context.Context, want jetstream.StreamConfig) error {
	have := s.stream.CachedInfo().Config
	wrong := func(what string) error {
		return provider.Errorf(provider.ErrInvalid, "stream %s of nats at %s %s", want.Name, s.address, what).
			With("stream", want.Name).NextStep("choose another namespace, or delete the stream with all it holds: nats stream rm %s", want.Name)
	}
	switch {
	case len(have.Subjects) != 1 || have.Subjects[0] != want.Subjects[0] || have.MaxMsgsPerSubject != 1 || have.Discard != want.Discard ||
		have.Retention != want.Retention || have.MaxAge != 0 || have.MaxMsgs > 0:
		return wrong("is not one that kv made")
	case have.Storage != want.Storage:
		return wrong("keeps its data in " + strings.ToLower(have.Storage.String()) + " storage, which cannot be changed")
	case want.Replicas > 1 && s.stream.CachedInfo().Cluster == nil:
		return provider.Errorf(provider.ErrInvalid, "nats at %s is no cluster and cannot keep %d replicas", s.address, want.Replicas).
			With("address", s.address).NextStep("leave out the provider's replicas, or use a NATS cluster")
	case have.Replicas == want.Replicas:
		return nil
	}
	have.Replicas, have.AllowDirect = want.Replicas, want.AllowDirect
	var err error
	s.stream, err = s.js.UpdateStream(ctx, have)
	return err
}

// load waits until all that the stream holds is taken up, for as long as it goes on.
func (s *natsStore) load(ctx context.Context) error {
	for {
		s.link.mu.Lock()
		loaded, problem, changed := s.link.index != nil, s.link.problem, s.link.changed
		s.link.mu.Unlock()
		if loaded || problem != nil {
			return problem
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return provider.Errorf(provider.ErrTimeout, "the keys of the stream on nats at %s could not be read in time", s.address).
				With("address", s.address).Because(ctx.Err())
		}
	}
}
