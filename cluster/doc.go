// Package cluster is one control-plane peer: Raft and its storage, forming a
// cluster, membership, leadership duties, linearizable reads, and the
// forwarding of calls to the leader.
//
// It imports fsm, cluster/gossip, identity, rpc, apierror, correlation and
// proto. It must never import agent, runtime or provider, nor the packages that
// use it (cluster/control, cluster/schedule, cluster/dispatch, cluster/modules).
//
// # Forming a cluster
//
// A peer whose disk holds no Raft state either bootstraps or asks to join,
// never both (form.go). It bootstraps when gossip shows exactly as many peers
// as bootstrap_expect says, all of them with the same expectation and none with
// a history; every one of them then writes the same sorted configuration, so it
// does not matter which of them is elected. One member with a history is enough
// to make it join instead: a peer whose disk was wiped must not help to start a
// second cluster. With more peers than expected nobody bootstraps, because two
// sets that differ could both reach a majority.
//
// # A peer that forgot
//
// A voter that lost its disk is dangerous: hashicorp/raft grants every vote
// while its configuration is empty, and its acknowledgements from before the
// loss still count. So a peer without state marks its disk before Raft starts
// and grants no vote until it bootstrapped or was made a voter anew
// (transport.go, form.go), and the leader answers a Join of a known voter by
// removing it first and adding it as a non-voter (service.go). The removal is
// committed by a quorum without it; only then do its lost promises not matter
// any more. The price is one configuration change more for each such join.
//
// # Addresses
//
// Raft names servers by id; addresses may change. Where to dial comes from
// gossip, which anybody with the gossip key can forge, and after that from the
// registry, where the leader writes only what the peer itself has confirmed over
// mutual TLS. The Raft configuration keeps the address a peer joined with: to
// change one in place races with hashicorp/raft's replication. Each connection is therefore bound to an id: the
// certificate at the other end must carry exactly that name, or the connection
// is refused (transport.go). Without that check two peers that swapped their
// addresses would acknowledge entries for each other.
//
// # Reads
//
// Raft.VerifyLeader counts non-voters and late answers, and being in the state
// of a leader means nothing during a pause, so both give stale reads. A
// linearizable read waits for a barrier that was started after the read
// arrived; all readers that arrive while one barrier is under way share the
// next one (read.go). That costs one log entry for each batch of readers.
//
// # Leadership
//
// A leader serves once a barrier has shown it all that was committed before;
// then its duties run, and end with its leadership (leader.go). A duty that
// fails gives leadership away. A planned stop hands leadership over first.
//
// # Disks
//
// Log, term and votes are in one file that notices damage (raftfile); snapshots
// are recorded in it (snapshotstore.go). Everything is read and checked before
// Raft starts. A write that takes longer than a limit makes the peer stop sending
// until the write returns, so that the others elect another leader: heartbeats do
// not touch the disk and would hide it forever. A write that does not return, or
// fails, ends the peer; a disk without room does not (diskwatch.go, diskspace.go,
// diskstop.go). hashicorp/raft would panic where it cannot read or write: its
// goroutine is ended there instead.
//
// A cluster that lost its quorum for good is recovered from the files of one peer
// (recover.go).
//
// # Forwarding
//
// Any peer takes any call. One interceptor passes it to the leader, at most one
// hop, with nothing of its metadata but the correlation id and the caller's
// name (forward.go). A call whose fate is not known fails with NO_LEADER and
// the detail outcome=unknown; the client repeats it with the same request id.
package cluster
