package kv

import (
	"context"
	"slices"
	"sync"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The bounds of one batch and of what may wait for the next. A batch under way
// lasts as long as one sync of the disk, so these bound memory, not throughput.
const (
	maxBatchBytes = 8 << 20
	maxBatchJobs  = 4096
	maxWaiting    = 64 << 20
)

// job is one write that waits to be committed.
type job struct {
	run  func(tx txn) error
	size int
	done chan struct{} // closed after err was set
	err  error
}

// committer turns writes into batches by backpressure: an idle one commits a
// write at once, and what arrives while a commit is under way goes with the next.
type committer struct {
	commit func(batch []*job) // sets each job's err

	mu      sync.Mutex
	queue   []*job
	bytes   int
	closed  bool
	wake    chan struct{} // holds one token when the queue may not be empty
	stopped chan struct{} // closed when run has returned
}

func newCommitter(commit func(batch []*job)) *committer {
	return &committer{commit: commit, wake: make(chan struct{}, 1), stopped: make(chan struct{})}
}

// do queues a job and waits until it was committed. When ctx ends first the job
// is withdrawn, or, when it is under way already, may still be committed.
func (c *committer) do(ctx context.Context, size int, run func(tx txn) error) error {
	j := &job{run: run, size: size, done: make(chan struct{})}
	if err := c.add(j); err != nil {
		return err
	}
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
	}
	if c.withdraw(j) {
		return provider.FromContext(ctx)
	}
	select {
	case <-j.done:
		return j.err
	default:
		return provider.Errorf(provider.ErrTimeout, "the write was not confirmed before the call ended; it may have been carried out").
			With("outcome", "unknown").Because(ctx.Err())
	}
}

func (c *committer) add(j *job) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return provider.Errorf(provider.ErrUnavailable, "the key-value provider was stopped")
	}
	if c.bytes+j.size > maxWaiting {
		return provider.Errorf(provider.ErrExhausted, "too many writes wait for the disk").
			NextStep("write more slowly; check the disk of the provider's node")
	}
	c.queue = append(c.queue, j)
	c.bytes += j.size
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return nil
}

func (c *committer) withdraw(j *job) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.queue, j)
	if i < 0 {
		return false
	}
	c.queue = slices.Delete(c.queue, i, i+1)
	c.bytes -= j.size
	return true
}

// next takes a batch off the queue.
func (c *committer) next() (batch []*job, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, size := 0, 0
	for n < len(c.queue) && n < maxBatchJobs && (n == 0 || size+c.queue[n].size <= maxBatchBytes) {
		size += c.queue[n].size
		n++
	}
	batch = slices.Clone(c.queue[:n])
	c.queue = slices.Delete(c.queue, 0, n)
	c.bytes -= size
	return batch, c.closed
}

// run commits batches until close was called and the queue is empty.
func (c *committer) run() {
	defer close(c.stopped)
	for range c.wake {
		for {
			batch, closed := c.next()
			if len(batch) == 0 {
				if closed {
					return
				}
				break
			}
			c.commit(batch)
			for _, j := range batch {
				close(j.done)
			}
		}
	}
}

// close refuses further jobs, waits until those queued were committed, and ends run.
func (c *committer) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	<-c.stopped
}
