package gossip

import (
	"bytes"
	"fmt"
	"log"
	"log/slog"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

// The delegates run under memberlist's own locks: they must neither block nor
// call memberlist.

// farewell opens the message of a member that leaves; its id follows.
var farewell = []byte("leave\x00")

type metaDelegate struct{ g *Gossip }

func (d metaDelegate) NodeMeta(limit int) []byte {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	if len(d.g.raw) > limit {
		return nil
	}
	return d.g.raw
}

// NotifyMsg takes the farewell of another member.
func (d metaDelegate) NotifyMsg(raw []byte) {
	id, ok := bytes.CutPrefix(raw, farewell)
	if !ok || len(id) == 0 || len(id) > maxNameLength {
		return
	}
	d.g.mu.Lock()
	d.g.roster.leaves(string(id), time.Now())
	d.g.mu.Unlock()
	d.g.wakeUp()
}

func (metaDelegate) GetBroadcasts(int, int) [][]byte { return nil }
func (metaDelegate) LocalState(bool) []byte          { return nil }
func (metaDelegate) MergeRemoteState([]byte, bool)   {}

type aliveDelegate struct{ g *Gossip }

// NotifyAlive refuses members that are not of this cluster.
func (d aliveDelegate) NotifyAlive(node *memberlist.Node) error {
	_, err := d.g.member(node)
	return err
}

type eventDelegate struct{ g *Gossip }

func (d eventDelegate) NotifyJoin(node *memberlist.Node)   { d.g.note(Joined, node) }
func (d eventDelegate) NotifyUpdate(node *memberlist.Node) { d.g.note(Updated, node) }
func (d eventDelegate) NotifyLeave(node *memberlist.Node)  { d.g.note(Failed, node) }

// member turns what memberlist knows into a Member, or refuses it.
func (g *Gossip) member(node *memberlist.Node) (Member, error) {
	meta, err := DecodeMetadata(node.Meta)
	if err != nil {
		return Member{}, fmt.Errorf("member %q at %s: %w", node.Name, node.Address(), err)
	}
	if meta.GetPeerId() != node.Name {
		return Member{}, fmt.Errorf("member %q at %s: %w: peer_id is %q", node.Name, node.Address(), ErrMetadata, meta.GetPeerId())
	}
	g.mu.Lock()
	cluster := g.local.GetCluster()
	g.mu.Unlock()
	if meta.GetCluster() != cluster {
		return Member{}, fmt.Errorf("member %q at %s: %w: belongs to cluster %q", node.Name, node.Address(), ErrMetadata, meta.GetCluster())
	}
	return Member{Metadata: meta, Address: node.Address()}, nil
}

func (g *Gossip) note(kind EventKind, node *memberlist.Node) {
	m, err := g.member(node)
	if err != nil {
		g.log.Warn("ignored gossip", "error", err)
		return
	}
	m.Alive = kind != Failed
	m.Since = time.Now()
	g.mu.Lock()
	g.roster.record(kind, m)
	g.mu.Unlock()
	g.wakeUp()
}

func (g *Gossip) wakeUp() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// sayFarewell tells the others that this member leaves on purpose; memberlist
// itself does not let them tell a leave from a failure. It is a datagram a
// member, and when it is lost the leave looks like a failure.
func (g *Gossip) sayFarewell(list *memberlist.Memberlist) {
	self := list.LocalNode().Name
	for _, node := range list.Members() {
		if node.Name == self {
			continue
		}
		if err := list.SendBestEffort(node, append(bytes.Clone(farewell), self...)); err != nil {
			g.log.Debug("say farewell", "member", node.Name, "error", err)
		}
	}
}

// bridge turns memberlist's "[LEVEL] memberlist: text" lines into records.
type bridge struct{ log *slog.Logger }

func logBridge(l *slog.Logger) *log.Logger { return log.New(bridge{l}, "", 0) }

func (b bridge) Write(line []byte) (int, error) {
	level, text := "", strings.TrimSpace(string(line))
	if rest, ok := strings.CutPrefix(text, "["); ok {
		level, text, _ = strings.Cut(rest, "] ")
	}
	text = strings.TrimPrefix(text, "memberlist: ")
	switch level {
	case "WARN", "ERR", "ERROR":
		b.log.Warn(text)
	default:
		b.log.Debug(text)
	}
	return len(line), nil
}
