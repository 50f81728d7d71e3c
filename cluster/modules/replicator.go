package modules

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// transferTimeout bounds the transfer of one module between two peers: 64 MiB at 1 MiB a second.
const transferTimeout = 64 * time.Second

// PeerRef is one peer of the cluster.
type PeerRef struct {
	// ID is the peer's id.
	ID string
	// Address is the host:port of its gRPC API; empty when it is not known.
	Address string
	// Voter is false for a peer that replicates and never votes.
	Voter bool
}

// Registry is the part of a peer that the Replicator reads.
type Registry interface {
	// View returns the state; the Replicator asks for stale reads only.
	View(ctx context.Context, read *pb.ReadOptions) (fsm.View, error)
}

// Config is what a Replicator works with. All fields but Metrics are required.
type Config struct {
	// Self is the id of the peer whose disk Store is.
	Self string
	// Store is this peer's disk.
	Store *Store
	// Registry tells which modules there are.
	Registry Registry
	// Peers returns all peers in the Raft configuration, this one included.
	Peers func(ctx context.Context) []PeerRef
	// Conn returns a shared connection to a peer's API; it stays open.
	Conn func(address string) (grpc.ClientConnInterface, error)
	// Logger takes what happens in the background.
	Logger *slog.Logger
	// Metrics takes the counters; nil means none.
	Metrics prometheus.Registerer
}

// Replicator spreads modules over the disks of the peers. It is safe for
// concurrent use.
type Replicator struct {
	cfg     Config
	metrics *metrics

	// wanted tells Run that a module was found missing or damaged.
	wanted chan struct{}
	// ended is closed at the end of Run; transfers in the background end with it.
	ended chan struct{}

	mu        sync.Mutex
	closed    bool
	transfers sync.WaitGroup
	// pulling holds one channel for each digest that is being pulled, closed at the end.
	pulling map[string]chan struct{}
}

// NewReplicator makes a Replicator. It serves Replicate and Open at once; Run
// must be called once for it to pull on its own.
func NewReplicator(cfg Config) (*Replicator, error) {
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("register module metrics: %w", err)
	}
	return &Replicator{
		cfg:     cfg,
		metrics: m,
		wanted:  make(chan struct{}, 1),
		ended:   make(chan struct{}),
		pulling: map[string]chan struct{}{},
	}, nil
}

// Admit inspects and stores an upload on this peer's disk; see Store.Admit. Its
// errors are in the API's shape, except those of body.
func (r *Replicator) Admit(body io.Reader, expected string) (*pb.Module, error) {
	m, err := r.cfg.Store.Admit(body, expected)
	return m, APIError(err)
}

// Replicate brings a module that is on this peer's disk to the others, and
// returns once a majority of the voters, this peer included, have it on disk.
// Transfers to the rest go on after that. The error is a COMMUNICATION_FAILURE
// or RESOURCE_EXHAUSTED in the API's shape that names the peers that failed, or
// that of ctx.
func (r *Replicator) Replicate(ctx context.Context, m *pb.Module) error {
	voters, have := 0, 0
	var others []PeerRef
	for _, p := range r.cfg.Peers(ctx) {
		if p.Voter {
			voters++
		}
		switch {
		case p.ID != r.cfg.Self:
			others = append(others, p)
		case p.Voter:
			have++
		}
	}
	need := voters/2 + 1
	results, err := r.pushAll(ctx, m, others)
	if err != nil {
		return err
	}
	var failed []pushResult
	for range others {
		if have >= need {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("replicate module: %w", ctx.Err())
		case res := <-results:
			switch {
			case res.err != nil:
				failed = append(failed, res)
			case res.peer.Voter:
				have++
			}
		}
	}
	if have >= need {
		return nil
	}
	return noMajority(have, need, voters, failed)
}

type pushResult struct {
	peer PeerRef
	err  error
}

// pushAll starts one transfer a peer. They outlive ctx, so that a slow peer
// need not start over when the others have answered.
func (r *Replicator) pushAll(ctx context.Context, m *pb.Module, to []PeerRef) (<-chan pushResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "this peer is shutting down").
			Next("try again with another peer")
	}
	results := make(chan pushResult, len(to))
	for _, p := range to {
		r.transfers.Go(func() {
			ctx, cancel := r.background(ctx)
			defer cancel()
			err := r.push(ctx, m, p)
			r.metrics.pushed(err)
			if err != nil {
				r.cfg.Logger.WarnContext(ctx, "module was not pushed", "module", m.GetDigest(), "peer", p.ID, "error", err)
			}
			results <- pushResult{peer: p, err: err}
		})
	}
	return results, nil
}

// background returns a context with the values of ctx that ends after the
// transfer timeout or with Run.
func (r *Replicator) background(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), transferTimeout)
	r.transfers.Go(func() {
		select {
		case <-r.ended:
			cancel()
		case <-ctx.Done():
		}
	})
	return ctx, cancel
}

func (r *Replicator) push(ctx context.Context, m *pb.Module, to PeerRef) error {
	client, err := r.client(to)
	if err != nil {
		return err
	}
	body, err := r.cfg.Store.Open(m.GetDigest())
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.StoreModule(ctx)
	if err != nil {
		return fmt.Errorf("push module to %s: %w", to.ID, err)
	}
	err = stream.Send(&pb.StoreModuleRequest{Part: &pb.StoreModuleRequest_Module{Module: m}})
	if err == nil {
		err = EachChunk(body, func(chunk []byte) error {
			return stream.Send(&pb.StoreModuleRequest{Part: &pb.StoreModuleRequest_Chunk{Chunk: chunk}})
		})
	}
	// io.EOF says that the peer has answered already, be it because it has the module.
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("push module to %s: %w", to.ID, err)
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		return fmt.Errorf("push module to %s: %w", to.ID, err)
	}
	return nil
}

func (r *Replicator) client(p PeerRef) (pb.PeerServiceClient, error) {
	if p.Address == "" {
		return nil, fmt.Errorf("reach peer %s: its API address is not known", p.ID)
	}
	conn, err := r.cfg.Conn(p.Address)
	if err != nil {
		return nil, fmt.Errorf("reach peer %s: %w", p.ID, err)
	}
	return pb.NewPeerServiceClient(conn), nil
}

// noMajority says which peers failed and how. A lack of room is named as such,
// because waiting does not mend it.
func noMajority(have, need, voters int, failed []pushResult) error {
	code, next := pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "wasmatrix cluster members"
	for _, f := range failed {
		if apierror.CodeOf(f.err) == pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED {
			code, next = pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "free disk space on the peers named"
		}
	}
	e := apierror.New(code, "module reached %d of %d voting peers, %d are needed", have, voters, need).Next("%s", next)
	for _, f := range failed {
		e = e.With("peer_"+f.peer.ID, f.err.Error())
	}
	return e
}
