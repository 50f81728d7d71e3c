package external

import (
	"context"
	"log/slog"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
)

// Options are what a Kind needs of its surroundings.
type Options struct {
	// Log takes what happens in the background; nil discards it.
	Log *slog.Logger
}

// Kind is the capability of external providers. It implements provider.Kind.
type Kind struct {
	log *slog.Logger
}

// New returns the capability of external providers.
func New(o Options) *Kind {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Kind{log: o.Log}
}

// Type returns "provider".
func (k *Kind) Type() string { return permission.Provider }

// Demand returns the need of the operation of the provider that the request names.
// The Router fills in the one that it finds when the request names none.
func (k *Kind) Demand(operation string, payload []byte) (provider.Demand, error) {
	r, err := decode(operation, payload)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return provider.Demand{}, err
	}
	return provider.Demand{
		Provider: r.provider,
		Need:     permission.Need{Capability: permission.Provider, Action: r.operation, Resource: r.provider},
	}, nil
}

// Overlapping reports true: nothing is kept on the node.
func (k *Kind) Overlapping(_, _ provider.Config) bool { return true }

// Open opens the connection to a server. It waits a moment for the server to
// answer, and does not fail when it does not: calls fail with ErrUnavailable until
// it does. Its errors are ErrInvalid for a wrong driver or setting.
func (k *Kind) Open(ctx context.Context, cfg provider.Config) (provider.Provider, error) {
	s, err := parse(cfg)
	if err != nil {
		return nil, err
	}
	return open(ctx, cfg.ID, s, k.log.With("provider", cfg.ID))
}
