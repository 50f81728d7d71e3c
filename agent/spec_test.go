package agent

import (
	"io"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestRuntimeSpec(t *testing.T) {
	for _, c := range []struct {
		name        string
		limits      *pb.InstanceLimits
		command     bool
		memory      uint64
		timeout     time.Duration
		concurrency int
	}{
		{"a reactor's defaults", nil, false, 64 << 20, 30 * time.Second, 1},
		{"a command has no time limit by default", nil, true, 64 << 20, 0, 1},
		{
			"what is set holds",
			&pb.InstanceLimits{Memory: "32MiB", Timeout: durationpb.New(2 * time.Second), Concurrency: 4},
			true, 32 << 20, 2 * time.Second, 4,
		},
		{"the most memory", &pb.InstanceLimits{Memory: "4GiB"}, false, 4 << 30, 30 * time.Second, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			inst := &pb.Instance{
				Id: "web-abcde", Name: "web", Placement: &pb.Placement{Generation: 7},
				Spec: &pb.WorkloadSpec{
					Module: "sha256:x", Limits: c.limits, Args: []string{"a"}, Env: map[string]string{"K": "V"}, Stdin: []byte("in"),
				},
			}
			got, err := runtimeSpec(inst, moduleFile{path: "/m", command: c.command}, io.Discard, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if got.MemoryBytes != c.memory || got.Timeout != c.timeout || got.Concurrency != c.concurrency {
				t.Fatalf("limits: %+v", got)
			}
			if got.InstanceID != "web-abcde" || got.Name != "web" || got.Generation != 7 || got.Digest != "sha256:x" ||
				got.ModulePath != "/m" || got.Args[0] != "a" || got.Env["K"] != "V" || string(got.Stdin) != "in" {
				t.Fatalf("spec: %+v", got)
			}
		})
	}
}

func TestRuntimeSpecRefusesLimitsThatCannotHold(t *testing.T) {
	for _, memory := range []string{"5GiB", "1MB", "-1", "0"} {
		inst := &pb.Instance{Spec: &pb.WorkloadSpec{Limits: &pb.InstanceLimits{Memory: memory}}}
		if _, err := runtimeSpec(inst, moduleFile{}, io.Discard, io.Discard); err == nil {
			t.Errorf("limits.memory %q was taken", memory)
		}
	}
}
