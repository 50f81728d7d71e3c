package modules

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hashicorp/go-memdb"
	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// parallelPulls bounds the transfers to this peer at once.
	parallelPulls = 4
	firstRetry    = time.Second
	longestRetry  = 30 * time.Second
)

// Run pulls every registered module that this peer lacks from the others, as
// soon as it is registered, and again until it succeeds. It returns nil when
// ctx ends, after all transfers in the background have ended.
func (r *Replicator) Run(ctx context.Context) error {
	defer r.end()
	retry := firstRetry
	for {
		changed := memdb.NewWatchSet()
		missing, err := r.missing(ctx, changed)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		failed := r.pullAll(ctx, missing)
		if failed == 0 {
			retry = firstRetry
		}
		if !r.wait(ctx, changed, failed > 0, retry) {
			return nil
		}
		if failed > 0 {
			retry = min(2*retry, longestRetry)
		}
	}
}

// wait blocks until there may be something to pull. It reports false when ctx has ended.
func (r *Replicator) wait(ctx context.Context, changed memdb.WatchSet, failed bool, retry time.Duration) bool {
	watched, cancel := context.WithCancel(ctx)
	defer cancel()
	var again <-chan time.Time
	if failed {
		timer := time.NewTimer(retry)
		defer timer.Stop()
		again = timer.C
	}
	woken := changed.WatchCh(watched)
	select {
	case err := <-woken:
		// An error says that ctx has ended.
		return err == nil
	case <-r.wanted:
	case <-again:
	}
	return true
}

// missing returns the registered modules that this peer lacks, and adds to
// changed what would change which modules are registered.
func (r *Replicator) missing(ctx context.Context, changed memdb.WatchSet) ([]string, error) {
	view, err := r.cfg.Registry.View(ctx, &pb.ReadOptions{Stale: true})
	if err != nil {
		return nil, fmt.Errorf("read the registered modules: %w", err)
	}
	var digests []string
	for _, m := range view.Modules(changed) {
		if !r.cfg.Store.Has(m.GetDigest()) {
			digests = append(digests, m.GetDigest())
		}
	}
	return digests, nil
}

// pullAll pulls the modules and returns how many could not be had while ctx lived.
func (r *Replicator) pullAll(ctx context.Context, digests []string) (failed int) {
	var g errgroup.Group
	g.SetLimit(parallelPulls)
	results := make([]error, len(digests))
	for i, digest := range digests {
		g.Go(func() error {
			results[i] = r.pull(ctx, digest)
			return nil
		})
	}
	_ = g.Wait()
	for i, err := range results {
		if err != nil && ctx.Err() == nil {
			failed++
			r.cfg.Logger.WarnContext(ctx, "module could not be pulled", "module", digests[i], "error", err)
		}
	}
	return failed
}

// Open returns the bytes of a module, checked against its digest, from this
// peer's disk or, when it is missing or damaged there, from another peer. The
// caller closes the reader. The error is in the API's shape.
func (r *Replicator) Open(ctx context.Context, digest string) (io.ReadCloser, error) {
	body, err := r.cfg.Store.Open(digest)
	if err == nil {
		return body, nil
	}
	if errors.Is(err, ErrDamaged) {
		r.metrics.damaged.Inc()
		r.cfg.Logger.ErrorContext(ctx, "damaged module removed", "module", digest, "error", err)
	}
	if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNotFound) {
		return nil, APIError(err)
	}
	select {
	case r.wanted <- struct{}{}:
	default:
	}
	if err := r.pull(ctx, digest); err != nil {
		return nil, APIError(err)
	}
	body, err = r.cfg.Store.Open(digest)
	return body, APIError(err)
}

// pull brings one module to this peer's disk, in one transfer at a time.
func (r *Replicator) pull(ctx context.Context, digest string) error {
	for {
		r.mu.Lock()
		underWay, busy := r.pulling[digest]
		if !busy {
			r.pulling[digest] = make(chan struct{})
		}
		r.mu.Unlock()
		if !busy {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-underWay:
		}
	}
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		close(r.pulling[digest])
		delete(r.pulling, digest)
	}()
	if r.cfg.Store.Has(digest) {
		return nil
	}
	err := r.pullFromAny(ctx, digest)
	r.metrics.pulled(err)
	return err
}

// pullFromAny asks the peers in random order, so that many who lack the same
// module do not all ask the same one.
func (r *Replicator) pullFromAny(ctx context.Context, digest string) error {
	peers := slices.DeleteFunc(slices.Clone(r.cfg.Peers(ctx)), func(p PeerRef) bool { return p.ID == r.cfg.Self })
	rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
	unreached := apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE,
		"module %s is not on this peer and could not be had from the others", digest).
		Next("wasmatrix cluster members")
	asked := true
	for _, p := range peers {
		err := r.pullFrom(ctx, digest, p)
		if err == nil {
			r.cfg.Logger.InfoContext(ctx, "module pulled", "module", digest, "peer", p.ID)
			return nil
		}
		if errors.Is(err, ErrNoSpace) || ctx.Err() != nil {
			return err
		}
		asked = asked && apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND
		unreached = unreached.With("peer_"+p.ID, err.Error())
	}
	if asked {
		return fmt.Errorf("%s: %w, nor on any other", digest, ErrNotFound)
	}
	return unreached
}

func (r *Replicator) pullFrom(ctx context.Context, digest string, from PeerRef) error {
	client, err := r.client(from)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	stream, err := client.ReadModule(ctx, &pb.ReadModuleRequest{Digest: digest})
	if err != nil {
		return fmt.Errorf("pull module from %s: %w", from.ID, err)
	}
	body := NewChunkReader(func() ([]byte, error) {
		m, err := stream.Recv()
		return m.GetChunk(), err
	})
	if _, _, err := r.cfg.Store.Put(body, digest); err != nil {
		return fmt.Errorf("pull module from %s: %w", from.ID, err)
	}
	return nil
}

// end lets no new transfer start, ends those under way and waits for them.
func (r *Replicator) end() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	close(r.ended)
	r.transfers.Wait()
}

func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
