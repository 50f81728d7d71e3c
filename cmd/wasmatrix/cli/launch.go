package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// placementGrace is how long an instance may have no node before that is taken
// as the answer: a node may be registering at this moment.
const placementGrace = 2 * time.Second

// commandLimit bounds the wait for a command, whose own time limit says how
// long it may take.
const commandLimit = 365 * 24 * time.Hour

// launch waits for the instances of a workload that was just started.
type launch struct {
	app       *app
	client    *client.Client
	steps     *steps
	name      string
	limit     time.Duration
	instances []*pb.Instance

	told        map[string]bool
	unplacedFor map[string]time.Time
}

// wait waits until every instance runs or, of a command, has ended; of a command
// it shows the output meanwhile.
func (l *launch) wait(ctx context.Context, command bool) error {
	l.told, l.unplacedFor = map[string]bool{}, map[string]time.Time{}
	if err := l.until(ctx, "run", l.limit, l.runs); err != nil {
		return err
	}
	l.steps.end(l.app.elapsed())
	if !command {
		if failed := l.failed(); len(failed) > 0 {
			return workloadFailed(l.name, failed)
		}
		l.steps.say("logs: wasmatrix logs %s -f", l.name)
		return nil
	}
	p := &logPrinter{app: l.app, out: l.app.env.Stdout, errOut: l.app.env.Stderr}
	if l.app.global.output != formTable {
		// Standard output is for the answer.
		p.out = l.app.env.Stderr
	}
	err := p.followUntil(ctx, l.client, idsOf(l.instances), func(ctx context.Context) error {
		return l.until(ctx, "complete", commandLimit, over)
	})
	if err != nil {
		return err
	}
	if failed := l.failed(); len(failed) > 0 {
		return workloadFailed(l.name, failed)
	}
	return nil
}

// until waits until done is true for every instance, and gives up early when
// one cannot be placed.
func (l *launch) until(ctx context.Context, word string, limit time.Duration, done func(*pb.Instance) bool) error {
	err := l.app.waitFor(ctx, l.client, l.steps, wait{
		what: fmt.Sprintf("%s to %s", l.name, word), subject: subjectOf(l.instances), limit: limit,
		look: func(ctx context.Context) (bool, string, error) {
			now, err := reread(ctx, l.client, l.instances)
			if err != nil {
				return false, "", err
			}
			l.instances = now
			all := true
			found := map[string]int{}
			for _, i := range now {
				found[stateOf(i)]++
				all = done(i) && all
				if err := l.placeable(ctx, i); err != nil {
					return false, "", err
				}
			}
			return all, tally(found), nil
		},
	})
	if err != nil {
		l.steps.end(0)
	}
	return err
}

// runs reports whether an instance runs, or ran already, and tells of it once.
func (l *launch) runs(i *pb.Instance) bool {
	if i.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING && !over(i) {
		return false
	}
	if !l.told[i.GetId()] && i.GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_FAILED {
		l.told[i.GetId()] = true
		l.steps.done("%s %s %s", i.GetId(), i.GetPlacement().GetNodeId(), strings.ToLower(stateOf(i)))
	}
	return true
}

// placeable returns an error when no node takes i for placementGrace.
func (l *launch) placeable(ctx context.Context, i *pb.Instance) error {
	refused := i.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_PENDING && i.GetStatus().GetMessage() != ""
	since, known := l.unplacedFor[i.GetId()]
	switch {
	case !refused:
		delete(l.unplacedFor, i.GetId())
	case !known:
		l.unplacedFor[i.GetId()] = l.app.env.Now()
	case l.app.env.Now().Sub(since) >= placementGrace:
		return notPlaceable(ctx, l.client, i)
	}
	return nil
}

func (l *launch) failed() []*pb.Instance {
	var out []*pb.Instance
	for _, i := range l.instances {
		if i.GetStatus().GetState() == pb.InstanceState_INSTANCE_STATE_FAILED {
			out = append(out, i)
		}
	}
	return out
}
