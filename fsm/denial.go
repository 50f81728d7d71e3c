package fsm

import (
	"fmt"
	"slices"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// DenialsPerMinute bounds the facts about refused calls that are recorded within
// one minute of command time, in the whole cluster: a guest decides how often it
// is refused, and must not push all other facts out. Two peers must never run with
// different values.
const DenialsPerMinute = 120

// secondsPerMinute is the length of the window.
const secondsPerMinute = 60

// denialWindow counts the facts about refused calls of one minute.
type denialWindow struct {
	minute   int64
	recorded uint32
}

// message is the window in a snapshot and in the hash; nil before the first fact.
func (w denialWindow) message() *pb.DenialWindow {
	if w.recorded == 0 {
		return nil
	}
	return &pb.DenialWindow{Minute: w.minute, Recorded: w.recorded}
}

// denialKey tells the facts of one report apart.
type denialKey struct{ instance, provider, need string }

// recordDenials turns the refused calls that an agent sums up into facts, one an
// instance, provider and need. What it says of instances that are not placed on it
// is skipped.
func (t *tx) recordDenials(node *pb.Node, reports []*pb.DenialReport) {
	at := make(map[denialKey]int, len(reports))
	var facts []*pb.DenialReport
	for _, r := range reports {
		in, ok := t.instance(r.GetInstanceId())
		if !ok || r.GetCount() == 0 {
			continue
		}
		if !held(node, in.GetPlacement(), in.GetPlacement().GetGeneration()) && !t.hosts(node, r.GetProviderId()) {
			continue
		}
		k := denialKey{r.GetInstanceId(), r.GetProviderId(), r.GetNeed()}
		i, twice := at[k]
		if !twice {
			at[k] = len(facts)
			facts = append(facts, clone(r))
			continue
		}
		facts[i].Count += r.GetCount()
		facts[i].CorrelationId = r.GetCorrelationId()
	}
	for _, r := range facts {
		t.denied(node, r)
	}
}

// hosts reports whether a replica of a provider is placed on a node in its present epoch.
func (t *tx) hosts(node *pb.Node, provider string) bool {
	return slices.ContainsFunc(t.replicas(provider), func(p *pb.Provider) bool {
		return held(node, p.GetPlacement(), p.GetPlacement().GetGeneration())
	})
}

// denied records one fact unless there were too many lately. The last one that is
// recorded says that others are not.
func (t *tx) denied(node *pb.Node, r *pb.DenialReport) {
	window := denialWindow{minute: t.now.GetSeconds() / secondsPerMinute, recorded: 1}
	if known := t.sum.denials; known.minute == window.minute {
		window.recorded += known.recorded
	}
	if window.recorded > DenialsPerMinute {
		return
	}
	t.sum.denials = window
	t.chain.put(hashDenials, window.message())
	message := refusedCalls(r)
	if window.recorded == DenialsPerMinute {
		message += "; further refusals of this minute are not recorded"
	}
	t.emit(&pb.Event{
		Kind:          pb.EventKind_EVENT_KIND_CAPABILITY_DENIED,
		InstanceId:    r.GetInstanceId(),
		NodeId:        node.GetId(),
		ProviderId:    r.GetProviderId(),
		Message:       message,
		CorrelationId: r.GetCorrelationId(),
	})
}

// refusedCalls says what was refused how often.
func refusedCalls(r *pb.DenialReport) string {
	message := "refused once"
	if n := r.GetCount(); n > 1 {
		message = fmt.Sprintf("refused %d times", n)
	}
	if need := r.GetNeed(); need != "" {
		message = need + " was " + message
	}
	if r.GetProviderId() == "" {
		return message + ", no provider was granted"
	}
	return message + " by provider " + r.GetProviderId()
}
