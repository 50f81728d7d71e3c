package dev

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	"github.com/wasmatrix/wasmatrix/identity"
)

// portStride is the distance between the port bases of two nodes.
const portStride = 100

// loopback is where the nodes of a cluster on one machine listen.
const loopback = "127.0.0.1"

// certificateLife is how long a development cluster's certificates last.
const certificateLife = 365 * 24 * time.Hour

// Options say what a development cluster is like.
type Options struct {
	// Nodes is how many nodes start; 1 to 9.
	Nodes int
	// Dir holds everything of the cluster.
	Dir string
	// Binary is the wasmatrix binary that the nodes run.
	Binary string
	// PortBase is the port base of the first node; the others follow 100 apart.
	PortBase int
	// MetricsPort is the port of the first node's /metrics; the others follow. 0 turns them off.
	MetricsPort int
	// LogLevel is that of the nodes; default "info".
	LogLevel string
	// Expect is the number of peers of the bootstrap; default Nodes.
	Expect int
	// Providers are declared by the first node; default "kv" on bbolt, "bus" for messages and "web" for HTTP.
	Providers []node.ProviderConfig
	// Breakable lets ServeControl break the network between the nodes.
	Breakable bool
	// Address returns the address that node i (from 1) binds; default 127.0.0.1 for all.
	Address func(i int) string
	// Adjust changes the configuration of node i before it is written; nil changes nothing.
	Adjust func(i int, cfg *node.Config)
	// Command returns the command line that runs argv for a node, such as in a
	// network namespace of its own; it must replace itself by argv. Nil runs argv.
	Command func(name string, argv []string) []string
}

func (o Options) address(i int) string {
	if o.Address == nil {
		return loopback
	}
	return o.Address(i)
}

// layout is what a cluster's directory holds besides the nodes' data.
type layout struct {
	ca        *identity.CA
	gossipKey string
}

// openLayout reads or makes the CA and the gossip key of the cluster in dir.
func openLayout(dir string) (*layout, error) {
	if err := os.MkdirAll(filepath.Join(dir, "nodes"), 0o700); err != nil {
		return nil, fmt.Errorf("make the cluster's directory: %w", err)
	}
	caDir, keyPath := filepath.Join(dir, "ca"), filepath.Join(dir, "gossip.key")
	ca, err := identity.LoadCA(caDir)
	if errors.Is(err, os.ErrNotExist) {
		if ca, err = identity.NewCA("dev"); err == nil {
			err = ca.Save(caDir)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the throw-away CA: %w", err)
	}
	key, err := os.ReadFile(keyPath)
	if errors.Is(err, os.ErrNotExist) {
		raw := make([]byte, 32)
		if _, err := rand.Read(raw); err != nil {
			return nil, err
		}
		key = []byte(base64.StdEncoding.EncodeToString(raw))
		err = os.WriteFile(keyPath, key, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("open the gossip key: %w", err)
	}
	return &layout{ca: ca, gossipKey: string(key)}, nil
}

// writeNode makes or completes the directory of node i (from 1) and returns its configuration.
func (l *layout) writeNode(o Options, i int) (node.Config, string, error) {
	cfg := node.Default()
	cfg.Cluster = "dev"
	cfg.Node.Name = "n" + strconv.Itoa(i)
	dir := filepath.Join(o.Dir, "nodes", cfg.Node.Name)
	cfg.DataDir = filepath.Join(dir, "data")
	cfg.TLS.Dir = filepath.Join(dir, "tls")
	cfg.Node.Labels = map[string]string{"node": cfg.Node.Name}
	cfg.Bind.Address = o.address(i)
	cfg.Bind.PortBase = o.PortBase + (i-1)*portStride
	cfg.Join.GossipKey = l.gossipKey
	cfg.Telemetry.Log.Level = o.LogLevel
	cfg.Telemetry.MetricsAddr = "off"
	if o.MetricsPort != 0 {
		cfg.Telemetry.MetricsAddr = net.JoinHostPort("127.0.0.1", strconv.Itoa(o.MetricsPort+i-1))
	}
	if i <= o.Expect {
		cfg.Join.BootstrapExpect = o.Expect
	}
	for j := 1; j <= max(o.Nodes, o.Expect); j++ {
		if j != i {
			cfg.Join.Peers = append(cfg.Join.Peers, gossipAddress(o, j))
		}
	}
	if i == 1 {
		cfg.Providers = o.Providers
	}
	if o.Adjust != nil {
		o.Adjust(i, &cfg)
	}
	if _, err := identity.Load(cfg.TLS.Dir); err != nil {
		subject := identity.Subject{Cluster: "dev", Kind: identity.Node, Name: cfg.Node.Name, Role: identity.RoleBoth}
		if err := l.issue(subject, cfg.TLS.Dir); err != nil {
			return cfg, "", err
		}
	}
	raw, err := yaml.Marshal(cfg)
	if err != nil {
		return cfg, "", fmt.Errorf("encode the configuration of %s: %w", cfg.Node.Name, err)
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return cfg, "", fmt.Errorf("write the configuration of %s: %w", cfg.Node.Name, err)
	}
	err = cfg.Complete()
	return cfg, path, err
}

// writeContext makes the certificate of a user who may do everything and the
// context file with which the CLI finds the cluster.
func (l *layout) writeContext(o Options, addresses []string, path string) error {
	dir := filepath.Join(o.Dir, "user")
	if _, err := identity.Load(dir); err != nil {
		if err := l.issue(identity.Subject{Cluster: "dev", Kind: identity.User, Name: "dev", Role: identity.RoleAdmin}, dir); err != nil {
			return err
		}
	}
	return client.SaveContext(path, client.Context{Name: "dev", Cluster: "dev", Addresses: addresses, TLSDir: dir})
}

func (l *layout) issue(s identity.Subject, dir string) error {
	bundle, err := l.ca.Issue(s, certificateLife)
	if err == nil {
		err = bundle.Save(dir)
	}
	if err != nil {
		return fmt.Errorf("issue the certificate of %s: %w", s, err)
	}
	return nil
}

func gossipAddress(o Options, i int) string {
	cfg := node.Default()
	cfg.Bind.Address = o.address(i)
	cfg.Bind.PortBase = o.PortBase + (i-1)*portStride
	return cfg.GossipAddress()
}
