package control

import (
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/guestabi"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// triggerTargets checks the triggers of a workload and returns at which provider
// each subscribe trigger is to be subscribed: the one granted messaging provider
// whose permissions cover its subject. A provider or module that does not exist is
// left to the state to refuse.
func triggerTargets(view fsm.View, spec *pb.WorkloadSpec) ([]*pb.TriggerTarget, error) {
	if len(spec.GetTriggers()) == 0 {
		return nil, nil
	}
	granted, complete, err := messagingGrants(view, spec.GetCapabilities())
	if err != nil {
		return nil, err
	}
	var out []*pb.TriggerTarget
	for _, trigger := range spec.GetTriggers() {
		way, ok := trigger.GetTrigger().(*pb.Trigger_Subscribe)
		if !ok {
			return nil, errHTTPTrigger()
		}
		if err := checkSubject(way.Subscribe); err != nil {
			return nil, err
		}
		if !complete {
			continue
		}
		id, err := providerFor(way.Subscribe, granted)
		if err != nil {
			return nil, err
		}
		out = append(out, &pb.TriggerTarget{Subject: way.Subscribe, ProviderId: id})
	}
	m, err := moduleOf(view, spec.GetModule())
	if m == nil || err != nil {
		return out, err
	}
	return out, checkHandlesMessages(m)
}

// errHTTPTrigger refuses HTTP triggers: nothing delivers requests, and an instance
// that waits for them in vain is worse than an error.
func errHTTPTrigger() error {
	return invalid("a trigger of kind http was asked for, and no node takes HTTP requests for instances").
		With("trigger", "http").
		Next("leave triggers out and call the instance: wasmatrix invoke NAME; messages need a trigger of kind subscribe")
}

// messagingGrant is what a workload may do with one messaging provider.
type messagingGrant struct {
	provider string
	allowed  permission.Set
}

// messagingGrants returns the messaging providers among the grants in the order of
// the spec, each once. complete is false when a provider does not exist.
func messagingGrants(view fsm.View, grants []*pb.CapabilityGrant) (out []messagingGrant, complete bool, err error) {
	texts := map[string][]string{}
	var order []string
	for _, g := range grants {
		p, ok := view.Provider(g.GetProvider())
		if !ok {
			return nil, false, nil
		}
		if capabilityOf[p.GetSpec().GetType()] != permission.Messaging {
			continue
		}
		if !slices.Contains(order, p.GetId()) {
			order = append(order, p.GetId())
		}
		texts[p.GetId()] = append(texts[p.GetId()], g.GetPermissions()...)
	}
	for _, id := range order {
		set, err := permission.ParseSet(texts[id])
		if err != nil {
			return nil, false, invalid("%s", strings.ReplaceAll(err.Error(), "\n", "; ")).With("provider", id)
		}
		out = append(out, messagingGrant{id, set})
	}
	return out, true, nil
}

// providerFor returns the one provider whose permissions cover a subject.
func providerFor(subject string, granted []messagingGrant) (string, error) {
	need := permission.Need{Capability: permission.Messaging, Action: permission.Subscribe, Resource: subject}
	allow := "msg:subscribe:" + subject
	var fit, names []string
	for _, g := range granted {
		names = append(names, g.provider)
		if _, ok := g.allowed.Allows(need); ok {
			fit = append(fit, g.provider)
		}
	}
	switch {
	case len(fit) == 1:
		return fit[0], nil
	case len(fit) > 1:
		return "", invalid("the trigger on subject %s could be subscribed at %d providers, and one is needed", subject, len(fit)).
			With("subject", subject).With("providers", strings.Join(fit, ", ")).
			Next("grant %s with one of them only", allow)
	case len(granted) == 0:
		return "", apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
			"the trigger on subject %s needs a messaging provider and none was granted", subject).
			With("subject", subject).
			Next("add --allow %s", allow)
	default:
		return "", apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
			"the trigger on subject %s is covered by no granted permission", subject).
			With("subject", subject).With("providers", strings.Join(names, ", ")).
			Next("add --allow %s", allow)
	}
}

// checkHandlesMessages refuses a module that no message could be delivered to.
func checkHandlesMessages(m *pb.Module) error {
	if m.GetKind() == pb.ModuleKind_MODULE_KIND_COMMAND {
		return invalid("%s is a command, which runs once and takes no messages", moduleName(m)).
			With("module", m.GetDigest()).
			Next("build a reactor that exports %s, or leave the trigger out", guestabi.OnMessage)
	}
	if !slices.Contains(m.GetExports(), guestabi.OnMessage) {
		return invalid("%s does not export %s, which a subscribe trigger calls", moduleName(m), guestabi.OnMessage).
			With("module", m.GetDigest()).
			Next("register a message handler in the guest, or leave the trigger out")
	}
	return nil
}
