// Command provider-go is a provider written in Go: a small inventory with two
// operations, stock and reserve, whose inputs and outputs are JSON.
//
//	go run ./examples/provider-go --listen 127.0.0.1:9000
//	wasmatrix provider register inventory --type external --set address=127.0.0.1:9000
//
// It shows the three things that a provider needs beside its operations: health, a
// drain that loses no call, and fencing of instances that were replaced.
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:9000", "address to listen at: host:port or unix:/path")
	delay := flag.Duration("delay", 0, "how long an operation takes, to try out drains")
	grace := flag.Duration("grace", 10*time.Second, "how long calls in flight may take once SIGTERM came")
	flag.Parse()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	if err := run(stop, *listen, *delay, *grace); err != nil {
		fmt.Fprintln(os.Stderr, "provider-go:", err)
		os.Exit(1)
	}
}

// run serves until it is told to stop, then finishes what is under way.
func run(stop <-chan os.Signal, address string, delay, grace time.Duration) error {
	network, target := "tcp", address
	if path, unix := strings.CutPrefix(address, "unix:"); unix {
		network, target = "unix", path
	}
	listener, err := net.Listen(network, target)
	if err != nil {
		return err
	}
	server, state := grpc.NewServer(), health.NewServer()
	pb.RegisterProviderServiceServer(server, newInventory(delay))
	healthpb.RegisterHealthServer(server, state)
	state.SetServingStatus(pb.ProviderService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)

	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Fprintln(os.Stdout, "listening at", listener.Addr())
	select {
	case err := <-served:
		return err
	case <-stop:
	}
	drain(server, state, grace)
	return <-served
}

// drain stops without losing a call: first no new ones come, then those under way
// finish. Only what is left after the grace is cut off.
func drain(server *grpc.Server, state *health.Server, grace time.Duration) {
	state.Shutdown()                   // NOT_SERVING: wasmatrix makes no new calls
	time.Sleep(200 * time.Millisecond) // until every node has heard that
	timer := time.AfterFunc(grace, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
}
