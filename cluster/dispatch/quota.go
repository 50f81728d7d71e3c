package dispatch

import (
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// subscriptionsPerSecond is how often one instance may change its subscriptions
	// in the long run: each change is an entry of the log and a fact, and the guest
	// decides how many it asks for.
	subscriptionsPerSecond = 2
	// subscriptionBurst lets an instance begin and end all that it may have at once.
	subscriptionBurst = 2 * fsm.MaxSubscriptions
	// fewQuotas is how many quotas are kept before the full ones are looked for.
	fewQuotas = 1024
)

// quotas bounds how often instances change their subscriptions. A new leader
// begins with full ones.
type quotas struct {
	mu         sync.Mutex
	byInstance map[string]*rate.Limiter
	sweepAt    int
}

func newQuotas() *quotas {
	return &quotas{byInstance: map[string]*rate.Limiter{}, sweepAt: fewQuotas}
}

// take refuses an instance that has used up its quota. The instance must exist:
// what is kept is bounded by the number of instances.
func (q *quotas) take(instanceID string, now time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.byInstance) >= q.sweepAt {
		q.sweep(now)
	}
	quota := q.byInstance[instanceID]
	if quota == nil {
		quota = rate.NewLimiter(subscriptionsPerSecond, subscriptionBurst)
		q.byInstance[instanceID] = quota
	}
	if quota.AllowN(now, 1) {
		return nil
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
		"instance %q changes its subscriptions more than %d times a second", instanceID, subscriptionsPerSecond).
		With("instance", instanceID).
		With("limit", strconv.Itoa(subscriptionsPerSecond)).
		With(apierror.DetailOutcome, apierror.OutcomeFailed).
		Next("subscribe once, when the guest begins, and keep the subscription")
}

// sweep forgets quotas that are full: a new one would be the same.
func (q *quotas) sweep(now time.Time) {
	for id, quota := range q.byInstance {
		if quota.TokensAt(now) >= subscriptionBurst {
			delete(q.byInstance, id)
		}
	}
	q.sweepAt = max(fewQuotas, 2*len(q.byInstance))
}
