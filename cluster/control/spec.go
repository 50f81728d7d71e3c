package control

import (
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/quantity"
)

const (
	// maxSpec bounds one spec in the Raft log, in bytes; standard input alone may have 1 MiB.
	maxSpec = 2 << 20
	// maxCreated bounds what one request adds to a snapshot, where each replica
	// has a spec of its own, in bytes.
	maxCreated = 64 << 20

	minMemory = 64 << 10
	maxMemory = 4 << 30

	// maxLabel bounds keys and values of labels in bytes; a node has no longer ones.
	maxLabel = 63

	defaultBackoff    = time.Second
	defaultMaxBackoff = 30 * time.Second
)

// checkSpec checks the meaning of a workload's spec but for its triggers; its form
// has been checked. A module or provider that does not exist is left to the state
// to refuse.
func checkSpec(view fsm.View, spec *pb.WorkloadSpec) error {
	if err := checkSize(spec); err != nil {
		return err
	}
	if _, taken := view.Instance(spec.GetName()); taken {
		return invalid("the name %s is the id of an instance", spec.GetName()).Next("choose another name with --name")
	}
	if err := checkLimits(spec); err != nil {
		return err
	}
	if err := checkPlacement(spec.GetPlacement()); err != nil {
		return err
	}
	if err := checkGuestInput(spec); err != nil {
		return err
	}
	complete := true
	var granted []permission.Set
	for _, grant := range spec.GetCapabilities() {
		set, err := checkGrant(view, grant)
		if err != nil {
			return err
		}
		if set == nil {
			complete = false
			continue
		}
		granted = append(granted, *set)
	}
	m, err := moduleOf(view, spec.GetModule())
	if m == nil || err != nil {
		return err
	}
	if !complete {
		return nil
	}
	return checkImports(m, granted)
}

// moduleOf returns the module's record, nil when it does not exist.
func moduleOf(view fsm.View, digest string) (*pb.Module, error) {
	if !strings.HasPrefix(digest, "sha256:") {
		return nil, invalid("module %q is not a digest", digest).
			With("module", digest).
			Next("upload it first, wasmatrix module push FILE.wasm, and name the digest that tells")
	}
	m, _ := view.Module(digest)
	return m, nil
}

func checkSize(spec *pb.WorkloadSpec) error {
	size := proto.Size(spec)
	if size > maxSpec {
		return invalid("the spec has %d bytes, at most %d are allowed", size, maxSpec).
			Next("keep data behind a provider instead of in args, env or stdin")
	}
	if replicas := max(1, int(spec.GetReplicas())); size*replicas > maxCreated {
		return invalid("%d replicas of a spec of %d bytes are more than %d bytes", replicas, size, maxCreated).
			Next("ask for fewer replicas, or keep data behind a provider instead of in args, env or stdin")
	}
	return nil
}

func checkLimits(spec *pb.WorkloadSpec) error {
	if text := spec.GetLimits().GetMemory(); text != "" {
		memory, err := quantity.ParseBytes(text)
		if err != nil {
			return invalid("limits.memory: %s", err).Next("write it as 32MiB")
		}
		if memory < minMemory || memory > maxMemory {
			return invalid("limits.memory is %s, and 64KiB to 4GiB are allowed", text).
				With("limits.memory", text)
		}
	}
	restart := spec.GetRestart()
	backoff, longest := defaultBackoff, defaultMaxBackoff
	if restart.GetBackoff() != nil {
		backoff = restart.GetBackoff().AsDuration()
	}
	if restart.GetMaxBackoff() != nil {
		longest = restart.GetMaxBackoff().AsDuration()
	}
	if backoff > longest {
		return invalid("restart.backoff is %s, longer than restart.max_backoff of %s", backoff, longest).
			With("restart.backoff", backoff.String()).With("restart.max_backoff", longest.String()).
			Next("raise restart.max_backoff")
	}
	return nil
}

// checkPlacement refuses labels that no node can have.
func checkPlacement(rules *pb.PlacementRules) error {
	for key, value := range rules.GetLabels() {
		if key == "" || len(key) > maxLabel || len(value) > maxLabel {
			return invalid("placement label %q=%q: a key has 1 to %d bytes, a value at most %d", key, value, maxLabel, maxLabel).
				Next("wasmatrix node list shows the labels there are")
		}
	}
	return nil
}

// checkGuestInput refuses arguments and variables that WASI cannot pass on.
func checkGuestInput(spec *pb.WorkloadSpec) error {
	for key, value := range spec.GetEnv() {
		if strings.ContainsAny(key, "=\x00") || strings.Contains(value, "\x00") {
			return invalid("environment variable %q holds a character that cannot be passed on", key)
		}
	}
	for i, arg := range spec.GetArgs() {
		if strings.Contains(arg, "\x00") {
			return invalid("argument %d holds a zero byte, which cannot be passed on", i+1)
		}
	}
	return nil
}
