package agent

import (
	"slices"
	"sync"

	"google.golang.org/grpc"
)

// Dial returns a connection to the gRPC server at address (host:port). It does
// not block; the connection is shared and belongs to whoever made the function.
type Dial func(address string) (grpc.ClientConnInterface, error)

// peerList is the API addresses of the control-plane peers: those the cluster
// told last, then those of the configuration.
type peerList struct {
	configured []string

	mu      sync.Mutex
	learned []string
}

// learn takes the addresses that the leader told; none tells nothing.
func (p *peerList) learn(addresses []string) {
	if len(addresses) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.learned = slices.Clone(addresses)
}

// list returns all addresses without repetition.
func (p *peerList) list() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := slices.Clone(p.learned)
	for _, a := range p.configured {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}
