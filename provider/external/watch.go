package external

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// answerTimeout is how long Describe may take, a connection included.
	answerTimeout = 5 * time.Second
	// checkEvery is how often a server is asked for its health although it reports
	// each change: one that hangs reports nothing.
	checkEvery = 5 * time.Second
	// checkTimeout is how long it may take to answer that.
	checkTimeout = 2 * time.Second
	// minPause and maxPause are between two attempts to follow a server.
	minPause = 20 * time.Millisecond
	maxPause = time.Second
	// maxOperations is the most operations of a server.
	maxOperations = 256
)

// condition is what is known of a server. It is replaced as a whole.
type condition struct {
	// problem says why no calls are made; "" when they are.
	problem string
	// operations tells for each operation whether it is idempotent; nil before the
	// first answer of Describe.
	operations map[string]bool
}

func (c *condition) names() string {
	return strings.Join(slices.Sorted(maps.Keys(c.operations)), ", ")
}

// watch keeps the condition up to date until ctx ends.
func (p *service) watch(ctx context.Context) {
	pause := minPause
	for ctx.Err() == nil {
		began := time.Now()
		err := p.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if p.condition.Load().problem == "" {
			pause = minPause
		}
		p.become(status.Convert(err).Message(), nil, "")
		select {
		case <-time.After(time.Until(began.Add(pause))):
		case <-ctx.Done():
		}
		pause = min(2*pause, maxPause)
	}
}

// errGone: the connection to the server was lost.
var errGone = errors.New("the connection to its server was lost")

// become takes up a new condition. Without operations those known stay.
func (p *service) become(problem string, operations map[string]bool, version string) {
	was := p.condition.Load()
	if operations == nil {
		operations = was.operations
	}
	p.condition.Store(&condition{problem: problem, operations: operations})
	if was.problem == problem {
		return
	}
	if problem == "" {
		p.log.Info("an external provider serves", "address", p.settings.address, "version", version)
	} else {
		p.log.Warn("an external provider does not serve", "address", p.settings.address, "reason", problem)
	}
}

// follow asks a server what it offers and then follows its health, until its
// connection is lost.
func (p *service) follow(ctx context.Context) error {
	operations, version, err := p.describe(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	health := healthpb.NewHealthClient(p.conn)
	name := pb.ProviderService_ServiceDesc.ServiceName
	stream, err := health.Watch(ctx, &healthpb.HealthCheckRequest{Service: name})
	if err != nil {
		return explained("watching the health of its server", err)
	}
	type news struct {
		state healthpb.HealthCheckResponse_ServingStatus
		err   error
	}
	arrived := make(chan news)
	go func() {
		for {
			resp, err := stream.Recv()
			select {
			case arrived <- news{resp.GetStatus(), err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	gone := make(chan error, 1)
	go func() { gone <- p.awaitLoss(ctx) }()
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-gone: // a server that stops waits for what is watched
			return err
		case n := <-arrived:
			switch {
			case status.Code(n.err) == codes.Unimplemented:
				p.become("", operations, version)
				return <-gone
			case n.err != nil:
				return explained("watching the health of its server", n.err)
			case n.state == healthpb.HealthCheckResponse_SERVING:
				p.become("", operations, version)
			default:
				p.become(fmt.Sprintf("its server says that %s is %s", name, n.state), operations, version)
			}
		case <-tick.C:
			bounded, cancel := context.WithTimeout(ctx, checkTimeout)
			_, err := health.Check(bounded, &healthpb.HealthCheckRequest{Service: name})
			cancel()
			if err != nil && status.Code(err) != codes.NotFound {
				return explained("its server does not answer", err)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitLoss waits until the connection is lost, or the server wants it to end.
func (p *service) awaitLoss(ctx context.Context) error {
	for state := p.conn.GetState(); state == connectivity.Ready; state = p.conn.GetState() {
		if !p.conn.WaitForStateChange(ctx, state) {
			return ctx.Err()
		}
	}
	return errGone
}

// describe asks what the server offers, waiting for a connection.
func (p *service) describe(ctx context.Context) (operations map[string]bool, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	resp, err := p.client.Describe(ctx, &pb.ProviderServiceDescribeRequest{ProviderId: p.id}, grpc.WaitForReady(true))
	if err != nil {
		return nil, "", explained("its server cannot be asked what it offers", err)
	}
	switch n := len(resp.GetOperations()); {
	case n == 0:
		return nil, "", errors.New("its server offers no operation")
	case n > maxOperations:
		return nil, "", fmt.Errorf("its server offers %d operations; at most %d are allowed", n, maxOperations)
	}
	operations = make(map[string]bool, len(resp.GetOperations()))
	for _, o := range resp.GetOperations() {
		if !validOperation(o.GetName()) {
			return nil, "", fmt.Errorf("its server offers operation %q; a name is 1 to %d letters, digits and any of _ . / -", abridged(o.GetName()), MaxOperation)
		}
		operations[o.GetName()] = o.GetIdempotent()
	}
	return operations, resp.GetVersion(), nil
}

// explained is a failure for people that keeps its gRPC code.
func explained(what string, err error) error {
	st := status.Convert(err)
	return status.Errorf(st.Code(), "%s: %s", what, st.Message())
}
