package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// leaderAddressKey is the error detail in which a follower names the leader.
	leaderAddressKey = "leader_api_address"
	// registerTimeout bounds RegisterNode, which answers when it is committed.
	registerTimeout = 2 * time.Second
	// minHeartbeatTimeout is the least time a renewal gets.
	minHeartbeatTimeout = 200 * time.Millisecond
	// minHeartbeatPause is the least time between renewals, whatever a leader grants.
	minHeartbeatPause = 50 * time.Millisecond
	// maxRedirects is how often in a row a redirect is followed at once.
	maxRedirects = 2
	// maxGaps is how often in a row the assignment stream is opened anew within one session.
	maxGaps = 3
)

// searchBackoff paces the rounds over the peers while no leader is found.
var searchBackoff = restartPolicy{backoff: 50 * time.Millisecond, maxBackoff: 2 * time.Second}

// errStreamEnded: the leader ended the assignment stream.
var errStreamEnded = errors.New("the assignment stream ended")

// session keeps this node registered with whichever peer leads. Losing it stops
// nothing by itself: that is for the lease to decide.
type session struct {
	info      *pb.NodeInfo
	providers []*pb.ProviderSpec
	conn      Dial
	peers     *peerList
	lease     *lease
	reports   *reporter
	metrics   *metrics
	log       *slog.Logger
	// apply takes up a message of the assignment stream.
	apply func(*pb.WatchAssignmentsResponse) error
	// resync makes the present state of everything go out again.
	resync func()

	epoch uint64 // of the lease this process holds; 0 for none

	mu      sync.Mutex
	status  sessionStatus
	changed chan struct{} // closed at the next change of status; nil while nobody waits
}

// sessionStatus is what others may know of the session.
type sessionStatus struct {
	leader string // empty without a session
	epoch  uint64
	err    error // why there is none
}

func (s *session) current() sessionStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func (s *session) set(st sessionStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = st
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// watchStatus returns the status, and a channel that is closed when it changes.
func (s *session) watchStatus() (sessionStatus, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.status, s.changed
}

// run looks for the leader and holds a session with it, over and over, until ctx ends.
func (s *session) run(ctx context.Context) error {
	var search search
	for ctx.Err() == nil {
		address := search.next(s.peers.list())
		if address == "" {
			return errors.New("no address of a control-plane peer is known")
		}
		synced, err := s.hold(ctx, address)
		if ctx.Err() != nil {
			break
		}
		s.set(sessionStatus{err: fmt.Errorf("%s: %w", address, err)})
		if synced {
			search = newSearch(address)
			s.metrics.sessionsLost.Inc()
			s.log.WarnContext(ctx, "the session with the control plane was lost", "peer", address, "error", err)
		}
		delay := search.failed(address, s.verdict(ctx, address, err), rand.Float64(), len(s.peers.list()))
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
	s.set(sessionStatus{err: context.Cause(ctx)})
	return nil
}

// verdict reads from an error where to go next.
func (s *session) verdict(ctx context.Context, address string, err error) hint {
	failure := apierror.From(err)
	switch failure.Code() {
	case pb.ErrorCode_ERROR_CODE_NO_LEADER:
		if leader := failure.Detail(leaderAddressKey); leader != "" && leader != address {
			return hint{address: leader}
		}
	case pb.ErrorCode_ERROR_CODE_CONFLICT:
		// The epoch is over, or this leader takes it to be: registering again tells.
		s.log.WarnContext(ctx, "registering anew", "peer", address, "error", err)
		return hint{address: address}
	case pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST:
		s.log.ErrorContext(ctx, "the control plane refuses this node", "peer", address, "error", err)
	default:
		s.log.DebugContext(ctx, "no session with this peer", "peer", address, "error", err)
	}
	return hint{}
}

// hold opens a session with the peer at address and keeps it until it breaks.
// synced tells whether it came as far as a full set of assignments.
func (s *session) hold(ctx context.Context, address string) (synced bool, err error) {
	conn, err := s.conn(address)
	if err != nil {
		return false, err
	}
	client := pb.NewAgentSessionServiceClient(conn)
	ttl, err := s.register(ctx, client)
	if err != nil {
		return false, err
	}
	s.set(sessionStatus{leader: address, epoch: s.epoch})
	s.log.InfoContext(ctx, "registered with the control plane", "leader", address, "epoch", s.epoch, "lease_ttl", ttl)
	full := make(chan struct{})
	g, held := errgroup.WithContext(ctx)
	g.Go(func() error { return s.heartbeats(held, client, ttl) })
	g.Go(func() error { return s.watch(held, client, full) })
	g.Go(func() error {
		select {
		case <-held.Done():
			return nil
		case <-full:
		}
		return s.reports.run(held, client, s.info.GetId(), s.epoch)
	})
	err = g.Wait()
	select {
	case <-full:
		synced = true
	default:
	}
	return synced, err
}

// register opens the session, keeping the epoch this process holds when the
// leader agrees, and returns the TTL of the lease.
func (s *session) register(ctx context.Context, client pb.AgentSessionServiceClient) (time.Duration, error) {
	sent := s.lease.now()
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	resp, err := client.RegisterNode(ctx, &pb.RegisterNodeRequest{Info: s.info, Providers: s.providers, Epoch: s.epoch})
	if err != nil {
		if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_CONFLICT && s.epoch != 0 {
			s.epoch = 0
			s.lease.drop()
		}
		return 0, err
	}
	if plant.On(plant.DeadlineFromAnswer) {
		sent = s.lease.now()
	}
	ttl := resp.GetLeaseTtl().AsDuration()
	if resp.GetEpoch() == 0 || ttl <= 0 {
		return 0, fmt.Errorf("the leader answered with epoch %d and a lease of %s", resp.GetEpoch(), ttl)
	}
	if s.epoch != 0 && resp.GetEpoch() != s.epoch {
		s.log.WarnContext(ctx, "the epoch of this node has ended", "epoch", s.epoch, "next", resp.GetEpoch())
	}
	s.epoch = resp.GetEpoch()
	s.lease.begin(s.epoch, sent, ttl)
	s.peers.learn(resp.GetPeerApiAddresses())
	return ttl, nil
}

// heartbeats renews the lease every quarter of its TTL. One that fails ends the
// session: the next one begins with a renewal.
func (s *session) heartbeats(ctx context.Context, client pb.AgentSessionServiceClient, ttl time.Duration) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(ttl/4, minHeartbeatPause)):
		}
		sent := s.lease.now()
		bounded, cancel := context.WithTimeout(ctx, max(ttl/3, minHeartbeatTimeout))
		resp, err := client.Heartbeat(bounded, &pb.HeartbeatRequest{NodeId: s.info.GetId(), Epoch: s.epoch})
		cancel()
		if err != nil {
			return fmt.Errorf("renewing the lease: %w", err)
		}
		if plant.On(plant.DeadlineFromAnswer) {
			sent = s.lease.now()
		}
		if granted := resp.GetLeaseTtl().AsDuration(); granted > 0 {
			ttl = granted
		}
		s.lease.renew(sent, ttl)
		s.peers.learn(resp.GetPeerApiAddresses())
	}
}

// watch takes up the assignment stream, and opens it anew after a gap. synced is
// closed after the first full set.
func (s *session) watch(ctx context.Context, client pb.AgentSessionServiceClient, synced chan struct{}) error {
	for gaps := 0; ; {
		progress, err := s.watchOnce(ctx, client, synced)
		if !errors.Is(err, errGap) {
			return err
		}
		if progress {
			gaps = 0
		}
		if gaps++; gaps > maxGaps {
			return err
		}
		s.metrics.gaps.Inc()
		s.log.WarnContext(ctx, "opening the assignment stream anew", "error", err)
	}
}

// watchOnce reads one stream to its end. progress tells whether a difference
// was applied after the full set.
func (s *session) watchOnce(ctx context.Context, client pb.AgentSessionServiceClient, synced chan struct{}) (progress bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.WatchAssignments(ctx, &pb.WatchAssignmentsRequest{NodeId: s.info.GetId(), Epoch: s.epoch})
	if err != nil {
		return false, fmt.Errorf("opening the assignment stream: %w", err)
	}
	var full *pb.WatchAssignmentsResponse // the parts so far; nil after the last
	for begun := false; ; {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return progress, errStreamEnded
		}
		if err != nil {
			return progress, fmt.Errorf("reading the assignment stream: %w", err)
		}
		if msg.GetComplete() {
			if full, err = joinParts(full, msg); err != nil {
				return progress, err
			}
			if msg.GetMore() {
				continue
			}
			msg, full = full, nil
		} else if full != nil || !begun {
			return progress, fmt.Errorf("%w: a difference came before the full set", errGap)
		}
		if err := s.apply(msg); err != nil {
			return progress, err
		}
		if begun {
			progress = true
			continue
		}
		begun = true
		s.resync()
		select {
		case <-synced:
		default:
			close(synced)
		}
	}
}

// joinParts adds the next part of a full set to those before it.
func joinParts(before, next *pb.WatchAssignmentsResponse) (*pb.WatchAssignmentsResponse, error) {
	joined := &pb.WatchAssignmentsResponse{
		Complete: true, AppliesTo: next.GetAppliesTo(), ResultsIn: next.GetResultsIn(), Index: next.GetIndex(),
		Changes: next.GetChanges(),
	}
	if before == nil {
		return joined, nil
	}
	if next.GetAppliesTo() != before.GetResultsIn() {
		return nil, fmt.Errorf("%w: a part of the full set follows %d, have %d", errGap, next.GetAppliesTo(), before.GetResultsIn())
	}
	joined.Changes = append(before.GetChanges(), next.GetChanges()...)
	return joined, nil
}

// hint says where to look next.
type hint struct {
	// address is to be tried at once; empty means the next in the list.
	address string
}

// search goes over the peers, follows hints, and paces itself. It is pure.
type search struct {
	at        string // tried last, or where the last session was
	goTo      string // to be tried next
	redirects int    // hints followed in a row
	tried     int    // peers tried in this round
	round     int
}

func newSearch(at string) search { return search{at: at} }

// next returns the address to try, "" when there is none.
func (s *search) next(addresses []string) string {
	if s.goTo != "" {
		address := s.goTo
		s.goTo = ""
		return address
	}
	if len(addresses) == 0 {
		return ""
	}
	return addresses[(slices.Index(addresses, s.at)+1)%len(addresses)]
}

// failed takes up that address gave no session, and returns how long to wait
// before the next try: nothing within a round over all of total peers.
func (s *search) failed(address string, h hint, jitter float64, total int) time.Duration {
	s.at = address
	if h.address != "" && s.redirects < maxRedirects {
		s.redirects++
		s.goTo = h.address
		return 0
	}
	s.redirects = 0
	if s.tried++; s.tried < total {
		return 0
	}
	s.tried = 0
	s.round++
	return searchBackoff.delay(s.round, jitter)
}
