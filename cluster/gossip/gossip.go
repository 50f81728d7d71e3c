package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	defaultRejoin = 10 * time.Second
	firstRejoin   = 250 * time.Millisecond
	leaveTimeout  = 500 * time.Millisecond
	updateTimeout = 2 * time.Second
)

// Config says how a member takes part in the gossip. It is read once by New.
type Config struct {
	// Bind is the host:port to listen on, TCP and UDP. Port 0 picks a free one.
	Bind string
	// Advertise is the host:port that other members use; empty means Bind.
	Advertise string
	// Join are gossip addresses (host:port) of other members, tried until one answers and then from time to time.
	Join []string
	// Key encrypts the gossip: 16, 24 or 32 bytes. Empty means plain text.
	Key []byte
	// Rejoin is how often members that were lost, and the Join addresses, are tried again; 0 means 10 s.
	// Without it a partition of more than about 30 s would never heal, because memberlist forgets the dead.
	Rejoin time.Duration
	// Logger gets what memberlist has to say; nil discards it.
	Logger *slog.Logger
	// Link decides what goes out; nil lets everything pass. A development cluster breaks its network with it.
	Link Link

	// tune changes the settings of memberlist; nil changes nothing. It is for
	// tests that must not wait for its timers.
	tune func(*memberlist.Config)
}

// Gossip is one member. Make it with New and let Run run it.
type Gossip struct {
	cfg    Config
	log    *slog.Logger
	wake   chan struct{}
	events chan Event

	mu     sync.Mutex
	local  *pb.PeerMetadata
	raw    []byte
	list   *memberlist.Memberlist
	roster *roster
}

// New makes a member that tells local about itself. It opens nothing. It fails
// when an address or the key is malformed, or with ErrMetadata.
func New(cfg Config, local *pb.PeerMetadata) (*Gossip, error) {
	raw, err := EncodeMetadata(local)
	if err != nil {
		return nil, err
	}
	if cfg.Rejoin <= 0 {
		cfg.Rejoin = defaultRejoin
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	g := &Gossip{
		cfg:    cfg,
		log:    log,
		wake:   make(chan struct{}, 1),
		events: make(chan Event),
		local:  proto.CloneOf(local),
		raw:    raw,
		roster: newRoster(local.GetPeerId()),
	}
	if _, err := g.memberlistConfig(); err != nil {
		return nil, err
	}
	return g, nil
}

// Run takes part in the gossip until ctx ends; then it tells the others that
// it leaves, and returns nil. It fails when it cannot listen. Call it once.
func (g *Gossip) Run(ctx context.Context) error {
	cfg, err := g.memberlistConfig()
	if err != nil {
		return err
	}
	g.mu.Lock()
	told := g.local
	g.mu.Unlock()
	if g.cfg.Link != nil {
		if cfg.Transport, err = newLinked(cfg, g.cfg.Link); err != nil {
			return fmt.Errorf("listen for gossip on %s: %w", g.cfg.Bind, err)
		}
	}
	list, err := memberlist.Create(cfg)
	if err != nil {
		return fmt.Errorf("listen for gossip on %s: %w", g.cfg.Bind, err)
	}
	g.mu.Lock()
	g.list = list
	stale := g.local != told
	g.mu.Unlock()
	if stale {
		if err := list.UpdateNode(updateTimeout); err != nil {
			g.log.Warn("tell members the new metadata", "error", err)
		}
	}

	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error { g.deliver(gctx); return nil })
	group.Go(func() error { g.rejoin(gctx, list); return nil })
	<-gctx.Done()
	g.sayFarewell(list)
	if err := list.Leave(leaveTimeout); err != nil {
		g.log.Debug("leave gossip", "error", err)
	}
	err = list.Shutdown()
	if werr := group.Wait(); werr != nil {
		err = errors.Join(err, werr)
	}
	return err
}

// Members returns what is known of all members, this one included, in the order
// of their ids. The metadata is shared: never modify it.
func (g *Gossip) Members() []Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.roster.members(g.local)
}

// Events returns the channel of changes. Of several changes of one member that
// were not received yet only the last is kept, so a slow receiver costs no
// memory. The channel is never closed.
func (g *Gossip) Events() <-chan Event { return g.events }

// Address returns the host:port this member listens on, or "" before Run listens.
func (g *Gossip) Address() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.list == nil {
		return ""
	}
	return g.list.LocalNode().Address()
}

// Update changes what this member tells about itself; the id and the cluster
// cannot change. It returns when the change is queued for the others, and fails
// with ErrMetadata.
func (g *Gossip) Update(meta *pb.PeerMetadata) error {
	raw, err := EncodeMetadata(meta)
	if err != nil {
		return err
	}
	g.mu.Lock()
	if meta.GetPeerId() != g.local.GetPeerId() || meta.GetCluster() != g.local.GetCluster() {
		g.mu.Unlock()
		return fmt.Errorf("%w: peer_id and cluster cannot change", ErrMetadata)
	}
	g.local, g.raw = proto.CloneOf(meta), raw
	list := g.list
	g.mu.Unlock()
	if list == nil {
		return nil
	}
	if err := list.UpdateNode(updateTimeout); err != nil {
		return fmt.Errorf("tell members the new metadata: %w", err)
	}
	return nil
}

// deliver hands the pending events to the receiver, one at a time.
func (g *Gossip) deliver(ctx context.Context) {
	for {
		g.mu.Lock()
		event, ok := g.roster.next()
		g.mu.Unlock()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-g.wake:
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case g.events <- event:
		}
	}
}

// rejoin tries the configured addresses and those of lost members: at first
// often, until anybody answered, then every Rejoin.
func (g *Gossip) rejoin(ctx context.Context, list *memberlist.Memberlist) {
	wait := firstRejoin
	for {
		for _, address := range g.targets() {
			if ctx.Err() != nil {
				return
			}
			if _, err := list.Join([]string{address}); err != nil {
				g.log.Debug("join gossip", "address", address, "error", err)
			}
		}
		if list.NumMembers() > 1 {
			wait = g.cfg.Rejoin
		} else {
			wait = min(2*wait, g.cfg.Rejoin)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// targets are the addresses worth a try: configured or once seen, and no live
// member's.
func (g *Gossip) targets() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	live := map[string]bool{g.cfg.advertise(): true}
	var out []string
	for _, m := range g.roster.members(g.local) {
		if m.Alive {
			live[m.Address] = true
		} else {
			out = append(out, m.Address)
		}
	}
	out = append(out, g.cfg.Join...)
	out = slices.DeleteFunc(out, func(a string) bool { return live[a] })
	slices.Sort(out)
	return slices.Compact(out)
}

func (c Config) advertise() string {
	if c.Advertise != "" {
		return c.Advertise
	}
	return c.Bind
}

func (g *Gossip) memberlistConfig() (*memberlist.Config, error) {
	bindHost, bindPort, err := splitHostPort(g.cfg.Bind)
	if err != nil {
		return nil, fmt.Errorf("gossip bind address: %w", err)
	}
	adHost, adPort, err := splitHostPort(g.cfg.advertise())
	if err != nil {
		return nil, fmt.Errorf("gossip advertise address: %w", err)
	}
	cfg := memberlist.DefaultLANConfig()
	cfg.Name = g.local.GetPeerId()
	cfg.Label = "wasmatrix/" + g.local.GetCluster()
	cfg.BindAddr, cfg.BindPort = bindHost, bindPort
	cfg.AdvertiseAddr, cfg.AdvertisePort = adHost, adPort
	if adHost == "0.0.0.0" || adHost == "::" {
		cfg.AdvertiseAddr = ""
	}
	// A control plane has few members: news may travel faster than the
	// defaults, which are made for thousands.
	cfg.GossipInterval = 100 * time.Millisecond
	cfg.PushPullInterval = 10 * time.Second
	cfg.TCPTimeout = 2 * time.Second
	// A peer that crashed may come back at another address.
	cfg.DeadNodeReclaimTime = time.Second
	cfg.Logger = logBridge(g.log)
	cfg.Delegate, cfg.Events, cfg.Alive = metaDelegate{g}, eventDelegate{g}, aliveDelegate{g}
	if len(g.cfg.Key) > 0 {
		if cfg.Keyring, err = memberlist.NewKeyring(nil, g.cfg.Key); err != nil {
			return nil, fmt.Errorf("gossip key: %w", err)
		}
	}
	if g.cfg.tune != nil {
		g.cfg.tune(cfg)
	}
	return cfg, nil
}

func splitHostPort(address string) (string, int, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("port of %q: %w", address, err)
	}
	if strings.TrimSpace(host) == "" {
		host = "0.0.0.0"
	}
	return host, int(n), nil
}
