// Package gossip finds the peers of a cluster and gives hints on which of them
// are alive. It hides hashicorp/memberlist behind a list of members, typed
// metadata (pb.PeerMetadata) and one channel of events.
//
// Gossip decides nothing. Whoever holds the gossip key can pretend to be any
// member, so nothing of what it tells may change the Raft configuration, grant
// a permission or count as an acknowledgement; the cluster package confirms
// every hint over mutual TLS before it acts on it.
//
// The package must never import the packages that use it (cluster and all
// above), nor fsm, agent, runtime or provider. Of wasmatrix it imports proto
// only.
package gossip
