package messaging

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/crew"
	"github.com/wasmatrix/wasmatrix/provider"
)

// cutPatience is how long handlers may take to end once they are to.
const cutPatience = time.Second

// key names a subscription: the replicas of one workload share it.
type key struct{ name, subject string }

// hub keeps one subscription for each workload and subject that the node's
// records name.
type hub struct {
	id       string // the provider's
	node     string // this one; may be empty
	link     *link
	messages provider.Messages
	meter    *meter
	log      *slog.Logger
	linger   time.Duration
	crew     *crew.Crew // what runs the handlers of all subscriptions

	// watch ends when the hub takes no more messages, work when no handler may go on.
	watch, work       context.Context //nolint:containedctx // the hub's own life, not a call's
	stopWatch, cutOff context.CancelFunc
	routines          sync.WaitGroup

	mu      sync.Mutex
	subs    map[key]*subscription
	shown   int           // of subs, those in the metric
	changed chan struct{} // closed when a subscription became active, failed or ended
}

func newHub(ctx context.Context, h *hub) *hub {
	h.subs, h.changed, h.crew = map[key]*subscription{}, make(chan struct{}), crew.New()
	h.work, h.cutOff = context.WithCancel(ctx)
	h.watch, h.stopWatch = context.WithCancel(h.work)
	h.routines.Go(h.run)
	if h.link.js != nil {
		h.routines.Go(h.tidy)
	}
	return h
}

// run follows the records until the hub closes.
func (h *hub) run() {
	for {
		changed := h.messages.Changed() // before looking, so that no change is missed
		h.reconcile(h.messages.Subscriptions(h.id))
		select {
		case <-changed:
		case <-h.watch.Done():
			return
		}
	}
}

// reconcile begins and ends subscriptions so that they are those of list, which
// is sorted by name and subject.
func (h *hub) reconcile(list []provider.Subscription) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watch.Err() != nil {
		return
	}
	wanted := map[key]struct{}{}
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].Name == list[0].Name && list[n].Subject == list[0].Subject {
			n++
		}
		k := key{list[0].Name, list[0].Subject}
		wanted[k] = struct{}{}
		s, ok := h.subs[k]
		if !ok {
			s = newSubscription(h, k)
			h.subs[k] = s
		}
		s.setMembers(list[:n])
		if !ok {
			h.routines.Go(s.run)
		}
		list = list[n:]
	}
	for k, s := range h.subs {
		if _, ok := wanted[k]; !ok {
			delete(h.subs, k)
			s.revoke()
		}
	}
	h.meter.subscriptions.Add(float64(len(h.subs) - h.shown))
	h.shown = len(h.subs)
	h.tellLocked()
}

func (h *hub) tellLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *hub) tell() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tellLocked()
}

// await waits until an instance is, or is no more, among those that messages of a
// subscription go to.
func (h *hub) await(ctx context.Context, k key, instance string, subscribed bool) error {
	for {
		h.mu.Lock()
		s, changed := h.subs[k], h.changed
		h.mu.Unlock()
		var trouble error
		has := false
		if s != nil {
			has, trouble = s.serves(instance)
		}
		if has == subscribed && (trouble == nil || !subscribed) {
			return nil
		}
		select {
		case <-changed:
		case <-h.watch.Done():
			return errStopped()
		case <-ctx.Done():
			if trouble != nil {
				return provider.Errorf(provider.ErrUnavailable, "the subscription is recorded and does not stand yet: %s", trouble).Because(trouble)
			}
			return provider.FromContext(ctx)
		}
	}
}

// has reports whether messages are taken for a subscription.
func (h *hub) has(k key) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.subs[k]
	return ok
}

// close takes no new messages, gives handlers up to grace, and ends everything.
func (h *hub) close(grace time.Duration) {
	h.stopWatch()
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.routines.Wait()
	}()
	for _, patience := range []time.Duration{grace, cutPatience} {
		timer := time.NewTimer(patience)
		select {
		case <-done:
		case <-timer.C:
		}
		timer.Stop()
		h.cutOff()
	}
	if !isClosed(done) {
		h.log.Warn("closing while handlers still run; what they answer is lost")
	}
	h.meter.subscriptions.Sub(float64(h.shown))
}

// tidy deletes durable consumers that belong to no subscription any more. It
// waits a while before: records under way may bring one back, and with it
// the claim to messages that were stored meanwhile.
func (h *hub) tidy() {
	unclaimed := map[string]time.Time{}
	tick := time.NewTicker(max(h.linger/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-h.watch.Done():
			return
		}
		ctx, cancel := context.WithTimeout(h.watch, 2*apiTimeout)
		h.tidyOnce(ctx, unclaimed, time.Now())
		cancel()
	}
}

func (h *hub) tidyOnce(ctx context.Context, unclaimed map[string]time.Time, now time.Time) {
	stream, err := h.link.js.Stream(ctx, h.link.stream.name)
	if err != nil {
		return // its absence is told where it matters
	}
	claimed := map[string]bool{}
	h.mu.Lock()
	for k := range h.subs {
		claimed[consumerName(k)] = true
	}
	h.mu.Unlock()
	found := map[string]bool{}
	names := stream.ConsumerNames(ctx)
	for name := range names.Name() {
		if strings.HasPrefix(name, consumerPrefix) && !claimed[name] {
			found[name] = true
		}
	}
	if names.Err() != nil {
		return
	}
	for name := range unclaimed {
		if !found[name] {
			delete(unclaimed, name)
		}
	}
	for name := range found {
		since, known := unclaimed[name]
		if !known {
			unclaimed[name] = now
			continue
		}
		if now.Sub(since) < h.linger {
			continue
		}
		if err := stream.DeleteConsumer(ctx, name); err == nil {
			h.log.InfoContext(ctx, "deleted the position of a subscription that has ended", "consumer", name)
		}
	}
}

// forget deletes the durable consumer of a subscription that was ended on purpose.
func (h *hub) forget(ctx context.Context, k key) {
	if h.link.js == nil || h.has(k) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_ = h.link.js.DeleteConsumer(ctx, h.link.stream.name, consumerName(k)) // tidy does it otherwise
}
