package fsm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const digest = "sha256:1111111111111111111111111111111111111111111111111111111111111111"

// epochStart is the command time of index 0 in every test.
func epochStart() time.Time { return time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC) }

// command wraps a payload.
func command(payload proto.Message) *pb.Command {
	cmd := &pb.Command{CorrelationId: "call-1", Actor: "test"}
	r := cmd.ProtoReflect()
	fields := r.Descriptor().Oneofs().ByName("payload").Fields()
	for i := range fields.Len() {
		if fd := fields.Get(i); fd.Message().FullName() == payload.ProtoReflect().Descriptor().FullName() {
			r.Set(fd, protoreflect.ValueOfMessage(payload.ProtoReflect()))
			return cmd
		}
	}
	panic(fmt.Sprintf("%T is no payload", payload))
}

// bed is a state under test, with a log index and a clock that tick by one per command.
type bed struct {
	t     testing.TB
	s     *fsm.State
	index uint64
	told  uint64
}

func newBed(t testing.TB) *bed {
	t.Helper()
	return &bed{t: t, s: fsm.New()}
}

func (b *bed) now() time.Time { return epochStart().Add(time.Duration(b.index) * time.Second) }

func (b *bed) send(cmd *pb.Command) *pb.CommandResult {
	b.t.Helper()
	b.index++
	if cmd.Time == nil {
		cmd.Time = timestamppb.New(b.now())
	}
	res := b.s.Apply(b.index, cmd)
	if got := b.s.View().Index(); got != b.index {
		b.t.Fatalf("applied index %d, the view is at %d", b.index, got)
	}
	return res
}

// do applies a command that must be accepted.
func (b *bed) do(payload proto.Message) *pb.CommandResult {
	b.t.Helper()
	res := b.send(command(payload))
	if res.GetError() != nil {
		b.t.Fatalf("%T was refused: %v", payload, res.GetError())
	}
	return res
}

// refuse applies a command that must be refused with code and change nothing.
func (b *bed) refuse(code pb.ErrorCode, payload proto.Message) *pb.Error {
	b.t.Helper()
	before := records(b.t, b.s)
	res := b.send(command(payload))
	e := res.GetError()
	if e.GetCode() != code {
		b.t.Fatalf("%T: got %v, want %v", payload, e, code)
	}
	if e.GetMessage() == "" || e.GetCorrelationId() != "call-1" || !e.GetTimestamp().AsTime().Equal(b.now()) {
		b.t.Errorf("%T: the refusal is not complete: %v", payload, e)
	}
	if diff := cmp.Diff(before, records(b.t, b.s), protocmp.Transform()); diff != "" {
		b.t.Errorf("%T was refused and changed the state:\n%s", payload, diff)
	}
	return e
}

// news returns the events since the last call, as "KIND subject message".
func (b *bed) news() []string {
	b.t.Helper()
	var out []string
	for _, e := range b.s.View().Events(b.told, 0) {
		b.told = e.GetSequence()
		subject := e.GetInstanceId() + e.GetModuleDigest()
		if p := e.GetProviderId(); p != "" && subject != "" {
			subject += "/" + p
		} else {
			subject += p
		}
		if subject == "" {
			subject = e.GetNodeId()
		}
		text := e.GetKind().String()[len("EVENT_KIND_"):] + " " + subject
		if e.GetMessage() != "" {
			text += ": " + e.GetMessage()
		}
		out = append(out, text)
	}
	return out
}

// told checks the events since the last look.
func (b *bed) tells(want ...string) {
	b.t.Helper()
	if diff := cmp.Diff(want, b.news(), cmpEmpty()); diff != "" {
		b.t.Errorf("events (-want +got):\n%s", diff)
	}
}

func cmpEmpty() cmp.Option {
	return cmp.Transformer("nilIsEmpty", func(in []string) string { return fmt.Sprintf("%q", in) })
}

func (b *bed) node(id string, providers ...*pb.ProviderSpec) uint64 {
	b.t.Helper()
	return b.register(id, 0, providers...)
}

func (b *bed) register(id string, epoch uint64, providers ...*pb.ProviderSpec) uint64 {
	b.t.Helper()
	return b.do(&pb.RegisterNodeCommand{Info: nodeInfo(id), Providers: providers, Epoch: epoch}).GetEpoch()
}

func nodeInfo(id string) *pb.NodeInfo {
	return &pb.NodeInfo{
		Id: id, AgentAddress: "127.0.0.1:7400", Labels: map[string]string{"zone": "a", "disk": "ssd"},
		Capacity: &pb.NodeCapacity{Instances: 100, MemoryBytes: 1 << 30}, Platform: "linux/amd64",
	}
}

func (b *bed) expire(id string, epoch uint64) {
	b.t.Helper()
	b.do(&pb.ExpireNodeCommand{NodeId: id, Epoch: epoch})
}

func (b *bed) module() {
	b.t.Helper()
	b.do(&pb.PutModuleCommand{Module: &pb.Module{Digest: digest, SizeBytes: 9, Name: "hello.wasm"}})
}

// run accepts a workload of one replica whose id is its name and "-1".
func (b *bed) run(name, policy string, grants ...*pb.CapabilityGrant) string {
	b.t.Helper()
	id := name + "-1"
	b.do(&pb.CreateInstancesCommand{Spec: workload(name, policy, grants...), InstanceIds: []string{id}})
	return id
}

func workload(name, policy string, grants ...*pb.CapabilityGrant) *pb.WorkloadSpec {
	return &pb.WorkloadSpec{
		Name: name, Module: digest, Capabilities: grants, Restart: &pb.RestartPolicy{Policy: policy},
		Env: map[string]string{"A": "1", "B": "2", "C": "3"},
	}
}

// place proposes to place an instance as a scheduler that sees the present state.
func (b *bed) place(instance, node string) *pb.CommandResult {
	b.t.Helper()
	v := b.s.View()
	in, _ := v.Instance(instance)
	n, _ := v.Node(node)
	return b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		InstanceId: instance, SeenGeneration: in.GetPlacement().GetGeneration(),
		NodeId: node, NodeEpoch: n.GetEpoch(),
	}}})
}

// placeProvider is place for a provider.
func (b *bed) placeProvider(provider, node string) *pb.CommandResult {
	b.t.Helper()
	p := b.provider(provider)
	n, _ := b.s.View().Node(node)
	return b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		ProviderId: provider, SeenGeneration: p.GetPlacement().GetGeneration(),
		NodeId: node, NodeEpoch: n.GetEpoch(),
	}}})
}

// placeReplica is placeProvider for one replica.
func (b *bed) placeReplica(provider string, replica uint32, node string) *pb.CommandResult {
	b.t.Helper()
	n, _ := b.s.View().Node(node)
	return b.do(&pb.PlaceCommand{Decisions: []*pb.PlaceDecision{{
		ProviderId: provider, Replica: replica, SeenGeneration: b.replica(provider, replica).GetPlacement().GetGeneration(),
		NodeId: node, NodeEpoch: n.GetEpoch(),
	}}})
}

// subscription is what the node of a messaging provider's first placed replica
// asks for an instance.
func (b *bed) subscription(instance, provider, subject string, subscribed bool) *pb.RecordSubscriptionRequest {
	b.t.Helper()
	c := &pb.RecordSubscriptionRequest{InstanceId: instance, ProviderId: provider, Subject: subject, Subscribed: subscribed}
	for _, p := range b.s.View().ProviderReplicas(provider) {
		if fsm.ProviderPlaced(p) && c.NodeId == "" {
			c.NodeId, c.Epoch = p.GetPlacement().GetNodeId(), p.GetPlacement().GetNodeEpoch()
		}
	}
	in, _ := b.s.View().Instance(instance)
	c.Generation = in.GetPlacement().GetGeneration()
	return c
}

// denials is the report of a node about refused calls.
func (b *bed) denials(node string, reports ...*pb.DenialReport) *pb.ReportStatusRequest {
	b.t.Helper()
	n, _ := b.s.View().Node(node)
	return &pb.ReportStatusRequest{NodeId: node, Epoch: n.GetEpoch(), Denials: reports}
}

// running brings an instance from its acceptance to RUNNING on a node.
func (b *bed) running(name, policy, node string, grants ...*pb.CapabilityGrant) string {
	b.t.Helper()
	id := b.run(name, policy, grants...)
	b.place(id, node)
	b.report(id, state("RUNNING"), 1)
	return id
}

func state(name string) pb.InstanceState {
	n, ok := pb.InstanceState_value["INSTANCE_STATE_"+name]
	if !ok {
		panic("no state " + name)
	}
	return pb.InstanceState(n)
}

// report sends a report as the agent that holds the instance and has seen all
// that was asked of it.
func (b *bed) report(id string, s pb.InstanceState, attempt uint32, edit ...func(*pb.InstanceStatus)) bool {
	b.t.Helper()
	in := b.instance(id)
	status := &pb.InstanceStatus{State: s, Generation: in.GetPlacement().GetGeneration(), Attempt: attempt}
	for _, e := range edit {
		e(status)
	}
	return b.reports(in, &pb.InstanceReport{
		InstanceId: id, Status: status, RestartEpoch: in.GetRestartEpoch(),
		Left: in.GetLeaving() && s == pb.InstanceState_INSTANCE_STATE_STOPPED,
	})
}

// reports sends a report about an instance as the agent that held it as in says.
func (b *bed) reports(in *pb.Instance, r *pb.InstanceReport) bool {
	b.t.Helper()
	res := b.do(&pb.ReportStatusRequest{
		NodeId: in.GetPlacement().GetNodeId(), Epoch: in.GetPlacement().GetNodeEpoch(),
		Instances: []*pb.InstanceReport{r},
	})
	return len(res.GetIds()) == 1
}

// move moves an instance off its node, which drains, as scheduler and agent do.
func (b *bed) move(instance, node string) {
	b.t.Helper()
	b.place(instance, node)
	b.report(instance, state("STOPPED"), b.instance(instance).GetStatus().GetAttempt())
	b.place(instance, node)
}

func (b *bed) reportProvider(id string, s pb.ProviderState, message string) bool {
	b.t.Helper()
	return b.reportReplica(id, 0, s, message)
}

func (b *bed) reportReplica(id string, replica uint32, s pb.ProviderState, message string) bool {
	b.t.Helper()
	p := b.replica(id, replica)
	res := b.do(&pb.ReportStatusRequest{
		NodeId: p.GetPlacement().GetNodeId(), Epoch: p.GetPlacement().GetNodeEpoch(),
		Providers: []*pb.ProviderReport{{ProviderId: id, Replica: replica, Status: &pb.ProviderStatus{
			State: s, Generation: p.GetPlacement().GetGeneration(), Message: message,
		}}},
	})
	return len(res.GetIds()) == 1
}

func (b *bed) instance(id string) *pb.Instance {
	b.t.Helper()
	in, ok := b.s.View().Instance(id)
	if !ok {
		b.t.Fatalf("instance %s does not exist", id)
	}
	return in
}

func (b *bed) provider(id string) *pb.Provider {
	b.t.Helper()
	return b.replica(id, 0)
}

func (b *bed) replica(id string, replica uint32) *pb.Provider {
	b.t.Helper()
	for _, p := range b.s.View().ProviderReplicas(id) {
		if p.GetReplica() == replica {
			return p
		}
	}
	b.t.Fatalf("provider %s has no replica %d", id, replica)
	return nil
}

// is checks an instance as "STATE node generation".
func (b *bed) is(id, want string) {
	b.t.Helper()
	in := b.instance(id)
	got := fmt.Sprintf("%s %s %d", in.GetStatus().GetState().String()[len("INSTANCE_STATE_"):],
		in.GetPlacement().GetNodeId(), in.GetPlacement().GetGeneration())
	if got != want {
		b.t.Errorf("instance %s is %q, want %q", id, got, want)
	}
}

// providerIs checks a provider as "STATE node generation", the generation counted
// from its registration.
func (b *bed) providerIs(id, want string) {
	b.t.Helper()
	b.replicaIs(id, 0, want)
}

func (b *bed) replicaIs(id string, replica uint32, want string) {
	b.t.Helper()
	p := b.replica(id, replica)
	got := fmt.Sprintf("%s %s %d", p.GetStatus().GetState().String()[len("PROVIDER_STATE_"):],
		p.GetPlacement().GetNodeId(), p.GetPlacement().GetGeneration()-p.GetCreatedIndex())
	if got != want {
		b.t.Errorf("provider %s is %q, want %q", fsm.ReplicaName(id, replica), got, want)
	}
}

func kv(id string) *pb.ProviderSpec { return &pb.ProviderSpec{Id: id, Type: "kv", Driver: "memory"} }

// bus is a messaging provider that keeps no state on its nodes.
func bus(id string, replicas uint32) *pb.ProviderSpec {
	return &pb.ProviderSpec{Id: id, Type: "messaging", Driver: "nats", Replicas: replicas}
}

func grant(provider string, permissions ...string) *pb.CapabilityGrant {
	return &pb.CapabilityGrant{Provider: provider, Permissions: permissions}
}

// dump is the whole state as bytes.
func dump(t testing.TB, s *fsm.State) []byte {
	t.Helper()
	return dumpView(t, s, s.View())
}

func dumpView(t testing.TB, s *fsm.State, v fsm.View) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := s.WriteSnapshot(v, &buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// records returns every record of the state, without header and trailer, which
// change with every command.
func records(t testing.TB, s *fsm.State) []*pb.SnapshotRecord {
	t.Helper()
	all := parse(t, dump(t, s))
	return all[1 : len(all)-1]
}

// parse reads a snapshot with the standard reader of delimited messages.
func parse(t testing.TB, snapshot []byte) []*pb.SnapshotRecord {
	t.Helper()
	var out []*pb.SnapshotRecord
	for r := bytes.NewReader(snapshot); ; {
		rec := &pb.SnapshotRecord{}
		err := protodelim.UnmarshalFrom(r, rec)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, rec)
	}
}

func ids(ins []*pb.Instance) []string {
	out := []string{}
	for _, in := range ins {
		out = append(out, in.GetId())
	}
	return out
}

func same(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) && len(got)+len(want) > 0 {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}
