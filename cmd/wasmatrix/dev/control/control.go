// Package control is how a command line tells a running `wasmatrix dev` to break
// its cluster: small JSON requests over a unix socket that only its owner may
// open. It imports nothing of ours, so that the client side stays small.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Parts of a node that a request is about.
const (
	// Both is the peer and the agent.
	Both = ""
	// Peer is the control-plane peer alone.
	Peer = "peer"
	// Agent is the agent alone.
	Agent = "agent"
)

// Paths of the requests.
const (
	PathState   = "/state"
	PathKill    = "/kill"
	PathRestart = "/restart"
	PathPause   = "/pause"
	PathResume  = "/resume"
	PathLink    = "/link"
	PathHeal    = "/heal"
)

// Request asks for a fault, or for its end.
type Request struct {
	// Node is the node it is about; empty means all, where that makes sense.
	Node string `json:"node,omitempty"`
	// Part is Both, Peer or Agent.
	Part string `json:"part,omitempty"`
	// For is how long a pause lasts; 0 means until it is resumed.
	For time.Duration `json:"for,omitempty"`
	// To is the other node of a link; empty means every other node.
	To string `json:"to,omitempty"`
	// OneWay changes only what Node sends.
	OneWay bool `json:"one_way,omitempty"`
	// Cut cuts the link; nil leaves it.
	Cut *bool `json:"cut,omitempty"`
	// Delay delays what goes over the link; nil leaves it.
	Delay *time.Duration `json:"delay,omitempty"`
}

// State is what a development cluster is like.
type State struct {
	// Nodes are all nodes, in the order of their names.
	Nodes []Node `json:"nodes"`
	// Links are the directions between nodes where something is wrong.
	Links []Link `json:"links,omitempty"`
	// Began and Done are when the request was taken up, and when it was done.
	Began time.Time `json:"began"`
	Done  time.Time `json:"done"`
	// Changed are the nodes that the request changed, with the processes they had then.
	Changed []Node `json:"changed,omitempty"`
}

// Node is one node.
type Node struct {
	Name string `json:"name"`
	// PeerPID and AgentPID are process ids; 0 for one that does not run.
	PeerPID  int  `json:"peer_pid"`
	AgentPID int  `json:"agent_pid"`
	Paused   bool `json:"paused,omitempty"`
	// APIAddress is host:port of the node's API.
	APIAddress string `json:"api_address"`
}

// Link is what one node sends to another.
type Link struct {
	From  string        `json:"from"`
	To    string        `json:"to"`
	Cut   bool          `json:"cut,omitempty"`
	Delay time.Duration `json:"delay,omitempty"`
}

// ErrNotDev is returned where no development cluster can be reached.
var ErrNotDev = errors.New("not a running development cluster")

// addressFile holds the path of the socket, in a cluster's directory. The path of
// a socket must be short, which that of a directory need not be.
const addressFile = "control"

// longestSocket is the longest path of a unix socket that all systems take.
const longestSocket = 100

// Listen opens the socket of the cluster in dir. The caller closes it and calls remove.
func Listen(dir string) (l net.Listener, remove func() error, err error) {
	path, own := filepath.Join(dir, "control.sock"), ""
	if len(path) > longestSocket {
		if own, err = os.MkdirTemp("", "wasmatrix-control-"); err != nil {
			return nil, nil, fmt.Errorf("open the control socket: %w", err)
		}
		path = filepath.Join(own, "sock")
	}
	remove = func() error {
		err := errors.Join(os.RemoveAll(path), os.RemoveAll(filepath.Join(dir, addressFile)))
		if own != "" {
			err = errors.Join(err, os.RemoveAll(own))
		}
		return err
	}
	// The caller holds the directory: what is there was left behind.
	if err := os.RemoveAll(path); err != nil {
		return nil, nil, fmt.Errorf("open the control socket: %w", err)
	}
	if l, err = net.Listen("unix", path); err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, addressFile), []byte(path), 0o600)
	}
	if err != nil {
		if l != nil {
			_ = l.Close()
		}
		return nil, nil, errors.Join(fmt.Errorf("open the control socket: %w", err), remove())
	}
	return l, remove, nil
}

// Client talks to one running development cluster.
type Client struct {
	http *http.Client
	dir  string
}

// Open finds the development cluster in dir; ErrNotDev when none runs there.
func Open(dir string) (*Client, error) {
	raw, err := os.ReadFile(filepath.Join(dir, addressFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotDev, err)
	}
	path := strings.TrimSpace(string(raw))
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	return &Client{http: &http.Client{Transport: transport}, dir: dir}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do makes a request and returns how the cluster is after it.
func (c *Client) Do(ctx context.Context, path string, req Request) (*State, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	call, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://dev"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(call)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: nothing answers for %s: %w", ErrNotDev, c.dir, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read the answer of the development cluster: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &Refusal{Status: resp.StatusCode, Reason: strings.TrimSpace(string(raw))}
	}
	out := &State{}
	if err := json.Unmarshal(raw, out); err != nil {
		return nil, fmt.Errorf("read the answer of the development cluster: %w", err)
	}
	return out, nil
}

// Refusal is why a development cluster did not do what was asked.
type Refusal struct {
	// Status is an HTTP status: 404 for an unknown node, 409 for one in another
	// state, 500 for what went wrong.
	Status int
	Reason string
}

// Error returns the reason.
func (r *Refusal) Error() string { return r.Reason }
