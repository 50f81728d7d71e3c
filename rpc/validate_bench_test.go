package rpc

import (
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The first message of a type compiles its rules; all later ones only run them.
func BenchmarkValidate(b *testing.B) {
	start := time.Now()
	validator, err := protovalidate.New()
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("new: %v", time.Since(start))
	s := &server{validator: validator}
	for name, msg := range map[string]proto.Message{
		"stop":  &pb.StopInstanceRequest{Target: "hello", RequestId: "x"},
		"chunk": &pb.UploadModuleRequest{Part: &pb.UploadModuleRequest_Chunk{Chunk: make([]byte, 1<<20)}},
		"start": &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
			Name: "hello", Module: "sha256:00", Capabilities: []*pb.CapabilityGrant{{Provider: "kv", Permissions: []string{"kv:read", "kv:write"}}},
			Limits: &pb.InstanceLimits{Memory: "32MiB"}, Env: map[string]string{"A": "b"},
		}},
	} {
		start := time.Now()
		if err := s.validate(msg); err != nil {
			b.Fatal(err)
		}
		b.Logf("%s, first: %v", name, time.Since(start))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := s.validate(msg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
