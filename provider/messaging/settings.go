package messaging

import (
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/quantity"
)

// The drivers.
const (
	driverEmbedded = "embedded"
	driverNATS     = "nats"
)

// options are a provider's settings.
type options struct {
	driver string
	prefix string // of subjects on the wire, with its final dot; may be empty
	// requests is the prefix of requests for subjects that are kept: the server
	// itself would answer one that goes into its stream.
	requests string
	deliver  deliverOptions
	stream   *streamOptions // nil unless durable
	server   serverOptions
}

// deliverOptions say how messages get to handlers.
type deliverOptions struct {
	inFlight   int // messages of one subscription in handlers at once
	pending    int // messages that may wait for that; and as many for another delivery
	most       uint32
	backoff    time.Duration
	maxBackoff time.Duration
}

// streamOptions say how messages are kept.
type streamOptions struct {
	name     string
	texts    []string       // the subjects kept, as guests name them
	subjects permission.Set // the same, to ask whether they cover another
	ackWait  time.Duration
	maxBytes int64 // -1 is no limit
	maxAge   time.Duration
	replicas int
	fsync    bool
}

// serverOptions say how an external server is reached.
type serverOptions struct {
	urls               []string
	caFile             string
	certFile, keyFile  string
	credsFile          string
	user, passwordFile string
	storeDir           string // of the embedded server; empty when it keeps nothing
}

var (
	prefixPattern = regexp.MustCompile(`^[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$`)
	streamPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
)

// readOptions reads a provider's settings. Its errors say which one is wrong and
// what is expected.
func readOptions(cfg provider.Config) (options, error) {
	o := options{driver: cfg.Driver}
	switch cfg.Driver {
	case "":
		o.driver = driverEmbedded
	case driverEmbedded, driverNATS:
	default:
		return options{}, provider.Errorf(provider.ErrInvalid, "messaging has no driver %q; expected embedded or nats", cfg.Driver).
			With("driver", cfg.Driver)
	}
	s := &settings{driver: o.driver, rest: maps.Clone(cfg.Settings)}
	o.deliver = deliverOptions{
		inFlight:   s.count("max_in_flight", 64, 1, 4096),
		pending:    s.count("max_pending", 8192, 1, 1<<20),
		most:       uint32(s.count("max_deliver", 10, 0, 1000)), //nolint:gosec // at most 1000
		backoff:    s.duration("backoff", 200*time.Millisecond, time.Millisecond, time.Hour),
		maxBackoff: s.duration("max_backoff", 30*time.Second, time.Millisecond, 24*time.Hour),
	}
	durable := s.choice("durable", "false", "true") == "true"
	if o.driver == driverNATS {
		o.outside(s)
	} else {
		o.prefix = "m."
	}
	if durable {
		o.stream = o.keep(s, cfg.ID)
	}
	if err := s.done(durable); err != nil {
		return options{}, err
	}
	if durable && o.driver == driverEmbedded {
		if cfg.Dir == "" {
			return options{}, provider.Errorf(provider.ErrInvalid, "a durable messaging provider needs a directory")
		}
		o.server.storeDir = cfg.Dir
	}
	return o, nil
}

// outside reads how an external server is reached.
func (o *options) outside(s *settings) {
	if v, ok := s.take("prefix"); ok {
		if !prefixPattern.MatchString(v) || len(v) > 64 {
			s.wrong("prefix", v, "a subject of letters, digits and hyphens such as prod.orders")
		}
		o.prefix = v + "."
	}
	v, ok := s.take("url")
	if !ok {
		s.fail(provider.Errorf(provider.ErrInvalid, "messaging driver nats needs the setting url").
			With("setting", "url").NextStep("set url=nats://HOST:4222, several joined by commas"))
	}
	for text := range strings.SplitSeq(v, ",") {
		u, err := url.Parse(strings.TrimSpace(text))
		switch {
		case !ok:
		case err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme):
			s.wrong("url", text, "nats://HOST:PORT or tls://HOST:PORT, several joined by commas")
		case u.User != nil:
			s.wrong("url", u.Redacted(), "no password in it: name it by username and password_file, or by creds_file")
		default:
			o.server.urls = append(o.server.urls, u.String())
		}
	}
	o.server.caFile, _ = s.take("tls_ca_file")
	o.server.certFile, _ = s.take("tls_cert_file")
	o.server.keyFile, _ = s.take("tls_key_file")
	o.server.credsFile, _ = s.take("creds_file")
	o.server.user, _ = s.take("username")
	o.server.passwordFile, _ = s.take("password_file")
	s.pair("tls_cert_file", o.server.certFile, "tls_key_file", o.server.keyFile)
	s.pair("username", o.server.user, "password_file", o.server.passwordFile)
}

// keep reads how messages are kept.
func (o *options) keep(s *settings, id string) *streamOptions {
	st := &streamOptions{
		name:     "wasmatrix-" + id,
		ackWait:  s.duration("ack_wait", 30*time.Second, 100*time.Millisecond, time.Hour),
		maxAge:   s.duration("max_age", 0, time.Second, 10*365*24*time.Hour),
		maxBytes: -1,
		replicas: 1,
		texts:    []string{">"},
	}
	if o.driver == driverEmbedded {
		st.name = "messages"
		st.fsync = s.choice("fsync", "true", "false") == "true"
		st.maxBytes = s.size("max_bytes", 1<<30)
		o.requests = "r."
	} else {
		st.maxBytes = s.size("max_bytes", -1)
		st.replicas = s.count("stream_replicas", 1, 1, 5)
		if v, ok := s.take("stream"); ok {
			if !streamPattern.MatchString(v) {
				s.wrong("stream", v, "letters, digits, _ and - only, at most 64")
			}
			st.name = v
		}
		o.requests = o.prefix + "_WASMATRIX."
		s.keptSubjects(o.prefix, st)
	}
	var permissions []string
	for _, text := range st.texts {
		permissions = append(permissions, "msg:subscribe:"+text)
	}
	set, err := permission.ParseSet(permissions)
	if err != nil {
		s.wrong("subjects", strings.Join(st.texts, ","), "subjects joined by commas")
	}
	st.subjects = set
	return st
}

// keptSubjects reads which subjects of an external server are kept. Without a
// prefix they must be named: a stream of everything would hold NATS's own too.
func (s *settings) keptSubjects(prefix string, st *streamOptions) {
	v, ok := s.take("subjects")
	if !ok {
		if prefix == "" {
			s.fail(provider.Errorf(provider.ErrInvalid, "a durable provider of driver nats needs the setting subjects or prefix").
				With("setting", "subjects").NextStep("set subjects to those that are to be kept, such as orders.>, joined by commas"))
		}
		return
	}
	st.texts = nil
	for text := range strings.SplitSeq(v, ",") {
		text = strings.TrimSpace(text)
		if problem := subjectProblem([]byte(text), true); problem != "" {
			s.wrong("subjects", v, "subjects joined by commas; "+strconv.Quote(text)+" "+problem)
			return
		}
		if prefix == "" && (text[0] == '*' || text[0] == '>') {
			s.wrong("subjects", v, "subjects whose first token is no wildcard, for lack of a prefix")
			return
		}
		st.texts = append(st.texts, text)
	}
}

// settings reads settings one by one, so that unknown ones are left over.
type settings struct {
	driver string
	rest   map[string]string
	known  []string
	err    error
}

func (s *settings) take(key string) (string, bool) {
	s.known = append(s.known, key)
	v, ok := s.rest[key]
	delete(s.rest, key)
	return v, ok
}

func (s *settings) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

func (s *settings) wrong(key, value, expected string) {
	s.fail(provider.Errorf(provider.ErrInvalid, "setting %s of messaging driver %s is %q; expected %s", key, s.driver, value, expected).
		With("setting", key))
}

func (s *settings) pair(a, valueA, b, valueB string) {
	if (valueA == "") != (valueB == "") {
		s.fail(provider.Errorf(provider.ErrInvalid, "settings %s and %s of messaging driver %s go together", a, b, s.driver).With("setting", a))
	}
}

// choice returns one of values; the first is the default.
func (s *settings) choice(key string, values ...string) string {
	v, ok := s.take(key)
	if !ok {
		return values[0]
	}
	if !slices.Contains(values, v) {
		s.wrong(key, v, strings.Join(values, " or "))
	}
	return v
}

func (s *settings) count(key string, otherwise, least, most int) int {
	v, ok := s.take(key)
	if !ok {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		s.wrong(key, v, "a number from "+strconv.Itoa(least)+" to "+strconv.Itoa(most))
		return otherwise
	}
	return n
}

func (s *settings) duration(key string, otherwise, least, most time.Duration) time.Duration {
	v, ok := s.take(key)
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < least || d > most {
		s.wrong(key, v, "a duration from "+least.String()+" to "+most.String()+" such as 30s")
		return otherwise
	}
	return d
}

func (s *settings) size(key string, otherwise int64) int64 {
	const least, most = 1 << 20, 1 << 50
	v, ok := s.take(key)
	if !ok {
		return otherwise
	}
	n, err := quantity.ParseBytes(v)
	if err != nil || n < least || n > most {
		s.wrong(key, v, "a size of at least 1MiB such as 512MiB")
		return otherwise
	}
	return int64(n)
}

// done refuses what is left over.
func (s *settings) done(durable bool) error {
	if s.err != nil || len(s.rest) == 0 {
		return s.err
	}
	first := slices.Sorted(maps.Keys(s.rest))[0]
	if !durable && slices.Contains(keeping(), first) {
		return provider.Errorf(provider.ErrInvalid, "setting %s of messaging has a meaning with durable=true only", first).
			With("setting", first).NextStep("set durable=true, or leave %s out", first)
	}
	return provider.Errorf(provider.ErrInvalid, "messaging driver %s has no setting %s; expected %s",
		s.driver, first, strings.Join(s.known, ", ")).With("setting", first)
}

func keeping() []string {
	return []string{"ack_wait", "max_age", "max_bytes", "fsync", "stream", "stream_replicas", "subjects"}
}
