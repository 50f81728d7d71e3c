package agent

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// maxSubscriptions is the most of one instance at one provider, as in a cluster.
const maxSubscriptions = 64

// subscribe records that a subscription begins or ends.
func (s *standalone) subscribe(call provider.Call, id, subject string, subscribed bool) (existed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	grants := s.grantsOf(call.Instance)
	i := slices.IndexFunc(grants, func(a *pb.CapabilityAssignment) bool { return a.GetProviderId() == id })
	if i < 0 {
		return false, apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "instance %s was not granted provider %s", call.Instance, id).
			With("instance", call.Instance).With("provider", id)
	}
	at, existed := slices.BinarySearch(grants[i].GetSubscriptions(), subject)
	if existed == subscribed {
		return existed, nil
	}
	next := &pb.CapabilityAssignment{}
	proto.Merge(next, grants[i])
	if subscribed {
		if len(next.GetSubscriptions()) >= maxSubscriptions {
			return false, apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
				"an instance has at most %d subscriptions at one provider", maxSubscriptions).
				With("instance", call.Instance).With("provider", id).Next("unsubscribe from some, or use wildcards")
		}
		next.Subscriptions = slices.Insert(next.GetSubscriptions(), at, subject)
	} else {
		next.Subscriptions = slices.Delete(next.GetSubscriptions(), at, at+1)
	}
	return existed, s.accept([]*pb.AssignmentChange{{Change: &pb.AssignmentChange_PutAssignment{PutAssignment: next}}})
}

// triggered returns the subjects that a spec's triggers subscribe its instances to
// at a provider: those that the grant covers.
func triggered(spec *pb.WorkloadSpec, g *pb.CapabilityGrant) []string {
	set, err := permission.ParseSet(g.GetPermissions())
	if err != nil {
		return nil
	}
	var out []string
	for _, t := range spec.GetTriggers() {
		subject := t.GetSubscribe()
		if subject == "" {
			continue
		}
		need := permission.Need{Capability: permission.Messaging, Action: permission.Subscribe, Resource: subject}
		if _, ok := set.Allows(need); ok {
			out = append(out, subject)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
