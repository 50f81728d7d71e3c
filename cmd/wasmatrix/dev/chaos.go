package dev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev/control"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/internal/faults"
)

// rulesFile holds what is wrong with the network of a cluster, in its directory.
const rulesFile = "network.json"

// settleTime is how long a request waits until every node has seen new rules.
const settleTime = 3 * faults.Watch

// breaker breaks a cluster on request.
type breaker struct {
	cluster *Cluster

	mu    sync.Mutex // one request at a time
	rules *faults.Rules
	path  string // "" when the network cannot be broken
	// pauses end the pauses that end by themselves.
	pauses map[string]*time.Timer
}

func newBreaker(c *Cluster) (*breaker, error) {
	b := &breaker{cluster: c, rules: &faults.Rules{Nodes: map[string]faults.Node{}}, pauses: map[string]*time.Timer{}}
	if !c.opts.Breakable {
		return b, nil
	}
	b.path = filepath.Join(c.opts.Dir, rulesFile)
	return b, b.rules.Save(b.path)
}

// admit lets a node's network be broken.
func (b *breaker) admit(n *Node, i int) error {
	if b.path == "" {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	first := n.Config.Bind.PortBase
	// Not 127.0.0.1, from which everybody else dials.
	b.rules.Nodes[n.Name()] = faults.Node{Source: fmt.Sprintf("127.0.1.%d", i), FirstPort: first, LastPort: first + node.PortCount - 1}
	n.env = append(n.env, node.FaultsEnv(b.path))
	return b.rules.Save(b.path)
}

// ServeControl takes requests to break the cluster until ctx ends.
func (c *Cluster) ServeControl(ctx context.Context) (err error) {
	l, remove, err := control.Listen(c.opts.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	server := &http.Server{Handler: c.breaker.handler(), ReadHeaderTimeout: time.Second}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the control socket: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-gctx.Done()
		return server.Close()
	})
	return g.Wait()
}

func (b *breaker) handler() http.Handler {
	mux := http.NewServeMux()
	for path, f := range map[string]func(context.Context, control.Request) ([]control.Node, error){
		control.PathState:   func(context.Context, control.Request) ([]control.Node, error) { return nil, nil },
		control.PathKill:    b.kill,
		control.PathRestart: b.restart,
		control.PathPause:   b.pause,
		control.PathResume:  b.resume,
		control.PathLink:    b.link,
		control.PathHeal:    b.heal,
	} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			var req control.Request
			if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&req); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			began := time.Now()
			changed, err := f(r.Context(), req)
			if err != nil {
				http.Error(w, err.Error(), statusOf(err))
				return
			}
			state := b.state()
			state.Began, state.Changed = began, changed
			// Who does not wait for the answer does not need it.
			_ = json.NewEncoder(w).Encode(state)
		})
	}
	return mux
}

// errNode is returned for a node that the cluster does not have, errState for one
// whose state does not allow what was asked.
var (
	errNode  = errors.New("no such node")
	errState = errors.New("not possible now")
)

func statusOf(err error) int {
	switch {
	case errors.Is(err, errNode):
		return http.StatusNotFound
	case errors.Is(err, errState), errors.Is(err, ErrNotRunning):
		return http.StatusConflict
	default:
		return http.StatusInternalServerError
	}
}

func (b *breaker) state() control.State {
	out := control.State{Done: time.Now()}
	for _, n := range b.cluster.Nodes() {
		out.Nodes = append(out.Nodes, b.describe(n))
	}
	for _, l := range b.rules.Links {
		out.Links = append(out.Links, control.Link{From: l.From, To: l.To, Cut: l.Cut, Delay: l.Delay})
	}
	return out
}

func (b *breaker) describe(n *Node) control.Node {
	_, paused := b.pauses[n.Name()]
	d := control.Node{Name: n.Name(), Paused: paused, APIAddress: n.Config.APIAddress()}
	if pid, err := n.PID(); err == nil {
		d.PeerPID = pid
	}
	if pid, err := n.AgentPID(); err == nil {
		d.AgentPID = pid
	}
	return d
}

// nodes returns the named node, or all for "".
func (b *breaker) nodes(name string) ([]*Node, error) {
	if name == "" {
		return b.cluster.Nodes(), nil
	}
	n := b.cluster.Node(name)
	if n == nil {
		return nil, fmt.Errorf("%w: this development cluster has no node %q", errNode, name)
	}
	return []*Node{n}, nil
}

func (b *breaker) node(name string) (*Node, error) {
	nodes, err := b.nodes(name)
	if err != nil || len(nodes) == 1 && nodes[0].Name() == name {
		return append(nodes, nil)[0], err
	}
	return nil, fmt.Errorf("%w: name one", errNode)
}

// kill ends the processes of a node with SIGKILL and waits until they are gone.
func (b *breaker) kill(_ context.Context, req control.Request) ([]control.Node, error) {
	n, err := b.node(req.Node)
	if err != nil {
		return nil, err
	}
	was := b.describe(n)
	if req.Part != control.Agent && was.PeerPID == 0 || req.Part == control.Agent && was.AgentPID == 0 {
		return nil, fmt.Errorf("%s does not run: %w", n.Name(), errState)
	}
	b.unpause(n)
	switch req.Part {
	case control.Peer:
		was.AgentPID, err = 0, n.killPlanned(n.KillPeer)
	case control.Agent:
		// Its supervisor starts another at once.
		was.PeerPID, err = 0, n.SignalAgent(syscall.SIGKILL)
	default:
		err = n.killPlanned(n.Kill)
	}
	return []control.Node{was}, err
}

// restart starts a node that does not run, and stops one that does in order before.
func (b *breaker) restart(ctx context.Context, req control.Request) ([]control.Node, error) {
	n, err := b.node(req.Node)
	if err != nil {
		return nil, err
	}
	b.unpause(n)
	if _, err := n.PID(); err == nil {
		if err := n.killPlanned(func() error { return n.Stop(ctx) }); err != nil {
			return nil, err
		}
	}
	if err := n.Start(); err != nil {
		return nil, err
	}
	return []control.Node{b.describe(n)}, nil
}

// pause stops the processes of a node where they stand.
func (b *breaker) pause(_ context.Context, req control.Request) ([]control.Node, error) {
	n, err := b.node(req.Node)
	if err != nil {
		return nil, err
	}
	if _, paused := b.pauses[n.Name()]; paused {
		return nil, fmt.Errorf("%s is paused already: %w", n.Name(), errState)
	}
	if err := n.SignalPeer(syscall.SIGSTOP); err != nil {
		return nil, err
	}
	err = ignoreNotRunning(n.SignalAgent(syscall.SIGSTOP))
	b.pauses[n.Name()] = nil
	if req.For > 0 {
		b.pauses[n.Name()] = time.AfterFunc(req.For, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.unpause(n)
		})
	}
	return []control.Node{b.describe(n)}, err
}

// unpause lets a node go on. The caller holds b.mu.
func (b *breaker) unpause(n *Node) {
	timer, paused := b.pauses[n.Name()]
	if !paused {
		return
	}
	if timer != nil {
		timer.Stop()
	}
	delete(b.pauses, n.Name())
	// A process that has ended needs no signal.
	_, _ = n.SignalPeer(syscall.SIGCONT), n.SignalAgent(syscall.SIGCONT)
}

func (b *breaker) resume(_ context.Context, req control.Request) ([]control.Node, error) {
	nodes, err := b.nodes(req.Node)
	if err != nil {
		return nil, err
	}
	var out []control.Node
	for _, n := range nodes {
		if _, paused := b.pauses[n.Name()]; paused {
			b.unpause(n)
			out = append(out, b.describe(n))
		} else if req.Node != "" {
			return nil, fmt.Errorf("%s is not paused: %w", n.Name(), errState)
		}
	}
	return out, nil
}

// link changes what goes between nodes.
func (b *breaker) link(ctx context.Context, req control.Request) ([]control.Node, error) {
	from, err := b.node(req.Node)
	if err != nil {
		return nil, err
	}
	to, err := b.nodes(req.To)
	switch {
	case err != nil:
		return nil, err
	case req.To == req.Node:
		return nil, fmt.Errorf("%s has no link to itself: %w", req.Node, errState)
	case b.path == "":
		return nil, fmt.Errorf("the network of this cluster cannot be broken: %w", errState)
	}
	change := func(l *faults.Link) {
		if req.Cut != nil {
			l.Cut = *req.Cut
		}
		if req.Delay != nil {
			l.Delay = *req.Delay
		}
	}
	for _, other := range to {
		if other == from {
			continue
		}
		b.rules.Change(from.Name(), other.Name(), change)
		if !req.OneWay {
			b.rules.Change(other.Name(), from.Name(), change)
		}
	}
	return nil, b.apply(ctx)
}

// apply writes the rules and waits until the nodes follow them.
func (b *breaker) apply(ctx context.Context) error {
	if err := b.rules.Save(b.path); err != nil {
		return err
	}
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil
}

// heal makes everything whole: the network, paused nodes, nodes that do not run.
func (b *breaker) heal(ctx context.Context, _ control.Request) ([]control.Node, error) {
	var out []control.Node
	var errs []error
	if len(b.rules.Links) > 0 {
		b.rules.Links = nil
		errs = append(errs, b.apply(ctx))
	}
	for _, n := range b.cluster.Nodes() {
		_, paused := b.pauses[n.Name()]
		b.unpause(n)
		_, err := n.PID()
		if err != nil {
			errs = append(errs, n.Start())
		}
		if paused || err != nil {
			out = append(out, b.describe(n))
		}
	}
	return out, errors.Join(errs...)
}

// close ends all pauses: a process that stands cannot shut down.
func (b *breaker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range b.cluster.Nodes() {
		b.unpause(n)
	}
}
