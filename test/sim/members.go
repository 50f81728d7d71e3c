package sim

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// gossipEvery is how often a member looks at the others.
	gossipEvery = 500 * time.Millisecond
	// gossipPatience is how long a member may be out of reach until it counts as dead.
	gossipPatience = 2 * time.Second
)

// gossipNet is what the members of the gossip tell about themselves. The gossip
// of the simulation is slow and may be wrong for some seconds, and never lies.
type gossipNet struct {
	net *Network

	mu   sync.Mutex
	told map[string]*pb.PeerMetadata
	up   map[string]bool
}

// memberSource is one member. It implements cluster.MemberSource.
type memberSource struct {
	hub    *gossipNet
	id     string
	events chan gossip.Event

	mu   sync.Mutex
	seen map[string]*sighting
}

// sighting is what one member knows of another.
type sighting struct {
	member gossip.Member
	last   time.Time
}

func (g *gossipNet) source(id string) *memberSource {
	return &memberSource{hub: g, id: id, events: make(chan gossip.Event, 64), seen: map[string]*sighting{}}
}

// set says whether a member takes part.
func (g *gossipNet) set(id string, up bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.up[id] = up
}

// Run takes part until ctx ends.
func (s *memberSource) Run(ctx context.Context) error {
	ticker := time.NewTicker(gossipEvery)
	defer ticker.Stop()
	for {
		s.look()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// look learns from those that can be reached.
func (s *memberSource) look() {
	s.hub.mu.Lock()
	told, up := maps.Clone(s.hub.told), maps.Clone(s.hub.up)
	s.hub.mu.Unlock()
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, meta := range told {
		near := id == s.id || up[id] && s.hub.net.open(route{s.id, id}) && s.hub.net.open(route{id, s.id})
		known, ok := s.seen[id]
		if !ok {
			if !near {
				continue
			}
			known = &sighting{member: gossip.Member{Metadata: meta, Since: now}}
			s.seen[id] = known
		}
		if near {
			known.last = now
		}
		alive := now.Sub(known.last) < gossipPatience
		updated := near && !proto.Equal(known.member.Metadata, meta)
		if updated {
			known.member.Metadata = meta
		}
		switch {
		case alive && !known.member.Alive:
			known.member.Alive, known.member.Since = true, now
			s.tellLocked(gossip.Joined, known.member)
		case !alive && known.member.Alive:
			known.member.Alive, known.member.Since = false, now
			s.tellLocked(gossip.Failed, known.member)
		case updated:
			s.tellLocked(gossip.Updated, known.member)
		}
	}
}

func (s *memberSource) tellLocked(kind gossip.EventKind, m gossip.Member) {
	select {
	case s.events <- gossip.Event{Kind: kind, Member: m}:
	default: // Members tells it too.
	}
}

// Members returns all known members, this one included.
func (s *memberSource) Members() []gossip.Member {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []gossip.Member
	for _, id := range slices.Sorted(maps.Keys(s.seen)) {
		out = append(out, s.seen[id].member)
	}
	return out
}

// Events tells of changes.
func (s *memberSource) Events() <-chan gossip.Event { return s.events }

// Update changes what this member tells about itself.
func (s *memberSource) Update(meta *pb.PeerMetadata) error {
	s.hub.mu.Lock()
	s.hub.told[s.id] = proto.CloneOf(meta)
	s.hub.up[s.id] = true
	s.hub.mu.Unlock()
	s.look()
	return nil
}
