package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Config says who a peer is and how it takes part. New reads it once.
type Config struct {
	// ID is the peer's id: the name of its node, and the name in its certificate.
	ID string
	// Cluster is the cluster's name; peers of other clusters are ignored.
	Cluster string
	// Version is the version of the binary, for people.
	Version string
	// DataDir is the directory for log, votes and snapshots; it is made when it does not exist. One process at a time.
	DataDir string
	// RaftBind is the host:port of the Raft transport; port 0 picks a free one.
	RaftBind string
	// RaftAdvertise is the host:port at which other peers reach the Raft transport; empty means where it listens.
	RaftAdvertise string
	// APIAdvertise is the host:port at which others reach this peer's gRPC server.
	APIAdvertise string
	// Gossip says how peers are found. Its Join addresses are also how a new peer finds the cluster it shall join.
	Gossip gossip.Config
	// BootstrapExpect is the number of peers that form a new cluster together, this one included; 0 means that
	// this peer only ever joins an existing one.
	BootstrapExpect int
	// NonVoter keeps the peer from becoming a voter: it replicates and never votes.
	NonVoter bool
	// Timers are the time limits; zero values mean the defaults.
	Timers Timers
	// Snapshots says when the log is compacted; zero values mean the defaults.
	Snapshots Snapshots
	// Identity is the peer's certificate, for Raft and for calls to other peers.
	Identity *identity.Identity
	// Logger gets records with the attribute peer; nil discards them.
	Logger *slog.Logger
	// Registerer gets the metrics wasmatrix_raft_… and wasmatrix_peers_…; nil means none.
	Registerer prometheus.Registerer
	// Seams replaces parts, for tests and simulations.
	Seams Seams

	commitTimeout time.Duration
}

// Timers are the time limits of a peer.
type Timers struct {
	// Heartbeat is how long a follower waits for a sign of the leader before it stands for election, and how
	// long a leader lives without a quorum. Default 250 ms; below 100 ms leaders flap.
	Heartbeat time.Duration
	// DiskLimit is the longest a write of the log may take before the peer stops acting as a leader. Default 2 s.
	DiskLimit time.Duration
	// DiskDead is the longest a write may hang before the peer ends, because what holds its files cannot be
	// undone. Default 10 s; at least DiskLimit.
	DiskDead time.Duration
	// LeaderWait is the longest a call waits for a leader to be elected. Default 3 s.
	LeaderWait time.Duration
	// DeadPeerAfter is how long a peer must be out of reach, for gossip and for the leader alike, until it is
	// removed from the cluster. Default 24 h; negative means never.
	DeadPeerAfter time.Duration
	// Stabilization is how long a new peer must have been in touch with the leader until it becomes a voter.
	// Default 2 s. Peers that form a cluster together vote at once.
	Stabilization time.Duration
	// JoinRetry is the longest pause between two attempts to join. Default 5 s.
	JoinRetry time.Duration
	// CompareStates is how often a peer compares the hash of its state with those of the voters. Default 5 s.
	CompareStates time.Duration
	// Shutdown bounds each step of a planned stop: the transfer of leadership, calls in flight. Default 3 s.
	Shutdown time.Duration
}

// Snapshots says when the log is compacted.
type Snapshots struct {
	// Threshold is the number of log entries after which a snapshot is taken. Default 16384.
	Threshold uint64
	// Trailing is the number of log entries kept behind a snapshot, for followers that lag. Default 10240.
	Trailing uint64
	// Interval is how often the threshold is checked, up to doubled at random. Default 30 s.
	Interval time.Duration
	// Retain is the number of snapshots kept on disk. Default 2.
	Retain int
}

// Seams replaces parts of a peer. All are optional.
type Seams struct {
	// Transport replaces Raft over TLS; the peer closes it if it can be closed. RaftBind and RaftAdvertise are then unused.
	Transport raft.Transport
	// Logs, Stable and SnapshotStore replace the files in DataDir; give all three or none.
	Logs          raft.LogStore
	Stable        raft.StableStore
	SnapshotStore raft.SnapshotStore
	// Members replaces the gossip.
	Members MemberSource
	// Dial replaces connections to other peers' gRPC servers over mutual TLS.
	Dial func(address string) (grpc.ClientConnInterface, error)
	// Now replaces the clock that commands are stamped with.
	Now func() time.Time
}

// MemberSource tells which peers there are. *gossip.Gossip is the real one.
type MemberSource interface {
	// Run takes part until ctx ends.
	Run(ctx context.Context) error
	// Members returns all known members, this one included.
	Members() []gossip.Member
	// Events tells of changes; Members already shows them.
	Events() <-chan gossip.Event
	// Update changes what this member tells about itself.
	Update(meta *pb.PeerMetadata) error
}

// ErrConfig is wrapped by the errors of New.
var ErrConfig = errors.New("bad cluster configuration")

func (c Config) withDefaults() Config {
	t := &c.Timers
	set(&t.Heartbeat, 250*time.Millisecond)
	set(&t.DiskLimit, 2*time.Second)
	set(&t.DiskDead, 10*time.Second)
	set(&t.LeaderWait, 3*time.Second)
	set(&t.DeadPeerAfter, 24*time.Hour)
	set(&t.Stabilization, 2*time.Second)
	set(&t.JoinRetry, 5*time.Second)
	set(&t.CompareStates, 5*time.Second)
	set(&t.Shutdown, 3*time.Second)
	s := &c.Snapshots
	set(&s.Threshold, 16384)
	set(&s.Trailing, 10240)
	set(&s.Interval, 30*time.Second)
	set(&s.Retain, 2)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("peer", c.ID)
	if c.Gossip.Logger == nil {
		c.Gossip.Logger = c.Logger
	}
	set(&c.commitTimeout, commitTimeout)
	if c.Seams.Now == nil {
		c.Seams.Now = time.Now
	}
	return c
}

func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c Config) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	stores := 0
	for _, given := range []bool{c.Seams.Logs != nil, c.Seams.Stable != nil, c.Seams.SnapshotStore != nil} {
		if given {
			stores++
		}
	}
	switch {
	case c.ID == "" || c.Cluster == "":
		return bad("a peer needs an id and the name of its cluster")
	case c.APIAdvertise == "":
		return bad("a peer needs the address of its API")
	case stores != 0 && stores != 3:
		return bad("replace all three stores or none")
	case stores == 0 && c.DataDir == "":
		return bad("a peer needs a data directory")
	case c.Identity == nil && (c.Seams.Transport == nil || c.Seams.Dial == nil):
		return bad("a peer needs an identity")
	case c.Identity != nil && c.Identity.Self().Name != c.ID:
		return bad("the certificate is for %q, the peer is %q", c.Identity.Self().Name, c.ID)
	case c.Identity != nil && (c.Identity.Self().Cluster != c.Cluster || !c.Identity.Self().IsPeer()):
		return bad("the certificate is for %s, not for a peer of cluster %q", c.Identity.Self(), c.Cluster)
	case c.BootstrapExpect < 0:
		return bad("bootstrap_expect is %d", c.BootstrapExpect)
	case c.NonVoter && c.BootstrapExpect > 0:
		return bad("a non-voter cannot take part in a bootstrap")
	case c.Timers.Heartbeat < 5*time.Millisecond:
		return bad("heartbeat is %s, want at least 5ms", c.Timers.Heartbeat)
	}
	return nil
}

// alone reports whether the peer was told of no other.
func (c Config) alone() bool {
	self := c.Gossip.Advertise
	if self == "" {
		self = c.Gossip.Bind
	}
	return !slices.ContainsFunc(c.Gossip.Join, func(a string) bool { return a != self })
}

// commitTimeout is how long an idle leader waits before Raft itself tells a
// follower what has been committed. The herald has told it before, so this only
// covers what was lost on the way and what is not applied.
const commitTimeout = 50 * time.Millisecond

// raftConfig is how hashicorp/raft shall work.
func (c Config) raftConfig() *raft.Config {
	out := raft.DefaultConfig()
	out.LocalID = raft.ServerID(c.ID)
	out.HeartbeatTimeout = c.Timers.Heartbeat
	// Not shorter than the heartbeat timeout, which the vigil varies.
	out.ElectionTimeout = c.Timers.Heartbeat + nudgeStep
	out.LeaderLeaseTimeout = c.Timers.Heartbeat
	out.CommitTimeout = c.commitTimeout
	out.MaxAppendEntries = maxAppendEntries
	out.BatchApplyCh = true
	// The peer notices its removal itself and stops in its own order.
	out.ShutdownOnRemove = false
	out.SnapshotThreshold = c.Snapshots.Threshold
	out.TrailingLogs = c.Snapshots.Trailing
	out.SnapshotInterval = c.Snapshots.Interval
	out.NoLegacyTelemetry = true
	out.Logger = newHCLog(c.Logger.With("component", "raft"))
	return out
}

const (
	// maxAppendEntries is how many entries one disk write and one message to a
	// follower carry at most.
	maxAppendEntries = 256
	// raftIOTimeout bounds one message to another peer, and the time to connect.
	raftIOTimeout = 3 * time.Second
	// logCacheEntries is how many recent log entries stay in memory for followers.
	logCacheEntries = 1024
)
