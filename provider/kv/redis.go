package kv

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"

	"github.com/wasmatrix/wasmatrix/provider"
)

// redisStore is the driver that keeps everything on a Redis server or cluster.
//
// A bucket is some keys there, NAMESPACE:{BUCKET}:KIND. They have the bucket as
// hash tag, so that one script can work on all of them on a Redis Cluster too:
//
//	meta     hash: key to version and expiry
//	data     hash: key to value
//	index    sorted set of the keys, all with score 0: in byte order
//	expiry   sorted set of the keys that expire, by millisecond
//	version  the last version given
//	marks    on a cluster only: as NAMESPACE:marks
//
// NAMESPACE:marks is a hash from each instance to its newest mark, created and
// generation. One script cannot work on it and on a bucket of a cluster, which so
// has one for each bucket. NAMESPACE:buckets is the set of the buckets that have had a key that expires.
type redisStore struct {
	client    redis.UniversalClient
	namespace string
	cluster   bool
	address   string // for messages
	timeout   time.Duration
	breaker   *gobreaker.TwoStepCircuitBreaker[any]

	get_, write_, list_, sweep_, prune_ script

	swept int // how many times; only of the sweeper

	mu       sync.Mutex
	fence    provider.Fence  // over all buckets, where a script sees one
	expiring map[string]bool // buckets that are in the set
}

// How many marks there may be, and how often that is looked at, in sweeps.
const (
	redisMarks      = 1 << 16
	redisPruneEvery = 600
)

const redisLogIn = "check the provider's username and password_file, and the user's ACL on the Redis server"

// once is a command that the client must not send twice by itself: only we know
// what may be repeated.
type once struct{ *redis.Cmd }

func (once) NoRetry() bool { return true }

// redisTag returns what stands for a bucket in the names of its keys: its length,
// and the name with all but a few characters written as %XX. So no name holds a
// brace, and no two buckets have the same.
func redisTag(bucket string) string {
	var b strings.Builder
	b.WriteString(strconv.Itoa(len(bucket)))
	b.WriteByte(':')
	for _, c := range []byte(bucket) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_./", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// keys returns the names of some of a bucket's keys.
func (s *redisStore) keys(bucket string, kinds ...string) []string {
	head := s.namespace + ":{" + redisTag(bucket) + "}:"
	out := make([]string, len(kinds))
	for i, kind := range kinds {
		out[i] = head + kind
		if kind == "marks" && !s.cluster {
			out[i] = s.namespace + ":marks"
		}
	}
	return out
}

func (s *redisStore) buckets() string { return s.namespace + ":buckets" }

// decimal returns n as the scripts compare numbers.
func decimal(n uint64) string { return fmt.Sprintf("%020d", n) }

// caller returns the first four arguments of a script.
func caller(call *provider.Call, now int64) []any {
	return []any{call.Instance, decimal(call.Created), decimal(call.Generation), decimal(uint64(now))} //nolint:gosec // after 1970
}

// admit refuses what this process knows to be superseded, in whatever bucket, or
// whose time is up. The script refuses the rest.
func (s *redisStore) admit(call *provider.Call) error {
	s.mu.Lock()
	newest := s.fence.Seen(call.Instance)
	if call.Instance != "" && newest.Before(call.Mark()) {
		s.fence.Raise(call.Instance, call.Mark())
	}
	s.mu.Unlock()
	if call.Mark().Before(newest) && call.Instance != "" {
		return provider.Superseded(call.Instance, call.Mark(), newest)
	}
	return call.Admit()
}

// run runs a script for a call and returns what follows its verdict.
func (s *redisStore) run(ctx context.Context, sc script, call *provider.Call, writes bool, keys []string, args ...any) (verdict int64, rest []any, err error) {
	if err := s.admit(call); err != nil {
		return 0, nil, err
	}
	v, err := s.eval(ctx, sc, writes, keys, args...)
	if err != nil {
		return 0, nil, err
	}
	answer, ok := v.([]any)
	if !ok || len(answer) == 0 {
		return 0, nil, s.strange(v)
	}
	if verdict, ok = answer[0].(int64); !ok {
		return 0, nil, s.strange(v)
	}
	rest = answer[1:]
	if verdict != scriptRefused {
		return verdict, rest, nil
	}
	var newest provider.Mark
	if len(rest) == 2 {
		newest.Created, _ = parseDecimal(rest[0])
		newest.Generation, _ = parseDecimal(rest[1])
	}
	s.mu.Lock()
	s.fence.Raise(call.Instance, newest)
	s.mu.Unlock()
	return 0, nil, provider.Superseded(call.Instance, call.Mark(), newest)
}

// eval runs a script. A read whose connection broke is sent again once: the
// connection may have been dead before.
func (s *redisStore) eval(caller context.Context, sc script, writes bool, keys []string, args ...any) (any, error) {
	ctx, cancel := context.WithTimeout(caller, s.timeout)
	defer cancel()
	done, err := s.breaker.Allow()
	if err != nil {
		return nil, provider.Errorf(provider.ErrUnavailable, "redis at %s does not answer; it is tried again every half second", s.address).
			With("address", s.address).Because(err)
	}
	v, err := s.send(ctx, sc, keys, args...)
	if err != nil && !writes && ctx.Err() == nil && !replied(err) {
		v, err = s.send(ctx, sc, keys, args...)
	}
	switch {
	case err == nil || replied(err):
		done(nil)
		if err == nil {
			return v, nil
		}
	case caller.Err() != nil:
		done(errHurry)
	default:
		done(err)
	}
	return nil, s.failure(ctx, err, writes)
}

// errHurry is what the breaker is told of a caller that did not wait for long
// enough, which says nothing about the server.
var errHurry = errors.New("the caller has gone")

func (s *redisStore) send(ctx context.Context, sc script, keys []string, args ...any) (any, error) {
	line := make([]any, 0, 3+len(keys)+len(args))
	line = append(line, "evalsha", sc.hash, len(keys))
	for _, k := range keys {
		line = append(line, k)
	}
	line = append(line, args...)
	cmd := once{redis.NewCmd(ctx, line...)}
	err := s.client.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") { // a server that was started anew
		line[0], line[1] = "eval", sc.source
		cmd = once{redis.NewCmd(ctx, line...)}
		err = s.client.Process(ctx, cmd)
	}
	if err != nil {
		return nil, err
	}
	return cmd.Val(), nil
}

// replied reports whether err is the server's answer.
func replied(err error) bool {
	var e redis.Error
	return errors.As(err, &e)
}

// failure gives an error of the client our shape.
func (s *redisStore) failure(ctx context.Context, err error, writes bool) error {
	if replied(err) {
		return s.refusal(err)
	}
	op, isOp := errors.AsType[*net.OpError](err)
	unsent := isOp && op.Op == "dial" || errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted)
	timeout, isTimeout := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, redis.ErrClosed):
		return provider.Errorf(provider.ErrUnavailable, "the key-value provider was stopped")
	case errors.Is(err, redis.ErrPoolTimeout):
		return provider.Errorf(provider.ErrTimeout, "no connection to redis at %s was free in time", s.address).
			With("address", s.address).NextStep("raise the provider's pool_size").Because(err)
	case ctx.Err() != nil, isTimeout && timeout.Timeout():
		return ended(ctx, "redis at "+s.address, !unsent, writes).Because(err)
	default:
		return broken("redis at "+s.address, err, !unsent, writes)
	}
}

// refusal gives an error that the server answered with our shape. The script had
// no effect then.
func (s *redisStore) refusal(err error) error {
	word, _, _ := strings.Cut(err.Error(), " ")
	kind, next := provider.ErrInternal, "redis-cli monitor; look at the server's log"
	switch word {
	case "OOM":
		kind, next = provider.ErrExhausted, "delete keys, or raise maxmemory of the Redis server"
	case "LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "MISCONF", "NOREPLICAS", "MOVED", "ASK", "UNKILLABLE":
		kind, next = provider.ErrUnavailable, "look at the Redis server: redis-cli info"
	case "NOAUTH", "WRONGPASS", "NOPERM":
		kind, next = provider.ErrUnavailable, redisLogIn
	case "ERR":
		if strings.Contains(err.Error(), "max number of clients") {
			kind, next = provider.ErrUnavailable, "raise maxclients of the Redis server, or lower the provider's pool_size"
		} else if strings.Contains(err.Error(), "unauthenticated") { // of a long command, in place of NOAUTH
			kind, next = provider.ErrUnavailable, redisLogIn
		}
	}
	return provider.Errorf(kind, "redis at %s refused: %s", s.address, err).With("address", s.address).NextStep("%s", next).Because(err)
}

func (s *redisStore) strange(v any) error {
	return provider.Errorf(provider.ErrInternal, "redis at %s answered with %T instead of what the script returns", s.address, v)
}

func parseDecimal(v any) (uint64, bool) {
	text, ok := v.(string)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(text, 10, 64)
	return n, err == nil
}

func (s *redisStore) get(ctx context.Context, call provider.Call, key []byte, now int64, encode func([]byte, uint64) []byte) ([]byte, error) {
	keys := s.keys(call.Bucket, "marks", "meta", "data")
	verdict, rest, err := s.run(ctx, s.get_, &call, false, keys, append(caller(&call, now), key)...)
	if err != nil || verdict == scriptMissing {
		return nil, err
	}
	if len(rest) != 2 {
		return nil, s.damaged(call.Bucket, key)
	}
	version, ok := parseDecimal(rest[0])
	value, isText := rest[1].(string)
	if !ok || !isText {
		return nil, s.damaged(call.Bucket, key)
	}
	return encode([]byte(value), version), nil
}

func (s *redisStore) damaged(bucket string, key []byte) error {
	return provider.Errorf(provider.ErrInternal, "key %q of bucket %q on redis at %s is not as it was written", key, bucket, s.address).
		With("bucket", bucket).With("key", strconv.Quote(string(key))).NextStep("delete or overwrite the key")
}

func (s *redisStore) write(ctx context.Context, w *write) error {
	if w.expires != 0 {
		if err := s.noteExpiring(ctx, w.bucket); err != nil {
			return err
		}
	}
	milliseconds := w.expires / int64(time.Millisecond)
	if w.expires%int64(time.Millisecond) != 0 {
		milliseconds++
	}
	args := append(caller(&w.call, w.now), w.operation, w.key, w.value,
		decimal(uint64(w.expires)), milliseconds, decimal(w.expected)) //nolint:gosec // never negative
	keys := s.keys(w.bucket, "marks", "meta", "data", "index", "expiry", "version")
	verdict, rest, err := s.run(ctx, s.write_, &w.call, true, keys, args...)
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return s.strange(rest)
	}
	version, ok := parseDecimal(rest[0])
	if !ok {
		return s.strange(rest)
	}
	w.done, w.version = verdict == scriptDone, version
	return nil
}

// noteExpiring makes the sweepers of all nodes look at a bucket. It comes before
// the first write that needs them: on a Redis Cluster it cannot be part of it.
func (s *redisStore) noteExpiring(ctx context.Context, bucket string) error {
	s.mu.Lock()
	known := s.expiring[bucket]
	s.mu.Unlock()
	if known {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if err := s.client.SAdd(ctx, s.buckets(), bucket).Err(); err != nil {
		return s.failure(ctx, err, false)
	}
	s.mu.Lock()
	s.expiring[bucket] = true
	s.mu.Unlock()
	return nil
}

func (s *redisStore) list(ctx context.Context, call provider.Call, now int64, p *page) error {
	from, to := "["+string(p.prefix), "+"
	if string(p.cursor) >= string(p.prefix) && len(p.cursor) > 0 {
		from = "(" + string(p.cursor)
	}
	if end := after(p.prefix); end != nil {
		to = "(" + string(end)
	}
	only := 0
	if p.keysOnly {
		only = 1
	}
	_, rest, err := s.run(ctx, s.list_, &call, false, s.keys(call.Bucket, "marks", "meta", "data", "index"),
		append(caller(&call, now), from, to, p.limit, only, maxPageBytes, maxExamined)...)
	if err != nil {
		return err
	}
	for ; len(rest) >= 3; rest = rest[3:] {
		key, isKey := rest[0].(string)
		version, isVersion := parseDecimal(rest[1])
		value, isValue := rest[2].(string)
		if !isKey || !isVersion || !isValue {
			return s.damaged(call.Bucket, []byte(key))
		}
		if !p.visit([]byte(key), []byte(value), version, version != 0) {
			break
		}
	}
	return nil
}

// after returns the first key behind all that begin with prefix, or nil when
// there is none.
func after(prefix []byte) []byte {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] != math.MaxUint8 {
			end := append([]byte(nil), prefix[:i+1]...)
			end[i]++
			return end
		}
	}
	return nil
}

// sweep removes expired keys of every bucket that may have some, and now and then
// the marks of instances that are long gone.
func (s *redisStore) sweep(ctx context.Context, now int64, limit int) (int, error) {
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	buckets, err := s.client.SMembers(bounded, s.buckets()).Result()
	if err != nil {
		return 0, s.failure(bounded, err, false)
	}
	if err := s.remember(bounded, buckets); err != nil {
		return 0, err
	}
	if err := s.prune(ctx, buckets); err != nil {
		return 0, err
	}
	removed := 0
	for _, bucket := range buckets {
		if removed >= limit || ctx.Err() != nil {
			break
		}
		v, err := s.eval(ctx, s.sweep_, false, s.keys(bucket, "meta", "data", "index", "expiry"),
			now/int64(time.Millisecond), limit-removed)
		if err != nil {
			return removed, err
		}
		n, _ := v.(int64)
		removed += int(n)
	}
	return removed, nil
}

// prune removes marks now and then, where there are very many.
func (s *redisStore) prune(ctx context.Context, buckets []string) error {
	if s.swept++; s.swept%redisPruneEvery != 0 {
		return nil
	}
	if !s.cluster {
		buckets = []string{""}
	}
	for _, bucket := range buckets {
		if _, err := s.eval(ctx, s.prune_, false, s.keys(bucket, "marks"), redisMarks, redisMarks/2); err != nil {
			return err
		}
	}
	return nil
}

// remember takes up what the set of buckets holds, and puts back what it lost: a
// server that was started without its data has forgotten it.
func (s *redisStore) remember(ctx context.Context, stored []string) error {
	found := make(map[string]bool, len(stored))
	for _, bucket := range stored {
		found[bucket] = true
	}
	var lost []any
	s.mu.Lock()
	for bucket := range s.expiring {
		if !found[bucket] {
			lost = append(lost, bucket)
		}
	}
	for bucket := range found {
		s.expiring[bucket] = true
	}
	s.mu.Unlock()
	if len(lost) == 0 {
		return nil
	}
	if err := s.client.SAdd(ctx, s.buckets(), lost...).Err(); err != nil {
		return s.failure(ctx, err, false)
	}
	return nil
}

func (s *redisStore) close() error { return s.client.Close() }
