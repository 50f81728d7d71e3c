package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// fakePeer is a control-plane peer that does what a test tells it.
type fakePeer struct {
	pb.UnimplementedAgentSessionServiceServer
	pb.UnimplementedControlPlaneServiceServer

	address  string
	server   *grpc.Server
	listener *bufconn.Listener

	mu         sync.Mutex
	cut        chan struct{} // closed while the peer cannot be reached
	follows    string        // not leading: the leader's address
	strict     bool          // a dead epoch is refused instead of replaced
	parts      int           // how many messages a full set takes; 0 for one
	delay      time.Duration // before RegisterNode answers
	mute       bool          // ReportStatus does not answer
	epoch      uint64        // of the node's live lease; 0 for none
	nextEpoch  uint64        // the last epoch given
	set        *assignments  // what is assigned
	streams    map[chan *pb.WatchAssignmentsResponse]struct{}
	calls      map[string]int // by method
	instances  map[string][]*pb.InstanceStatus
	providers  map[string][]*pb.ProviderStatus
	batches    []*pb.ReportStatusRequest
	modules    map[string][]byte
	registered *pb.RegisterNodeRequest
}

func (n *network) peer(address string) *fakePeer {
	p := &fakePeer{
		address: address, server: grpc.NewServer(), listener: bufconn.Listen(1 << 20),
		cut: make(chan struct{}), set: newAssignments(), streams: map[chan *pb.WatchAssignmentsResponse]struct{}{},
		calls: map[string]int{}, instances: map[string][]*pb.InstanceStatus{},
		providers: map[string][]*pb.ProviderStatus{}, modules: map[string][]byte{},
	}
	p.set.sequence = 100
	pb.RegisterAgentSessionServiceServer(p.server, p)
	pb.RegisterControlPlaneServiceServer(p.server, p)
	go func() { _ = p.server.Serve(p.listener) }()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.peers[address] = p
	return p
}

// enter counts a call and refuses it while the peer is cut off.
func (p *fakePeer) enter(method string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls[method]++
	select {
	case <-p.cut:
		return status.Error(codes.Unavailable, "cut off")
	default:
		return nil
	}
}

func (p *fakePeer) count(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[method]
}

// isolate cuts the peer off, ending all streams; expire also ends the lease.
func (p *fakePeer) isolate(expire bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.cut)
	if expire {
		p.epoch = 0
	}
}

func (p *fakePeer) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = make(chan struct{})
}

func (p *fakePeer) leading() error {
	if p.follows != "" {
		return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "not leading").With(leaderAddressKey, p.follows)
	}
	return nil
}

func (p *fakePeer) RegisterNode(_ context.Context, req *pb.RegisterNodeRequest) (*pb.RegisterNodeResponse, error) {
	if err := p.enter("RegisterNode"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	delay := p.delay
	p.mu.Unlock()
	<-time.After(delay)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.leading(); err != nil {
		return nil, err
	}
	p.registered = req
	if p.strict && req.GetEpoch() != 0 && req.GetEpoch() != p.epoch {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "epoch %d is not alive", req.GetEpoch())
	}
	if req.GetEpoch() == 0 || req.GetEpoch() != p.epoch {
		p.nextEpoch++
		p.epoch = p.nextEpoch
	}
	return &pb.RegisterNodeResponse{Epoch: p.epoch, LeaseTtl: durationpb.New(testTTL)}, nil
}

func (p *fakePeer) alive(epoch uint64) error {
	if epoch != p.epoch {
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "epoch %d is not alive", epoch)
	}
	return p.leading()
}

func (p *fakePeer) Heartbeat(_ context.Context, req *pb.HeartbeatRequest) (*pb.HeartbeatResponse, error) {
	if err := p.enter("Heartbeat"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.alive(req.GetEpoch()); err != nil {
		return nil, err
	}
	return &pb.HeartbeatResponse{LeaseTtl: durationpb.New(testTTL)}, nil
}

func (p *fakePeer) WatchAssignments(req *pb.WatchAssignmentsRequest, stream grpc.ServerStreamingServer[pb.WatchAssignmentsResponse]) error {
	if err := p.enter("WatchAssignments"); err != nil {
		return err
	}
	news := make(chan *pb.WatchAssignmentsResponse, 16)
	p.mu.Lock()
	err := p.alive(req.GetEpoch())
	full, cut := p.set.full(func(string) *pb.InstanceStatus { return nil }), p.cut
	p.streams[news] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.streams, news)
	}()
	if err != nil {
		return err
	}
	for msg := full; ; {
		for _, part := range split(msg, p.parts) {
			if err := stream.Send(part); err != nil {
				return err
			}
		}
		select {
		case msg = <-news:
		case <-cut:
			return status.Error(codes.Unavailable, "cut off")
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// split gives a full set in n messages, as a leader does with a large one.
func split(msg *pb.WatchAssignmentsResponse, n int) []*pb.WatchAssignmentsResponse {
	if !msg.GetComplete() || n < 2 {
		return []*pb.WatchAssignmentsResponse{msg}
	}
	var out []*pb.WatchAssignmentsResponse
	first := msg.GetResultsIn() - uint64(n)
	for i := range n {
		a, b := i*len(msg.GetChanges())/n, (i+1)*len(msg.GetChanges())/n
		out = append(out, &pb.WatchAssignmentsResponse{
			Complete: true, More: i < n-1, Changes: msg.GetChanges()[a:b],
			AppliesTo: first + uint64(i), ResultsIn: first + uint64(i) + 1,
		})
	}
	return out
}

func (p *fakePeer) ReportStatus(ctx context.Context, req *pb.ReportStatusRequest) (*pb.ReportStatusResponse, error) {
	if err := p.enter("ReportStatus"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	if p.mute {
		p.mu.Unlock()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	defer p.mu.Unlock()
	if err := p.alive(req.GetEpoch()); err != nil {
		return nil, err
	}
	p.batches = append(p.batches, req)
	for _, r := range req.GetInstances() {
		p.instances[r.GetInstanceId()] = append(p.instances[r.GetInstanceId()], r.GetStatus())
	}
	for _, r := range req.GetProviders() {
		p.providers[r.GetProviderId()] = append(p.providers[r.GetProviderId()], r.GetStatus())
	}
	return &pb.ReportStatusResponse{}, nil
}

func (p *fakePeer) FetchModule(req *pb.FetchModuleRequest, stream grpc.ServerStreamingServer[pb.FetchModuleResponse]) error {
	if err := p.enter("FetchModule"); err != nil {
		return err
	}
	p.mu.Lock()
	data, ok := p.modules[req.GetDigest()]
	p.mu.Unlock()
	if !ok {
		return apierror.New(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "no module %s", req.GetDigest())
	}
	for part := range slices.Chunk(data, 64) {
		if err := stream.Send(&pb.FetchModuleResponse{Chunk: part}); err != nil {
			return err
		}
	}
	return nil
}

// put changes what is assigned and tells the agent.
func (p *fakePeer) put(changes ...*pb.AssignmentChange) {
	p.mu.Lock()
	defer p.mu.Unlock()
	msg := &pb.WatchAssignmentsResponse{AppliesTo: p.set.sequence, ResultsIn: p.set.sequence + 1, Changes: changes}
	if err := p.set.apply(msg); err != nil {
		panic(err)
	}
	for s := range p.streams {
		s <- msg
	}
}

// lose sends a difference whose predecessor the agent never gets.
func (p *fakePeer) lose(changes ...*pb.AssignmentChange) {
	p.mu.Lock()
	p.set.sequence += 5
	p.mu.Unlock()
	p.put(changes...)
}

// reported returns what was last reported of an instance.
func (p *fakePeer) reported(id string) *pb.InstanceStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if all := p.instances[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return &pb.InstanceStatus{}
}

func (p *fakePeer) reportedProvider(id string) *pb.ProviderStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	if all := p.providers[id]; len(all) > 0 {
		return all[len(all)-1]
	}
	return &pb.ProviderStatus{}
}

func (p *fakePeer) allReported(id string) []*pb.ProviderStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.providers[id])
}

// reportedDenials sums up all denials that were reported, by need.
func (p *fakePeer) reportedDenials() (counts map[string]uint64, reports int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts = map[string]uint64{}
	for _, b := range p.batches {
		for _, d := range b.GetDenials() {
			counts[d.GetNeed()] += d.GetCount()
		}
		if len(b.GetDenials()) > 0 {
			reports++
		}
	}
	return counts, reports
}

// add stores a module and returns its digest.
func (p *fakePeer) add(data []byte) string {
	sum := sha256.Sum256(data)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	p.mu.Lock()
	defer p.mu.Unlock()
	p.modules[digest] = data
	return digest
}
