package external

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

const (
	// openPatience is how long Open waits for a server that is there to answer.
	openPatience = time.Second
	// envelope is what a message may have beside its payload.
	envelope = 64 << 10
)

// delays are the pauses before a call is made again.
var delays = [...]time.Duration{20 * time.Millisecond, 100 * time.Millisecond}

// service is one provider: the connection to its server.
type service struct {
	id        string
	settings  settings
	log       *slog.Logger
	conn      *grpc.ClientConn
	client    pb.ProviderServiceClient
	condition atomic.Pointer[condition]
	stop      context.CancelFunc
	watched   chan struct{} // closed when the watch has ended

	mu     sync.Mutex
	fence  provider.Fence
	closed bool
	calls  sync.WaitGroup // Add only under mu while not closed
}

func open(ctx context.Context, id string, s settings, log *slog.Logger) (*service, error) {
	conn, err := grpc.NewClient(s.address,
		grpc.WithTransportCredentials(s.credentials), grpc.WithNoProxy(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxPayload+envelope), grpc.MaxCallSendMsgSize(MaxPayload+envelope)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, provider.Errorf(provider.ErrInvalid, "setting address of external driver grpc is %q: %s", s.address, err).Because(err)
	}
	life, stop := context.WithCancel(context.Background()) //nolint:forbidigo // ends with Close, not with the call that opened it
	p := &service{
		id: id, settings: s, log: log, conn: conn, client: pb.NewProviderServiceClient(conn), stop: stop, watched: make(chan struct{}),
	}
	p.condition.Store(&condition{problem: "its server at " + s.address + " has not answered yet"})
	go func() {
		defer close(p.watched)
		p.watch(life)
	}()
	p.await(ctx)
	return p, nil
}

// await waits a moment until calls can be made.
func (p *service) await(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, openPatience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for p.condition.Load().problem != "" {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Close waits for calls under way and closes the connection.
func (p *service) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.calls.Wait()
	p.stop()
	err := p.conn.Close()
	<-p.watched
	if err != nil && status.Code(err) != codes.Canceled {
		return fmt.Errorf("close the connection to %s: %w", p.settings.address, err)
	}
	return nil
}

// Invoke makes one call of the server.
func (p *service) Invoke(ctx context.Context, call provider.Call) ([]byte, error) {
	r, err := decode(call.Operation, call.Payload)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return nil, err
	}
	state := p.condition.Load()
	idempotent, offered := state.operations[r.operation]
	switch {
	case state.problem != "":
		return nil, p.unavailable(state.problem)
	case !offered:
		return nil, provider.Errorf(provider.ErrInvalid, "provider %s has no operation %s; it offers %s", p.id, r.operation, state.names()).
			With("provider", p.id).With("operation", r.operation).With("operations", state.names())
	}
	if err := p.admit(&call); err != nil {
		return nil, err
	}
	defer p.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, p.settings.timeout)
	defer cancel()
	if left, limited := call.Left(); limited {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, left)
		defer stop()
	}
	if id := correlation.ID(ctx); id != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, correlation.Header, id)
	}
	answer, err := p.send(ctx, &pb.ProviderServiceInvokeRequest{
		ProviderId: p.id, Operation: r.operation, Payload: r.payload,
		InstanceId: call.Instance, Caller: call.Name, Generation: call.Generation, CreatedIndex: call.Created,
	}, idempotent)
	if err != nil {
		return nil, err
	}
	out, err := proto.Marshal(&pb.ProviderCallResponse{Payload: answer})
	if err != nil {
		return nil, provider.Errorf(provider.ErrInternal, "encode the answer of provider %s: %s", p.id, err).Because(err)
	}
	return out, nil
}

// admit lets a call go out, as the last thing before it is sent, and counts it.
func (p *service) admit(call *provider.Call) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return p.unavailable("it was stopped")
	}
	if err := call.Admit(); err != nil {
		return err
	}
	if call.Instance != "" {
		if newest := p.fence.Seen(call.Instance); call.Mark().Before(newest) {
			return provider.Superseded(call.Instance, call.Mark(), newest)
		}
		p.fence.Raise(call.Instance, call.Mark())
	}
	p.calls.Add(1)
	return nil
}

// send makes a call, and makes it again where that is safe: it never reached the
// server, or may be carried out twice.
func (p *service) send(ctx context.Context, req *pb.ProviderServiceInvokeRequest, idempotent bool) ([]byte, error) {
	sent := false
	for attempt := 0; ; attempt++ {
		var server peer.Peer // is set once the call has a connection to go out on
		resp, err := p.client.Invoke(ctx, req, grpc.Peer(&server))
		if err == nil {
			if len(resp.GetPayload()) > MaxPayload {
				return nil, p.tooLong()
			}
			return resp.GetPayload(), nil
		}
		sent = sent || server.Addr != nil
		again := status.Code(err) == codes.Unavailable && !answered(err) && (!sent || idempotent) && attempt < len(delays)
		if !again || !pause.For(ctx, delays[attempt]) {
			return nil, p.failed(ctx, err, sent)
		}
	}
}

func (p *service) unavailable(why string) error {
	return provider.Errorf(provider.ErrUnavailable, "provider %s does not take calls: %s", p.id, why).
		With("provider", p.id).With("address", p.settings.address).NextStep("wasmatrix provider get %s", p.id)
}
