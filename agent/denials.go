package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/wasmatrix/wasmatrix/correlation"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	// denialsEvery is how often refused calls are reported: a guest decides how many
	// there are, and each report is a commit.
	denialsEvery = 10 * time.Second
	// maxDenials is the most keys of one report; what does not fit is summed up.
	maxDenials = 100
	// maxNeed is the longest text of a need: a guest chooses keys and hosts.
	maxNeed = 512
	// denialLogs is how many refused calls are logged in a second, denialLogBurst how
	// many at once.
	denialLogs     = 1
	denialLogBurst = 5
)

// denialKey is what refused calls are summed up by.
type denialKey struct{ instance, provider, need string }

// denialSum is how many calls were refused, and the correlation id of the last one.
type denialSum struct {
	count       uint64
	correlation string
}

// denials sums up refused calls until they are reported.
type denials struct {
	log  *slog.Logger
	wake func() // a report is due

	mu     sync.Mutex
	sums   map[denialKey]*denialSum
	due    time.Time // of the next report; zero when there was none
	armed  bool      // wake is called when it is due
	limit  *rate.Limiter
	silent uint64 // refusals since the last log line
}

func newDenials(log *slog.Logger, wake func()) *denials {
	return &denials{log: log, wake: wake, sums: map[denialKey]*denialSum{}, limit: rate.NewLimiter(denialLogs, denialLogBurst)}
}

// add takes a refused call.
func (d *denials) add(ctx context.Context, x provider.Denial) {
	id := correlation.ID(ctx)
	need := readable(x.Need.String())
	d.mu.Lock()
	d.sum(denialKey{x.Instance, x.Provider, need}, 1, id)
	now := time.Now()
	if !d.armed {
		d.armed = true
		if wait := d.due.Sub(now); wait > 0 {
			time.AfterFunc(wait, d.wake)
		} else {
			d.wake()
		}
	}
	said := d.limit.AllowN(now, 1)
	silent := d.silent
	d.silent++
	if said {
		d.silent = 0
	}
	d.mu.Unlock()
	if said {
		d.log.WarnContext(ctx, "a capability call was refused", "instance", x.Instance, "workload", x.Name,
			"provider", x.Provider, "need", need, "correlation_id", id, "others", silent)
	}
}

// sum adds refused calls under a key. Once there are too many keys those that are
// new go together, under an instance of theirs.
func (d *denials) sum(k denialKey, count uint64, id string) {
	if _, known := d.sums[k]; !known && len(d.sums) >= maxDenials-1 {
		for have, s := range d.sums {
			if have.need == "" {
				s.count, s.correlation = s.count+count, id
				return
			}
		}
		k.need = ""
	}
	s := d.sums[k]
	if s == nil {
		s = &denialSum{}
		d.sums[k] = s
	}
	s.count, s.correlation = s.count+count, id
}

// readable makes a text that may hold any bytes one that a message can carry.
func readable(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= maxNeed {
		return s
	}
	return strings.ToValidUTF8(s[:maxNeed], "")
}

// take returns what is to be reported now; nil when nothing is, or it is too early.
func (d *denials) take() []*pb.DenialReport {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if len(d.sums) == 0 || now.Before(d.due) {
		return nil
	}
	d.due, d.armed = now.Add(denialsEvery), false
	out := make([]*pb.DenialReport, 0, len(d.sums))
	for k, s := range d.sums {
		out = append(out, &pb.DenialReport{
			InstanceId: k.instance, ProviderId: k.provider, Need: k.need, Count: s.count, CorrelationId: s.correlation,
		})
	}
	clear(d.sums)
	return out
}

// giveBack takes back what was not acknowledged, for the next report.
func (d *denials) giveBack(reports []*pb.DenialReport) {
	if len(reports) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range reports {
		d.sum(denialKey{r.GetInstanceId(), r.GetProviderId(), r.GetNeed()}, r.GetCount(), r.GetCorrelationId())
	}
	if !d.armed {
		d.armed = true
		time.AfterFunc(time.Until(d.due), d.wake)
	}
}

// hurry makes what there is due now. It reports whether there is anything.
func (d *denials) hurry() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.due = time.Time{}
	return len(d.sums) > 0
}
