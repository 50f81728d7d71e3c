package fsm

import (
	"strconv"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// EventsKept is how many events the state holds; older ones are forgotten. Two
// peers must never run with different values.
const EventsKept = 10_000

// emit records a fact. Sequence, index and time are filled in, and the
// correlation id of the command where e has none.
func (t *tx) emit(e *pb.Event) {
	t.sum.lastEvent++
	e.Sequence = t.sum.lastEvent
	e.Index = t.index
	e.Time = t.now
	e.Message = line(e.GetMessage())
	if e.GetCorrelationId() == "" {
		e.CorrelationId = t.cmd.GetCorrelationId()
	}
	t.chain.put(hashEvent, e)
	t.insert(tableEvents, e)
	for t.sum.eventCount++; t.sum.eventCount > EventsKept; t.sum.eventCount-- {
		oldest, ok := first[*pb.Event](t.txn, tableEvents, indexID, t.sum.lastEvent-t.sum.eventCount+1)
		if ok {
			t.delete(tableEvents, oldest)
		}
	}
}

func (t *tx) instanceEvent(kind pb.EventKind, in *pb.Instance, message string) {
	t.emit(&pb.Event{
		Kind:          kind,
		InstanceId:    in.GetId(),
		NodeId:        in.GetPlacement().GetNodeId(),
		Generation:    in.GetPlacement().GetGeneration(),
		Message:       message,
		CorrelationId: t.cause(in.GetCorrelationId()),
	})
}

func (t *tx) nodeEvent(kind pb.EventKind, n *pb.Node, message string) {
	t.emit(&pb.Event{Kind: kind, NodeId: n.GetId(), Message: message})
}

func (t *tx) providerEvent(kind pb.EventKind, p *pb.Provider, message string) {
	t.emit(&pb.Event{
		Kind:       kind,
		ProviderId: p.GetId(),
		NodeId:     p.GetPlacement().GetNodeId(),
		Generation: p.GetPlacement().GetGeneration(),
		Message:    replicaMessage(p, message),
	})
}

// replicaMessage says which replica a fact is about, but for the first, which most
// providers have alone.
func replicaMessage(p *pb.Provider, message string) string {
	if p.GetReplica() == 0 {
		return message
	}
	which := "replica " + strconv.FormatUint(uint64(p.GetReplica()), 10)
	if message == "" {
		return which
	}
	return which + ": " + message
}

func (t *tx) capabilityEvent(kind pb.EventKind, instanceID, providerID, message string) {
	t.emit(&pb.Event{Kind: kind, InstanceId: instanceID, ProviderId: providerID, Message: message})
}
