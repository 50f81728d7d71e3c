package control

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// idAlphabet has no vowels, so that ids spell nothing, and nothing that is
// mistaken for something else when read aloud or typed.
const idAlphabet = "bcdfghjkmnpqrstvwxz23456789"

// suffixLength is the length of the random end of an instance id.
const suffixLength = 5

// mintAttempts bounds the search for free ids; one attempt in a thousand meets a taken one
// when a workload has ten thousand instances.
const mintAttempts = 100

// write is a client's request that changes the state.
type write interface {
	proto.Message
	GetRequestId() string
	GetWrite() *pb.WriteOptions
}

// latest returns a state that holds everything that was acknowledged before now.
func (h *handlers) latest(ctx context.Context) (fsm.View, error) { return h.Viewer.View(ctx, nil) }

// judge lets check look at what this peer has applied, and, when that makes it
// refuse, at the latest state. A leader has applied everything that it
// acknowledged, so the first look is almost always enough and saves the request a
// round of Raft; a deposed leader must not refuse for what it has missed, and
// what it accepts fails when it is proposed. A request that was answered before is
// not refused for what came after: the state knows its answer.
func (h *handlers) judge(ctx context.Context, requestID string, check func(fsm.View) error) error {
	view, err := h.local(ctx)
	if err != nil {
		return err
	}
	if check(view) == nil {
		return nil
	}
	if view, err = h.latest(ctx); err != nil {
		return err
	}
	if err = check(view); err != nil && view.Answered(requestID) {
		return nil
	}
	return err
}

// local returns what this peer has, without asking anyone.
func (h *handlers) local(ctx context.Context) (fsm.View, error) {
	return h.Viewer.View(ctx, &pb.ReadOptions{Stale: true})
}

// propose commits what req asks for and returns the result and a state that
// holds it. req's id and digest make a repetition harmless. about are the records
// that a precondition of req is about.
func (h *handlers) propose(ctx context.Context, req write, cmd *pb.Command, about ...*pb.Precondition) (*pb.CommandResult, fsm.View, error) {
	options := req.GetWrite()
	var err error
	if cmd.Preconditions, err = preconditions(options, about); err != nil {
		return nil, fsm.View{}, err
	}
	if options.GetSessionId() != "" {
		cmd.Session = &pb.CommandSession{
			Id: options.GetSessionId(), Sequence: options.GetSequence(), FirstOutstanding: options.GetFirstOutstanding(),
		}
	}
	return h.commit(ctx, req, req.GetRequestId(), cmd)
}

// preconditions returns what a write expects of the records that it is about.
func preconditions(options *pb.WriteOptions, about []*pb.Precondition) ([]*pb.Precondition, error) {
	index, absent := options.GetIfIndex(), options.GetIfAbsent()
	switch {
	case index == 0 && !absent:
		return nil, nil
	case index != 0 && absent:
		return nil, invalid("write.if_index and write.if_absent exclude each other")
	case len(about) == 0:
		return nil, invalid("this write cannot be made conditional").Next("leave write.if_index and write.if_absent out")
	case index != 0 && len(about) > 1:
		return nil, invalid("write.if_index is about one record, and the target is %d of them", len(about)).
			Next("name one instance by its id")
	}
	for _, p := range about {
		p.ModifiedIndex = index
	}
	return about, nil
}

// onInstances are preconditions on instances.
func onInstances(ids []string) []*pb.Precondition {
	out := make([]*pb.Precondition, len(ids))
	for i, id := range ids {
		out[i] = &pb.Precondition{Record: &pb.Precondition_InstanceId{InstanceId: id}}
	}
	return out
}

// onAssignments are preconditions on the assignments of instances to a provider.
func onAssignments(ids []string, provider string) []*pb.Precondition {
	out := make([]*pb.Precondition, len(ids))
	for i, id := range ids {
		key := &pb.AssignmentKey{InstanceId: id, ProviderId: provider}
		out[i] = &pb.Precondition{Record: &pb.Precondition_Assignment{Assignment: key}}
	}
	return out
}

func onProvider(id string) *pb.Precondition {
	return &pb.Precondition{Record: &pb.Precondition_ProviderId{ProviderId: id}}
}

// commit brings cmd into the log for a request.
func (h *handlers) commit(ctx context.Context, req proto.Message, requestID string, cmd *pb.Command) (*pb.CommandResult, fsm.View, error) {
	digest, err := requestDigest(req)
	if err != nil {
		return nil, fsm.View{}, err
	}
	cmd.RequestId, cmd.RequestDigest = requestID, digest
	cmd.CorrelationId = correlation.ID(ctx)
	if caller, ok := identity.Caller(ctx); ok {
		cmd.Actor = caller.String()
	}
	res, err := h.Proposer.Propose(ctx, cmd)
	if err != nil {
		return nil, fsm.View{}, err
	}
	if refusal := apierror.FromProto(res.GetError()); refusal != nil {
		return nil, fsm.View{}, refusal
	}
	view, err := h.Viewer.View(ctx, &pb.ReadOptions{Stale: true, MinIndex: res.GetIndex()})
	if err != nil {
		// The write is done and the answer is not: a repetition gets both.
		return nil, fsm.View{}, apierror.FromProto(apierror.From(err).Proto(ctx)).With(apierror.DetailOutcome, apierror.OutcomeUnknown)
	}
	return res, view, nil
}

// requestDigest tells requests apart: two requests of the same id are the same
// request when kind and content are equal. Its place in a session is no content:
// it may be repeated without one, and what the client has answers to grows. The
// request is not used by anybody else meanwhile.
func requestDigest(req proto.Message) ([]byte, error) {
	m := req.ProtoReflect()
	sum := sha256.New()
	sum.Write([]byte(m.Descriptor().FullName()))
	sum.Write([]byte{0})
	if w, ok := req.(write); ok && w.GetWrite() != nil {
		if options := w.GetWrite(); options.GetIfIndex() != 0 || options.GetIfAbsent() {
			fmt.Fprintf(sum, "if %d %t", options.GetIfIndex(), options.GetIfAbsent())
		}
		field := m.Descriptor().Fields().ByName("write")
		saved := m.Get(field)
		m.Clear(field)
		defer m.Set(field, saved)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	sum.Write(b)
	return sum.Sum(nil), nil
}

// mint makes n ids for instances of a workload that nothing in view has.
func (h *handlers) mint(view fsm.View, name string, n int) ([]string, error) {
	ids := make([]string, 0, n)
	taken := make(map[string]bool, n)
	for range n {
		for attempt := 0; ; attempt++ {
			id := name + "-" + h.suffix()
			if _, exists := view.Instance(id); !exists && !taken[id] && len(view.InstancesByName(nil, id)) == 0 {
				taken[id] = true
				ids = append(ids, id)
				break
			}
			if attempt == mintAttempts {
				return nil, apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
					"no free instance id was found for the name %s", name).
					Next("remove ended instances: wasmatrix instance rm %s", name)
			}
		}
	}
	return ids, nil
}

func randomSuffix() string {
	b := make([]byte, suffixLength)
	for i := range b {
		b[i] = idAlphabet[rand.IntN(len(idAlphabet))]
	}
	return string(b)
}

// workloadOf returns the name of the workload that an instance id was minted for.
func workloadOf(instanceID string) string {
	if len(instanceID) <= suffixLength+1 {
		return ""
	}
	return instanceID[:len(instanceID)-suffixLength-1]
}

func invalid(format string, args ...any) *apierror.Error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, format, args...)
}
