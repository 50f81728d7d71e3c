package kv

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/sony/gobreaker/v2"

	"github.com/wasmatrix/wasmatrix/permission"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/setting"
)

// When calls are refused without asking the server: after so many failures in a
// row, for so long. One call at a time then finds out whether it is back.
const (
	breakAfter = 5
	breakFor   = 500 * time.Millisecond
)

// redisOptions are the settings of driver redis.
type redisOptions struct {
	server    server
	database  int
	cluster   bool
	namespace string
	timeout   time.Duration
	dial      time.Duration
	pool      int
}

func redisSettings(cfg provider.Config) (redisOptions, error) {
	r := setting.New(permission.KV, "redis", cfg.Settings)
	o := redisOptions{
		server:    readServer(r, schemes{plain: "redis", secure: "rediss", port: "6379"}),
		cluster:   r.Bool("cluster", false),
		namespace: namespace(r),
		pool:      r.Count("pool_size", 32, 1, 4096),
	}
	o.timeout, o.dial = timeouts(r)
	if path := o.server.path; path != "" {
		n, err := strconv.Atoi(path)
		if err != nil || n < 0 || o.cluster && n != 0 {
			r.Fail("url", "setting url of %s ends with /%s; expected the number of a database, and none for a cluster", r, path)
		}
		o.database = n
	}
	if len(o.server.addresses) > 1 && !o.cluster {
		r.Fail("url", "setting url of %s names several hosts; that takes cluster=true", r)
	}
	if o.server.username != "" && o.server.password == nil {
		r.Fail("password_file", "%s has the setting username and no password_file", r)
	}
	return o, r.Done()
}

// openRedis opens a store. It fails when the server cannot be reached or does not
// let us in, so that whoever made the provider sees it; the agent tries again.
func openRedis(ctx context.Context, o *redisOptions) (*redisStore, error) {
	logging.Disable() // it writes to stderr; every failure is returned as well
	s := &redisStore{
		client: o.client(), namespace: o.namespace, cluster: o.cluster, address: strings.Join(o.server.addresses, ","), timeout: o.timeout,
		breaker: gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
			MaxRequests: 1, Timeout: breakFor,
			ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakAfter },
			IsExcluded:  func(err error) bool { return errors.Is(err, errHurry) },
		}),
		get_: newScript(luaGet), write_: newScript(luaWrite), list_: newScript(luaList),
		sweep_: newPlainScript(luaSweep), prune_: newPlainScript(luaPrune),
		expiring: map[string]bool{},
	}
	if err := s.greet(ctx); err != nil {
		_ = s.client.Close()
		return nil, err
	}
	return s, nil
}

func (o *redisOptions) client() redis.UniversalClient {
	var credentials func(context.Context) (string, string, error)
	if o.server.password != nil {
		credentials = func(context.Context) (string, string, error) {
			password, err := o.server.password()
			return o.server.username, password, err
		}
	}
	quiet := &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	if o.cluster {
		return redis.NewClusterClient(&redis.ClusterOptions{
			Addrs: o.server.addresses, CredentialsProviderContext: credentials, TLSConfig: o.server.tls,
			MaxRetries: -1, DialerRetries: 1, DialTimeout: o.dial, ReadTimeout: o.timeout, WriteTimeout: o.timeout,
			PoolSize: o.pool, PoolTimeout: o.timeout, ContextTimeoutEnabled: true, DisableIdentity: true,
			DisableRoutingPolicies: true, MaintNotificationsConfig: quiet,
		})
	}
	return redis.NewClient(&redis.Options{
		Addr: o.server.addresses[0], DB: o.database, CredentialsProviderContext: credentials, TLSConfig: o.server.tls,
		MaxRetries: -1, DialerRetries: 1, DialTimeout: o.dial, ReadTimeout: o.timeout, WriteTimeout: o.timeout,
		PoolSize: o.pool, PoolTimeout: o.timeout, ContextTimeoutEnabled: true, DisableIdentity: true,
		MaintNotificationsConfig: quiet,
	})
}

// greet finds out whether the server can serve: it runs a script on the keys of
// a bucket, as a call does. No bucket of a call has an empty name.
func (s *redisStore) greet(ctx context.Context) error {
	call := provider.Call{}
	_, _, err := s.run(ctx, s.get_, &call, false, s.keys("", "marks", "meta", "data"), append(caller(&call, 0), "")...)
	if err == nil {
		return s.evicts(ctx)
	}
	e, ok := errors.AsType[*provider.Error](err)
	switch {
	case !ok:
		return err
	case errors.Is(err, provider.ErrInternal):
		return e.NextStep("check that url names a Redis server of version 5 or later")
	case strings.Contains(e.Message, "MOVED"):
		return e.NextStep("it is part of a Redis Cluster: set cluster=true")
	case e.Next == "":
		return e.NextStep("check the provider's url, and that the Redis server runs: redis-cli -u URL ping")
	}
	return e
}

// evicts fails for a server that throws keys away when its memory is full. One
// that does not tell is believed.
func (s *redisStore) evicts(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	policy := s.client.ConfigGet(ctx, "maxmemory-policy").Val()["maxmemory-policy"]
	if !strings.HasPrefix(policy, "allkeys-") {
		return nil
	}
	return provider.Errorf(provider.ErrInvalid, "redis at %s drops keys when its memory is full (maxmemory-policy %s)", s.address, policy).
		With("address", s.address).With("maxmemory-policy", policy).NextStep("set maxmemory-policy noeviction on the Redis server")
}
