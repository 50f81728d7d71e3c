package cluster

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// Peers returns all peers in the Raft configuration as this peer knows it, this
// one included. It is empty before Run has opened the log.
func (p *Peer) Peers() []*pb.PeerStatus {
	leader, _ := p.Leader()
	var out []*pb.PeerStatus
	for _, s := range p.servers() {
		out = append(out, p.peerStatus(s, leader))
	}
	return out
}
