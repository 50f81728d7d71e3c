package dispatch

import (
	"context"
	"sync"
	"time"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// proofs shares proofs of leadership among all renewals. A proof is a
// linearizable read; it shows that this peer led at some time after it began.
type proofs struct {
	mu sync.Mutex
	// at is when the latest successful proof began.
	at time.Time
	// next is the proof that those who ask now wait for; nil when nobody asks.
	next *proof
	// asked gets a value when next is set.
	asked chan struct{}
}

type proof struct {
	done chan struct{}
	err  error
}

func newProofs() *proofs { return &proofs{asked: make(chan struct{}, 1)} }

// run makes a proof whenever one is asked for. Those who ask while one is under
// way share the next one.
func (p *proofs) run(ctx context.Context, peer Peer, clock Clock) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.asked:
		}
		p.mu.Lock()
		wanted := p.next
		p.next = nil
		p.mu.Unlock()
		if wanted == nil {
			continue
		}
		began := clock.Now()
		_, err := peer.View(ctx, &pb.ReadOptions{})
		p.mu.Lock()
		if err == nil {
			p.at = began
		}
		p.mu.Unlock()
		wanted.err = err
		close(wanted.done)
	}
}

// since returns when the latest proof began, no earlier than oldest; it waits
// for a new one if it must, until ctx or the term ends.
func (p *proofs) since(ctx context.Context, oldest time.Time, ended <-chan struct{}) (time.Time, error) {
	p.mu.Lock()
	if !p.at.Before(oldest) {
		defer p.mu.Unlock()
		return p.at, nil
	}
	if p.next == nil {
		p.next = &proof{done: make(chan struct{})}
		p.asked <- struct{}{}
	}
	wanted := p.next
	p.mu.Unlock()
	select {
	case <-wanted.done:
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	case <-ended:
		return time.Time{}, errEnded
	}
	if wanted.err != nil {
		return time.Time{}, wanted.err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at, nil
}
