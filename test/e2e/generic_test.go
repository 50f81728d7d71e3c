package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// generic is a client that knows nothing of wasmatrix but its address and a
// certificate: what it calls it learns by reflection, and it speaks JSON.
type generic struct {
	t     *testing.T
	conn  *grpc.ClientConn
	files *protoregistry.Files
}

func TestGenericClient(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3})
	ctx := c.Context(time.Minute)
	g := newGeneric(ctx, t, c.Nodes()[1].Config.APIAddress(), filepath.Join(filepath.Dir(c.ContextPath), "user"))

	health, err := healthpb.NewHealthClient(g.conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || health.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v %v", health, err)
	}
	module, err := c.Client.UploadModuleFile(ctx, filepath.Join(c.Guests, "hello.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	started := g.must(ctx, "StartInstance", fmt.Sprintf(`{"spec": {"name": "hello", "module": %q,
		"capabilities": [{"provider": "kv", "permissions": ["kv:read", "kv:write"]}]}}`, module.Digest))
	if n := started.Get(field(started, "instances")).List().Len(); n != 1 {
		t.Fatalf("StartInstance made %d instances: %v", n, started)
	}
	g.watchUntil(ctx, `{"follow": true, "kinds": ["EVENT_KIND_INSTANCE_STARTED"]}`)
	invoked := g.must(ctx, "Invoke", `{"target": "hello", "payload": "QWRh"}`)
	if got := string(invoked.Get(field(invoked, "payload")).Bytes()); got != "hello, Ada: visit 1\n" {
		t.Fatalf("Invoke: %q", got)
	}
	g.must(ctx, "ListInstances", `{"name": "hello"}`)
	g.must(ctx, "StopInstance", `{"target": "hello"}`)
	g.watchUntil(ctx, `{"follow": true, "kinds": ["EVENT_KIND_INSTANCE_STOPPED"]}`)

	_, err = g.call(ctx, "QueryInstance", `{"target": "nobody"}`)
	details := status.Convert(err).Proto().GetDetails()
	if len(details) != 1 {
		t.Fatalf("QueryInstance of nobody: %v has %d details, want 1", err, len(details))
	}
	failure := g.message("wasmatrix.v1.Error")
	if err := proto.Unmarshal(details[0].Value, failure); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"code": "2", "correlation_id": "", "message": "", "timestamp": ""} {
		got := failure.Get(field(failure, name))
		if !failure.Has(field(failure, name)) || want != "" && got.String() != want {
			t.Errorf("error detail %s = %v, want %q", name, got, want)
		}
	}
	if _, err = g.call(ctx, "StartInstance", `{"spec": {"name": "No Such Name", "module": "x"}}`); status.Code(err).String() != "InvalidArgument" {
		t.Errorf("StartInstance with a bad name: %v, want InvalidArgument", err)
	}
}

func newGeneric(ctx context.Context, t *testing.T, address, tlsDir string) *generic {
	t.Helper()
	id, err := identity.Load(tlsDir)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(address, id.DialOption(identity.Subject.IsPeer))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	g := &generic{t: t, conn: conn}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	seen := map[string]bool{}
	for _, symbol := range []string{"wasmatrix.v1.ControlPlaneService", "wasmatrix.v1.Error"} {
		g.describe(stream, &reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: symbol},
		}, set, seen)
	}
	if g.files, err = protodesc.NewFiles(set); err != nil {
		t.Fatal(err)
	}
	return g
}

// describe collects the files of one answer and what they import.
func (g *generic) describe(stream reflectionpb.ServerReflection_ServerReflectionInfoClient, req *reflectionpb.ServerReflectionRequest, set *descriptorpb.FileDescriptorSet, seen map[string]bool) {
	g.t.Helper()
	if err := stream.Send(req); err != nil {
		g.t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		g.t.Fatal(err)
	}
	for _, raw := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		file := &descriptorpb.FileDescriptorProto{}
		if err := proto.Unmarshal(raw, file); err != nil {
			g.t.Fatal(err)
		}
		if seen[file.GetName()] {
			continue
		}
		seen[file.GetName()] = true
		set.File = append(set.File, file)
		for _, dep := range file.Dependency {
			if !seen[dep] {
				g.describe(stream, &reflectionpb.ServerReflectionRequest{
					MessageRequest: &reflectionpb.ServerReflectionRequest_FileByFilename{FileByFilename: dep},
				}, set, seen)
			}
		}
	}
}

func (g *generic) message(name protoreflect.FullName) *dynamicpb.Message {
	g.t.Helper()
	d, err := g.files.FindDescriptorByName(name)
	if err != nil {
		g.t.Fatal(err)
	}
	md, ok := d.(protoreflect.MessageDescriptor)
	if !ok {
		g.t.Fatalf("%s is no message", name)
	}
	return dynamicpb.NewMessage(md)
}

func (g *generic) method(name string) protoreflect.MethodDescriptor {
	g.t.Helper()
	d, err := g.files.FindDescriptorByName("wasmatrix.v1.ControlPlaneService")
	if err != nil {
		g.t.Fatal(err)
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		g.t.Fatalf("%s is no service", d.FullName())
	}
	return sd.Methods().ByName(protoreflect.Name(name))
}

func (g *generic) call(ctx context.Context, name, request string) (*dynamicpb.Message, error) {
	g.t.Helper()
	m := g.method(name)
	in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if err := protojson.Unmarshal([]byte(request), in); err != nil {
		g.t.Fatal(err)
	}
	return out, g.conn.Invoke(ctx, "/wasmatrix.v1.ControlPlaneService/"+name, in, out)
}

func (g *generic) must(ctx context.Context, name, request string) *dynamicpb.Message {
	g.t.Helper()
	out, err := g.call(ctx, name, request)
	if err != nil {
		g.t.Fatalf("%s: %v", name, err)
	}
	return out
}

// watchUntil waits for the first event of a stream.
func (g *generic) watchUntil(ctx context.Context, request string) {
	g.t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m := g.method("WatchEvents")
	in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if err := protojson.Unmarshal([]byte(request), in); err != nil {
		g.t.Fatal(err)
	}
	stream, err := g.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/wasmatrix.v1.ControlPlaneService/WatchEvents")
	if err == nil {
		err = stream.SendMsg(in)
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err == nil {
		err = stream.RecvMsg(out)
	}
	if err != nil {
		g.t.Fatalf("WatchEvents %s: %v", request, err)
	}
}

func field(m *dynamicpb.Message, name string) protoreflect.FieldDescriptor {
	return m.Descriptor().Fields().ByName(protoreflect.Name(name))
}
