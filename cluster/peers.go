package cluster

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// Peers returns all peers in the Raft configuration as this peer knows it, this
// one included. It is empty before Run has opened the log.
func (p *Peer) Peers() []*pb.PeerStatus { return p.status().GetPeers() }
