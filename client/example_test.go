package client_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Open("") finds the cluster that `wasmatrix dev` started, or the one that
// WASMATRIX_CONTEXT names.
func ExampleOpen() {
	contextPath, stop := exampleCluster()
	defer stop()

	c, err := client.Open(contextPath)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = c.Close() }()

	ctx := context.Background()
	wasm := strings.NewReader("\x00asm\x01\x00\x00\x00")
	module, err := c.UploadModule(ctx, "hello.wasm", wasm, wasm.Size())
	if err != nil {
		fmt.Println(err)
		return
	}
	started, err := c.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "hello", Module: module.GetDigest(),
	}})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(module.GetName(), "runs as", started.GetInstances()[0].GetId())
	// Output: hello.wasm runs as hello-k3f9x
}

// Events are followed for as long as the loop runs, whatever peers come and go.
func ExampleClient_WatchEvents() {
	contextPath, stop := exampleCluster()
	defer stop()

	c, err := client.Open(contextPath)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = c.Close() }()

	for e, err := range c.WatchEvents(context.Background(), &pb.WatchEventsRequest{Follow: true, Subject: "hello"}) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(e.GetEvent().GetKind())
		if e.GetEvent().GetKind() == pb.EventKind_EVENT_KIND_INSTANCE_STARTED {
			break
		}
	}
	// Output:
	// EVENT_KIND_INSTANCE_PLACED
	// EVENT_KIND_INSTANCE_STARTED
}

// exampleCluster starts a cluster of one fake peer and writes a context for it.
func exampleCluster() (contextPath string, stop func()) {
	dir, err := os.MkdirTemp("", "example")
	check(err)
	ca, err := identity.NewCA("dev")
	check(err)
	node, err := ca.Issue(identity.Subject{Kind: identity.Node, Name: "n1", Role: identity.RoleServer}, time.Hour)
	check(err)
	id, err := identity.FromBundle(node)
	check(err)
	p, stopPeer, err := startPeer(id)
	check(err)
	p.events = []*pb.Event{
		{Sequence: 1, Kind: pb.EventKind_EVENT_KIND_INSTANCE_PLACED}, {Sequence: 2, Kind: pb.EventKind_EVENT_KIND_INSTANCE_STARTED},
	}
	user, err := ca.Issue(identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}, time.Hour)
	check(err)
	check(user.Save(filepath.Join(dir, "tls")))
	contextPath = filepath.Join(dir, "dev.yaml")
	check(client.SaveContext(contextPath, client.Context{Name: "dev", Cluster: "dev", Addresses: []string{p.address}, TLSDir: "tls"}))
	return contextPath, func() {
		stopPeer()
		check(os.RemoveAll(dir))
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
