package messaging

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// defaultLinger is how long the position of a subscription that is gone from the
// records is kept.
const defaultLinger = time.Minute

// Options are what a Kind needs of its surroundings.
type Options struct {
	// Log takes what happens in the background; nil discards it.
	Log *slog.Logger
	// Registerer takes the metrics; nil for none.
	Registerer prometheus.Registerer
}

// Kind is the messaging capability. It implements provider.Kind.
type Kind struct {
	log     *slog.Logger
	metrics *metrics
	linger  time.Duration
	grace   time.Duration
}

// New returns the messaging capability. It fails when the metrics cannot be registered.
func New(o Options) (*Kind, error) {
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	k := &Kind{log: o.Log, metrics: m, linger: defaultLinger, grace: closeGrace}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	return k, nil
}

// Type returns "messaging".
func (k *Kind) Type() string { return permission.Messaging }

// Demand returns the need of msg:publish of the subject for publish and request,
// and of msg:subscribe for subscribe and unsubscribe.
func (k *Kind) Demand(operation string, payload []byte) (provider.Demand, error) {
	r, err := decode(operation, payload)
	if err == nil {
		err = r.check(operation)
	}
	if err != nil {
		return provider.Demand{}, err
	}
	action := permission.Publish
	if operation == opSubscribe || operation == opUnsubscribe {
		action = permission.Subscribe
	}
	return provider.Demand{
		Provider: string(r.provider),
		Need:     permission.Need{Capability: permission.Messaging, Action: action, Resource: string(r.subject)},
	}, nil
}

// Repeatable reports true for subscribe: a second one changes nothing.
func (k *Kind) Repeatable(operation string) bool { return operation == opSubscribe }

// Overlapping reports true for an external server: it hands each message out once,
// however many connections take them.
func (k *Kind) Overlapping(old, next provider.Config) bool {
	return old.Driver == driverNATS && next.Driver == driverNATS
}

// Open opens a provider. Its errors are ErrInvalid for a wrong driver or setting,
// ErrUnavailable when the server cannot be reached or has no JetStream, and
// ErrInternal when the embedded server cannot use its directory.
func (k *Kind) Open(ctx context.Context, cfg provider.Config) (provider.Provider, error) {
	o, err := readOptions(cfg)
	if err != nil {
		return nil, err
	}
	log := k.log.With("provider", cfg.ID)
	l, err := openLink(ctx, o, cfg.ID, log)
	if err != nil {
		return nil, err
	}
	s := &service{id: cfg.ID, link: l, meter: k.metrics.of(cfg.ID), grace: k.grace, ends: make(chan struct{})}
	if cfg.StopGrace > 0 {
		s.grace = cfg.StopGrace
	}
	if s.replies, err = openReplies(l); err != nil {
		l.close()
		return nil, err
	}
	if cfg.Messages != nil {
		life := context.Background() //nolint:forbidigo // ends with Close, not with the call that opened it
		s.hub = newHub(life, &hub{
			id: cfg.ID, node: cfg.Node, link: l, messages: cfg.Messages, meter: s.meter, log: log, linger: k.linger,
		})
	}
	return s, nil
}
