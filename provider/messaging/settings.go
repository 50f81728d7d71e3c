package messaging

import (
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// The drivers.
const (
	driverEmbedded = "embedded"
	driverNATS     = "nats"
)

// The bounds of what is stored, in bytes.
const (
	minStream = 1 << 20
	maxStream = 1 << 50
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
	urls              []string
	caFile            string
	certFile, keyFile string
	credsFile         string
	user              string
	password          func() (string, error) // nil for none
	storeDir          string                 // of the embedded server; empty when it keeps nothing
}

var (
	prefixPattern = regexp.MustCompile(`^[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$`)
	streamPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
)

// durableOnly are the settings that say how messages are kept.
var durableOnly = [...]string{"ack_wait", "max_age", "max_bytes", "fsync", "stream", "stream_replicas", "subjects"}

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
	r := setting.New(permission.Messaging, o.driver, cfg.Settings)
	o.deliver = deliverOptions{
		inFlight:   r.Count("max_in_flight", 64, 1, 4096),
		pending:    r.Count("max_pending", 8192, 1, 1<<20),
		most:       uint32(r.Count("max_deliver", 10, 0, 1000)), //nolint:gosec // at most 1000
		backoff:    r.Duration("backoff", 200*time.Millisecond, time.Millisecond, time.Hour),
		maxBackoff: r.Duration("max_backoff", 30*time.Second, time.Millisecond, 24*time.Hour),
	}
	durable := r.Bool("durable", false)
	if o.driver == driverNATS {
		o.outside(r)
	} else {
		o.prefix = "m."
	}
	if durable {
		o.stream = o.keep(r, cfg.ID)
	} else {
		refuseDurableOnly(r)
	}
	if err := r.Done(); err != nil {
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

// refuseDurableOnly refuses settings that would have no effect.
func refuseDurableOnly(r *setting.Reader) {
	for _, name := range durableOnly {
		if r.Has(name) {
			r.Refuse(name, provider.Errorf(provider.ErrInvalid, "setting %s of messaging has a meaning with durable=true only", name).
				NextStep("set durable=true, or leave %s out", name))
		}
	}
}

// outside reads how an external server is reached.
func (o *options) outside(r *setting.Reader) {
	const prefixExpected = "a subject of letters, digits and hyphens such as prod.orders"
	if v := r.Match("prefix", "", prefixPattern, prefixExpected); len(v) > 64 {
		r.Wrong("prefix", v, prefixExpected+", of at most 64 bytes")
	} else if v != "" {
		o.prefix = v + "."
	}
	v := r.Text("url")
	if v == "" {
		r.Refuse("url", provider.Errorf(provider.ErrInvalid, "%s needs the setting url", r).
			NextStep("set url=nats://HOST:4222, several joined by commas"))
	}
	for text := range strings.SplitSeq(v, ",") {
		u, err := url.Parse(strings.TrimSpace(text))
		switch {
		case strings.Contains(text, "@"): // not repeated: it may be a secret
			r.Refuse("url", provider.Errorf(provider.ErrInvalid,
				"setting url of %s holds a user name or a password; expected username and password_file, or creds_file", r).
				NextStep("write them as settings that name files on the provider's node; and change that password"))
		case err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme):
			r.Wrong("url", text, "nats://HOST:PORT or tls://HOST:PORT, several joined by commas")
		default:
			o.server.urls = append(o.server.urls, u.String())
		}
	}
	o.server.caFile = r.File("tls_ca_file")
	r.Both("tls_cert_file", "tls_key_file")
	o.server.certFile, o.server.keyFile = r.File("tls_cert_file"), r.File("tls_key_file")
	o.server.credsFile = r.File("creds_file")
	r.Both("username", "password_file")
	o.server.user, o.server.password = r.Text("username"), r.Secret("password_file")
}

// keep reads how messages are kept.
func (o *options) keep(r *setting.Reader, id string) *streamOptions {
	st := &streamOptions{
		name:     "wasmatrix-" + id,
		ackWait:  r.Duration("ack_wait", 30*time.Second, 100*time.Millisecond, time.Hour),
		maxAge:   r.Duration("max_age", 0, time.Second, 10*365*24*time.Hour),
		maxBytes: -1,
		replicas: 1,
		texts:    []string{">"},
	}
	if o.driver == driverEmbedded {
		st.name = "messages"
		st.fsync = r.Bool("fsync", true)
		st.maxBytes = r.Size("max_bytes", 1<<30, minStream, maxStream)
		o.requests = "r."
	} else {
		st.maxBytes = r.Size("max_bytes", -1, minStream, maxStream)
		st.replicas = r.Count("stream_replicas", 1, 1, 5)
		st.name = r.Match("stream", st.name, streamPattern, "letters, digits, _ and - only, at most 64")
		o.requests = o.prefix + "_WASMATRIX."
		keptSubjects(r, o.prefix, st)
	}
	var permissions []string
	for _, text := range st.texts {
		permissions = append(permissions, "msg:subscribe:"+text)
	}
	set, err := permission.ParseSet(permissions)
	if err != nil {
		r.Wrong("subjects", strings.Join(st.texts, ","), "subjects joined by commas")
	}
	st.subjects = set
	return st
}

// keptSubjects reads which subjects of an external server are kept. Without a
// prefix they must be named: a stream of everything would hold NATS's own too.
func keptSubjects(r *setting.Reader, prefix string, st *streamOptions) {
	v := r.Text("subjects")
	if !r.Has("subjects") {
		if prefix == "" {
			r.Refuse("subjects", provider.Errorf(provider.ErrInvalid, "a durable provider of driver nats needs the setting subjects or prefix").
				NextStep("set subjects to those that are to be kept, such as orders.>, joined by commas"))
		}
		return
	}
	st.texts = nil
	for text := range strings.SplitSeq(v, ",") {
		text = strings.TrimSpace(text)
		if problem := subjectProblem([]byte(text), true); problem != "" {
			r.Wrong("subjects", v, "subjects joined by commas; "+strconv.Quote(text)+" "+problem)
			return
		}
		if prefix == "" && (text[0] == '*' || text[0] == '>') {
			r.Wrong("subjects", v, "subjects whose first token is no wildcard, for lack of a prefix")
			return
		}
		st.texts = append(st.texts, text)
	}
}
