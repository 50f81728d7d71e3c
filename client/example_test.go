package client_test

import (
	"context"
	"fmt"
	"log"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// A program that runs where `wasmatrix dev` runs finds the cluster by itself.
func ExampleOpen() {
	c, err := client.Open("")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = c.Close() }()

	ctx := context.Background()
	module, err := c.UploadModuleFile(ctx, "hello.wasm")
	if err != nil {
		log.Fatal(err)
	}
	started, err := c.StartInstance(ctx, &pb.StartInstanceRequest{Spec: &pb.WorkloadSpec{
		Name: "hello", Module: module.GetDigest(), Replicas: 2,
	}})
	if err != nil {
		log.Fatal(err)
	}
	for _, i := range started.GetInstances() {
		fmt.Println(i.GetId())
	}
}

// Events are followed for as long as the loop runs, whatever peers come and go.
func ExampleClient_WatchEvents() {
	c, err := client.Open("")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = c.Close() }()

	for e, err := range c.WatchEvents(context.Background(), &pb.WatchEventsRequest{Follow: true, Subject: "hello"}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.GetEvent().GetKind(), e.GetEvent().GetInstanceId())
		if e.GetEvent().GetKind() == pb.EventKind_EVENT_KIND_INSTANCE_STARTED {
			break
		}
	}
}
