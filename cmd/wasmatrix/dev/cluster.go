package dev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxNodes bounds a development cluster: more peers than this only slow the quorum down.
const maxNodes = 9

// tailLines is how much of a node's log an error shows.
const tailLines = 15

// Cluster is a development cluster. Close it.
type Cluster struct {
	// ContextPath is the client context of a user who may do everything.
	ContextPath string

	opts     Options
	layout   *layout
	nodes    []*Node
	lifeline *os.File // writing end; nobody else holds it
	reading  *os.File
	lock     *os.File // holds the directory until all nodes have ended
	breaker  *breaker
	ended    chan *Node
}

// Create lays the cluster out in o.Dir, or opens what an earlier one left
// there, and starts nothing. It holds the directory until Close; ErrInUse when
// another cluster does.
func Create(o Options) (*Cluster, error) {
	if o.Nodes < 1 || o.Nodes > maxNodes {
		return nil, fmt.Errorf("%d nodes: want 1 to %d", o.Nodes, maxNodes)
	}
	if last := o.MetricsPort + o.Nodes - 1; o.MetricsPort < 0 || last > 65535 {
		return nil, fmt.Errorf("metrics ports %d to %d: want 1 to 65535, or --metrics-port 0 for none", o.MetricsPort, last)
	}
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
	if o.Expect == 0 {
		o.Expect = o.Nodes
	}
	if o.Providers == nil {
		o.Providers = defaultProviders()
	}
	// Before anything is written: another cluster's files are not to be touched.
	lock, err := lockDir(o.Dir)
	if err != nil {
		return nil, err
	}
	l, err := openLayout(o.Dir)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	reading, writing, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	c := &Cluster{opts: o, layout: l, lifeline: writing, reading: reading, lock: lock, ContextPath: filepath.Join(o.Dir, "context.yaml")}
	c.ended = make(chan *Node, 64)
	if c.breaker, err = newBreaker(c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	for range o.Nodes {
		if _, err := c.AddNode(); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

// defaultProviders are those of a development cluster, one of each type that
// needs nothing from outside.
func defaultProviders() []node.ProviderConfig {
	return []node.ProviderConfig{
		{ID: "kv", Type: "kv", Driver: "bbolt"},
		{ID: "bus", Type: "messaging", Driver: "embedded"},
		{ID: "web", Type: "http", Driver: "direct"},
	}
}

// AddNode lays out one more node and does not start it.
func (c *Cluster) AddNode() (*Node, error) {
	i := len(c.nodes) + 1
	cfg, path, err := c.layout.writeNode(c.opts, i)
	if err != nil {
		return nil, err
	}
	n := &Node{
		ended:  c.ended,
		Config: cfg, argv: []string{c.opts.Binary, "agent", "--config", path}, lifeline: c.reading,
		LogPath: filepath.Join(filepath.Dir(path), "node.log"),
	}
	if c.opts.Command != nil {
		n.argv = c.opts.Command(n.Name(), n.argv)
	}
	if err := c.breaker.admit(n, i); err != nil {
		return nil, err
	}
	c.nodes = append(c.nodes, n)
	return n, c.layout.writeContext(c.opts, c.Addresses(), c.ContextPath)
}

// Nodes returns the nodes in the order of their names.
func (c *Cluster) Nodes() []*Node { return c.nodes }

// Node returns the node of that name, or nil.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.nodes {
		if n.Name() == name {
			return n
		}
	}
	return nil
}

// Addresses returns the API addresses of all nodes.
func (c *Cluster) Addresses() []string {
	var out []string
	for _, n := range c.nodes {
		out = append(out, n.Config.APIAddress())
	}
	return out
}

// SaveContext writes the client context to another file too.
func (c *Cluster) SaveContext(path string) error {
	return c.layout.writeContext(c.opts, c.Addresses(), path)
}

// CheckPorts reports the first port that something else holds already, or that
// two nodes would share.
func (c *Cluster) CheckPorts() (err error) {
	var held []net.Listener
	defer func() {
		for _, l := range held {
			err = errors.Join(err, l.Close())
		}
	}()
	hold := func(n *Node, address, advice string) error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("port %s of %s is taken (%w); stop what uses it, or %s", address, n.Name(), err, advice)
		}
		held = append(held, l)
		return nil
	}
	for _, n := range c.nodes {
		for offset := range node.PortCount {
			address := net.JoinHostPort(n.Config.Bind.Address, strconv.Itoa(n.Config.Bind.PortBase+offset))
			if err := hold(n, address, "choose another --port-base"); err != nil {
				return err
			}
		}
		if address := n.Config.Telemetry.MetricsAddr; address != "off" {
			if err := hold(n, address, "choose another --metrics-port; --metrics-port 0 turns the metrics port off"); err != nil {
				return err
			}
		}
	}
	return nil
}

// Start starts all nodes at once.
func (c *Cluster) Start() error {
	for _, n := range c.nodes {
		if err := n.Start(); err != nil {
			return err
		}
	}
	return nil
}

// Client returns a client of the cluster with all rights; close it.
func (c *Cluster) Client() (*client.Client, error) {
	context, err := client.LoadContext(c.ContextPath)
	if err != nil {
		return nil, err
	}
	return client.FromContext(context)
}

// WaitReady blocks until there is a leader, every started node has a lease and
// every declared provider runs. A node that ends meanwhile is an error that
// shows the end of its log.
func (c *Cluster) WaitReady(ctx context.Context, cl *client.Client) (*pb.StatusResponse, error) {
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		status, err := c.readiness(ctx, cl)
		if err == nil {
			return status, nil
		}
		last = err
		for _, n := range c.nodes {
			select {
			case <-n.Exited():
				return nil, fmt.Errorf("%s ended while starting (%v); the end of its log %s:\n%s", n.Name(), n.cmd.ProcessState, n.LogPath, Tail(n.LogPath, tailLines))
			default:
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the cluster is not ready: %w", errors.Join(last, ctx.Err()))
		case <-tick.C:
		}
	}
}

func (c *Cluster) readiness(ctx context.Context, cl *client.Client) (*pb.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	status, err := cl.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return nil, err
	}
	want := uint32(0)
	for _, n := range c.nodes {
		if _, err := n.PID(); err == nil && n.Config.Node.Role != node.RoleServer {
			want++
		}
	}
	running := status.Providers["RUNNING"]
	switch {
	case status.LeaderId == "":
		return nil, errors.New("no leader yet")
	case status.NodesReady < want:
		return nil, fmt.Errorf("%d of %d nodes are ready", status.NodesReady, want)
	case int(running) < len(c.opts.Providers):
		return nil, fmt.Errorf("%d of %d providers run", running, len(c.opts.Providers))
	}
	return status, nil
}

// Ended returns a channel of nodes whose peer process ended by itself.
func (c *Cluster) Ended() <-chan *Node { return c.ended }

// Close shuts all nodes down together, peers and agents, and waits for them.
func (c *Cluster) Close() error {
	if c.breaker != nil {
		c.breaker.close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace+10*time.Second)
	defer cancel()
	errs := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for i, n := range c.nodes {
		wg.Go(func() { errs[i] = n.Stop(ctx) })
	}
	wg.Wait()
	return errors.Join(append(errs, c.lifeline.Close(), c.reading.Close(), c.lock.Close())...)
}

// RemoveContext removes the client context at path if it is this cluster's.
func (c *Cluster) RemoveContext(path string) error {
	found, err := client.LoadContext(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || found.TLSDir != filepath.Join(c.opts.Dir, "user") {
		return err
	}
	return os.Remove(path)
}
