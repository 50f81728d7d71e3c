package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// putPeer records a peer's addresses; the same addresses again change nothing.
func (t *tx) putPeer(c *pb.PutPeerCommand) ([]string, *refusal) {
	id := c.GetPeer().GetId()
	if r := checkID("the peer's id", id); r != nil {
		return nil, r
	}
	old, known := first[*pb.Peer](t.txn, tablePeers, indexID, id)
	if known && old.GetRaftAddress() == c.GetPeer().GetRaftAddress() &&
		old.GetApiAddress() == c.GetPeer().GetApiAddress() {
		return []string{id}, nil
	}
	peer := shallow(c.GetPeer())
	peer.ModifiedIndex = t.index
	t.chain.put(hashPeer, peer)
	t.insert(tablePeers, peer)
	return []string{id}, nil
}

func (t *tx) removePeer(c *pb.RemovePeerCommand) ([]string, *refusal) {
	id := c.GetPeerId()
	peer, ok := first[*pb.Peer](t.txn, tablePeers, indexID, id)
	if !ok {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND, "no peer has the id %q", id).
			with("peer", id).
			next("wasmatrix cluster peers")
	}
	t.chain.remove(hashPeer, id)
	t.delete(tablePeers, peer)
	return []string{id}, nil
}
