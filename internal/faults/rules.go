package faults

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"time"
)

// Rules say which nodes there are and what is wrong between them.
type Rules struct {
	// Nodes are all nodes by name.
	Nodes map[string]Node `json:"nodes"`
	// Links are the directions between two nodes where something is wrong.
	Links []Link `json:"links"`
}

// Node says how a node's traffic is known.
type Node struct {
	// Source is the loopback address from which the node dials.
	Source string `json:"source"`
	// FirstPort and LastPort are the range in which the node listens.
	FirstPort int `json:"first_port"`
	LastPort  int `json:"last_port"`
}

// Link is what one node sends to another.
type Link struct {
	From string `json:"from"`
	To   string `json:"to"`
	// Cut holds back all of it: datagrams are lost, streams stand still until the
	// link is whole again, new connections wait.
	Cut bool `json:"cut,omitempty"`
	// Delay is by how much all of it comes later.
	Delay time.Duration `json:"delay,omitempty"`
}

// Link returns the state of the link between two nodes.
func (r *Rules) Link(from, to string) Link {
	i := slices.IndexFunc(r.Links, func(l Link) bool { return l.From == from && l.To == to })
	if i < 0 {
		return Link{From: from, To: to}
	}
	return r.Links[i]
}

// Change changes one direction between two nodes.
func (r *Rules) Change(from, to string, f func(*Link)) {
	l := r.Link(from, to)
	r.Links = slices.DeleteFunc(r.Links, func(old Link) bool { return old.From == from && old.To == to })
	f(&l)
	if l.Cut || l.Delay > 0 {
		r.Links = append(r.Links, l)
	}
}

// listens returns the node that listens on an address, or "".
func (r *Rules) listens(address string) string {
	_, text, err := net.SplitHostPort(address)
	port, errPort := strconv.Atoi(text)
	if err != nil || errPort != nil {
		return ""
	}
	for name, n := range r.Nodes {
		if port >= n.FirstPort && port <= n.LastPort {
			return name
		}
	}
	return ""
}

// dialled returns the node that dials from an address, or "".
func (r *Rules) dialled(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	for name, n := range r.Nodes {
		if n.Source == host {
			return name
		}
	}
	return ""
}

// Save replaces the file at path as a whole.
func (r *Rules) Save(path string) error {
	raw, err := json.Marshal(r)
	if err == nil {
		err = os.WriteFile(path+".new", raw, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("save the rules of the network: %w", err)
	}
	return nil
}

// errRules is returned for a file that holds no rules.
var errRules = errors.New("bad rules of the network")

func parse(raw []byte) (*Rules, error) {
	r := &Rules{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("%w: %w", errRules, err)
	}
	return r, nil
}
