package kv

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// Options are what a Kind needs of its surroundings.
type Options struct {
	// Log takes what happens in the background; nil discards it.
	Log *slog.Logger
	// Now is the clock that expiry goes by; nil means time.Now.
	Now func() time.Time
}

// Kind is the key-value capability. It implements provider.Kind.
type Kind struct {
	log *slog.Logger
	now func() time.Time
}

// New returns the key-value capability.
func New(o Options) *Kind {
	k := &Kind{log: o.Log, now: o.Now}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	if k.now == nil {
		k.now = time.Now
	}
	return k
}

// Type returns "kv".
func (k *Kind) Type() string { return permission.KV }

// Demand returns the need of kv:read of the key for get and of the prefix for list,
// of kv:write for set and cas, and of kv:delete for delete.
func (k *Kind) Demand(operation string, payload []byte) (provider.Demand, error) {
	r, err := decode(operation, payload)
	if err == nil {
		err = r.check(operation)
	}
	if err != nil {
		return provider.Demand{}, err
	}
	action := permission.Write
	switch operation {
	case opGet, opList:
		action = permission.Read
	case opDelete:
		action = permission.Delete
	}
	return provider.Demand{
		Provider: string(r.provider),
		Need:     permission.Need{Capability: permission.KV, Action: action, Resource: string(r.key)},
	}, nil
}

// Repeatable reports true for get and list. A set is not: between the two
// another writer's value could be lost.
func (k *Kind) Repeatable(operation string) bool { return operation == opGet || operation == opList }

// Overlapping reports true for a server outside: all data and marks are there, and
// replicas of the provider share them all the time.
func (k *Kind) Overlapping(old, next provider.Config) bool {
	outside := func(driver string) bool { return driver == "redis" || driver == "nats" }
	return outside(old.Driver) && outside(next.Driver)
}

// Open opens a provider. Its errors are ErrInvalid for a wrong driver or
// setting, ErrUnavailable when another process has the file open, ErrExhausted
// on a full disk, and ErrInternal for a damaged file.
func (k *Kind) Open(ctx context.Context, cfg provider.Config) (provider.Provider, error) {
	var s store
	var err error
	switch cfg.Driver {
	case "", "bbolt":
		var o boltOptions
		if o, err = boltSettings(cfg); err == nil {
			s, err = openBolt(o)
		}
	case "memory":
		var limit int64
		if limit, err = memorySettings(cfg); err == nil {
			s = newMemory(limit)
		}
	case "redis":
		var o redisOptions
		if o, err = redisSettings(cfg); err == nil {
			s, err = openRedis(ctx, &o)
		}
	case "nats":
		var o natsOptions
		if o, err = natsSettings(cfg, k.log.With("provider", cfg.ID)); err == nil {
			s, err = openNats(ctx, &o)
		}
	default:
		err = provider.Errorf(provider.ErrInvalid, "kv has no driver %q; expected bbolt, memory, redis or nats", cfg.Driver).
			With("driver", cfg.Driver)
	}
	if err != nil {
		return nil, err
	}
	return newService(s, k.now, k.log.With("provider", cfg.ID)), nil
}

// minSize is the least max_bytes.
const minSize = 64 << 10

func memorySettings(cfg provider.Config) (limit int64, err error) {
	r := setting.New(permission.KV, "memory", cfg.Settings)
	limit = r.Size("max_bytes", 256<<20, minSize, 0)
	return limit, r.Done()
}

func boltSettings(cfg provider.Config) (boltOptions, error) {
	r := setting.New(permission.KV, "bbolt", cfg.Settings)
	o := boltOptions{
		sync:   r.Bool("fsync", true),
		verify: r.Choice("verify", "auto", "always", "never"),
		limit:  r.Size("max_bytes", 0, minSize, 0),
	}
	if err := r.Done(); err != nil {
		return boltOptions{}, err
	}
	if cfg.Dir == "" {
		return boltOptions{}, provider.Errorf(provider.ErrInvalid, "kv driver bbolt needs a directory")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return boltOptions{}, fmt.Errorf("make the directory of provider %s: %w", cfg.ID, fileError(cfg.Dir, err))
	}
	o.dir = cfg.Dir
	return o, nil
}
