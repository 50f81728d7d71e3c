package agent

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// maxEndedInstances bounds the records kept of instances that have ended.
	maxEndedInstances = 1000
	// idRandomBytes gives the five characters after an instance's name.
	idRandomBytes = 4
	idLetters     = 5
)

// standalone takes the part of the control plane on a node that has none: it
// accepts workloads and modules, and feeds them to the agent as a stream of
// assignments would. What it accepted survives a restart in the journal; the
// answers to request ids do not.
type standalone struct {
	node     string
	modules  *moduleStore
	runtimes func(name string) bool
	declared map[string]*pb.ProviderSpec
	capacity int
	// accept makes changes durable and carries them out.
	accept func([]*pb.AssignmentChange) error
	// resolve and instances look at what the agent has.
	resolve   func(target string) ([]string, error)
	instances func() []*pb.Instance
	grantsOf  func(id string) []*pb.CapabilityAssignment
	now       func() time.Time

	mu       sync.Mutex // one request at a time
	answers  map[string]remembered
	sequence []string // request ids, oldest first
}

// start accepts a workload.
func (s *standalone) start(ctx context.Context, req *pb.StartInstanceRequest) (*pb.StartInstanceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	digest, ids, err := s.recall(req.GetRequestId(), req)
	if err != nil {
		return nil, err
	}
	if ids != nil {
		return &pb.StartInstanceResponse{Instances: s.named(ids)}, nil
	}
	grants, err := s.check(req.GetSpec())
	if err != nil {
		return nil, err
	}
	known := s.instances()
	if err := s.room(req.GetSpec(), known); err != nil {
		return nil, err
	}
	changes := s.pruned(known)
	var made []*pb.Instance
	for range max(1, req.GetSpec().GetReplicas()) {
		inst := s.instance(ctx, req.GetSpec(), s.mint(req.GetSpec().GetName(), known, made))
		made = append(made, inst)
		ids = append(ids, inst.GetId())
		for _, g := range grants {
			changes = append(changes, &pb.AssignmentChange{Change: &pb.AssignmentChange_PutAssignment{
				PutAssignment: s.assignment(ctx, inst, g),
			}})
		}
	}
	for _, inst := range made {
		changes = append(changes, &pb.AssignmentChange{Change: &pb.AssignmentChange_PutInstance{PutInstance: inst}})
	}
	if err := s.accept(changes); err != nil {
		return nil, err
	}
	s.remember(req.GetRequestId(), digest, ids)
	return &pb.StartInstanceResponse{Instances: s.named(ids)}, nil
}

func (s *standalone) instance(ctx context.Context, spec *pb.WorkloadSpec, id string) *pb.Instance {
	own := &pb.WorkloadSpec{}
	proto.Merge(own, spec)
	own.Replicas = 1
	return &pb.Instance{
		Id: id, Name: own.GetName(), Spec: own, DesiredRunning: true,
		Placement:     &pb.Placement{NodeId: s.node, NodeEpoch: standaloneEpoch, Generation: 1},
		CorrelationId: correlation.ID(ctx), CreatedAt: timestamppb.New(s.now()),
	}
}

func (s *standalone) assignment(ctx context.Context, inst *pb.Instance, g *pb.CapabilityGrant) *pb.CapabilityAssignment {
	bucket := g.GetBucket()
	if bucket == "" {
		bucket = inst.GetName()
	}
	return &pb.CapabilityAssignment{
		InstanceId: inst.GetId(), ProviderId: g.GetProvider(), Permissions: g.GetPermissions(),
		Bucket: bucket, CorrelationId: correlation.ID(ctx), Subscriptions: triggered(inst.GetSpec(), g),
	}
}

// check refuses what could never run here and merges grants of one provider.
func (s *standalone) check(spec *pb.WorkloadSpec) ([]*pb.CapabilityGrant, error) {
	if !digestPattern.MatchString(spec.GetModule()) {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "module %q is not a digest", spec.GetModule()).
			Next("upload the module and name it as sha256:…")
	}
	if _, err := os.Stat(s.modules.path(spec.GetModule())); err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "no module has the digest %s", spec.GetModule()).
			With("module", spec.GetModule()).Next("wasmatrix module push FILE.wasm")
	}
	if !s.runtimes(spec.GetRuntime()) {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "this node has no runtime %q", spec.GetRuntime()).
			With("runtime", spec.GetRuntime()).Next("wasmatrix doctor on this machine says what it takes")
	}
	if _, err := memoryLimit(spec.GetLimits().GetMemory()); err != nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s", err)
	}
	if pin := spec.GetPlacement().GetNode(); pin != "" && pin != s.node {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "node %q is not part of this standalone agent", pin).
			With("node", s.node)
	}
	return s.mergeGrants(spec.GetCapabilities())
}

func (s *standalone) mergeGrants(grants []*pb.CapabilityGrant) ([]*pb.CapabilityGrant, error) {
	var out []*pb.CapabilityGrant
	for _, g := range grants {
		if _, ok := s.declared[g.GetProvider()]; !ok {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", g.GetProvider()).
				With("provider", g.GetProvider()).Next("declare it under providers in the agent's configuration")
		}
		if _, err := permission.ParseSet(g.GetPermissions()); err != nil {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the permissions for provider %s: %s", g.GetProvider(), err).
				With("provider", g.GetProvider())
		}
		i := slices.IndexFunc(out, func(o *pb.CapabilityGrant) bool { return o.GetProvider() == g.GetProvider() })
		switch {
		case i < 0:
			out = append(out, &pb.CapabilityGrant{
				Provider: g.GetProvider(), Bucket: g.GetBucket(), Permissions: slices.Clone(g.GetPermissions()),
			})
		case g.GetBucket() != "" && out[i].GetBucket() != "" && g.GetBucket() != out[i].GetBucket():
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "provider %s is granted with two buckets", g.GetProvider()).
				With("provider", g.GetProvider())
		default:
			out[i].Permissions = append(out[i].Permissions, g.GetPermissions()...)
			out[i].Bucket = max(out[i].GetBucket(), g.GetBucket())
		}
	}
	return out, nil
}

// room refuses a name in use and more instances than the node takes.
func (s *standalone) room(spec *pb.WorkloadSpec, known []*pb.Instance) error {
	busy := 0
	for _, inst := range known {
		if !occupies(inst) {
			continue
		}
		busy++
		if inst.GetName() == spec.GetName() && inst.GetDesiredRunning() {
			return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "the name %q is in use", spec.GetName()).
				With("name", spec.GetName()).With("instance", inst.GetId()).With("state", inst.GetStatus().GetState().String()).
				Next("wasmatrix instance stop %s, or choose another name with --name", spec.GetName())
		}
	}
	if want := busy + int(max(1, spec.GetReplicas())); s.capacity > 0 && want > s.capacity {
		return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "node %s takes %d instances, and this would make %d", s.node, s.capacity, want).
			With("node", s.node).Next("stop some, or raise limits.instances in the agent's configuration")
	}
	return nil
}

// occupies reports whether an instance runs or will run again.
func occupies(inst *pb.Instance) bool {
	switch inst.GetStatus().GetState() {
	case pb.InstanceState_INSTANCE_STATE_FAILED:
		return false
	case pb.InstanceState_INSTANCE_STATE_STOPPED:
		return inst.GetDesiredRunning()
	case pb.InstanceState_INSTANCE_STATE_COMPLETED:
		return inst.GetDesiredRunning() && inst.GetSpec().GetRestart().GetPolicy() == restartAlways
	default:
		return true
	}
}

// pruned removes the oldest ended instances beyond what is kept.
func (s *standalone) pruned(known []*pb.Instance) []*pb.AssignmentChange {
	ended := slices.DeleteFunc(slices.Clone(known), occupies)
	slices.SortFunc(ended, func(a, b *pb.Instance) int {
		return a.GetCreatedAt().AsTime().Compare(b.GetCreatedAt().AsTime())
	})
	var changes []*pb.AssignmentChange
	for _, inst := range ended[:max(0, len(ended)-maxEndedInstances)] {
		changes = append(changes, &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveInstance{RemoveInstance: inst.GetId()}})
		for _, g := range inst.GetSpec().GetCapabilities() {
			changes = append(changes, &pb.AssignmentChange{Change: &pb.AssignmentChange_RemoveAssignment{
				RemoveAssignment: &pb.AssignmentKey{InstanceId: inst.GetId(), ProviderId: g.GetProvider()},
			}})
		}
	}
	return changes
}

// mint returns a new instance id: the name, a dash and five random characters.
func (s *standalone) mint(name string, lists ...[]*pb.Instance) string {
	for {
		random := make([]byte, idRandomBytes)
		_, _ = rand.Read(random) // never fails
		id := name + "-" + strings.ToLower(base32.StdEncoding.EncodeToString(random))[:idLetters]
		taken := slices.ContainsFunc(lists, func(list []*pb.Instance) bool {
			return slices.ContainsFunc(list, func(inst *pb.Instance) bool { return inst.GetId() == id })
		})
		if !taken {
			return id
		}
	}
}

// named returns the instances with these ids as they are now.
func (s *standalone) named(ids []string) []*pb.Instance {
	return slices.DeleteFunc(s.instances(), func(inst *pb.Instance) bool { return !slices.Contains(ids, inst.GetId()) })
}

// stop accepts that instances are to stop.
func (s *standalone) stop(req *pb.StopInstanceRequest) (*pb.StopInstanceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	digest, ids, err := s.recall(req.GetRequestId(), req)
	if err != nil {
		return nil, err
	}
	if ids == nil {
		if ids, err = s.resolve(req.GetTarget()); err != nil {
			return nil, err
		}
		var changes []*pb.AssignmentChange
		for _, inst := range s.named(ids) {
			if inst.GetDesiredRunning() {
				off := withStatus(inst, inst.GetStatus())
				off.DesiredRunning = false
				changes = append(changes, &pb.AssignmentChange{Change: &pb.AssignmentChange_PutInstance{PutInstance: off}})
			}
		}
		if err := s.accept(changes); err != nil {
			return nil, err
		}
		s.remember(req.GetRequestId(), digest, ids)
	}
	return &pb.StopInstanceResponse{Instances: s.named(ids)}, nil
}
