package node

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/wasmatrix/wasmatrix/quantity"
	"github.com/wasmatrix/wasmatrix/runtime/microvm/survey"
)

// Offsets of a node's ports from its port base.
const (
	portAPI       = 0 // gRPC of the peer
	portHTTP      = 1 // health and metrics of the peer
	portRaft      = 2
	portGossip    = 3
	portAgent     = 4 // gRPC of the agent
	portAgentHTTP = 5 // health and metrics of the agent
)

// PortCount is the number of consecutive ports that a node uses.
const PortCount = 6

// Roles of a node.
const (
	RoleServer = "server"
	RoleWorker = "worker"
	RoleBoth   = "both"
	// RoleStandalone is an agent without a control plane; it is set by a flag, not in the file.
	RoleStandalone = "standalone"
)

// Config is a node's configuration file. Unknown keys are errors.
type Config struct {
	// Cluster is the cluster's name; it must equal the one in the certificates.
	Cluster string `yaml:"cluster"`
	// Node says what this node is.
	Node Self `yaml:"node"`
	// DataDir is where the node keeps everything.
	DataDir string `yaml:"data_dir"`
	// Bind says where the node listens.
	Bind BindConfig `yaml:"bind"`
	// Join says how a peer finds the others.
	Join JoinConfig `yaml:"join"`
	// TLS says where the node's certificate is.
	TLS TLSConfig `yaml:"tls"`
	// Raft holds the timers of the control plane.
	Raft RaftConfig `yaml:"raft"`
	// Limits is what the node offers to instances.
	Limits LimitsConfig `yaml:"limits"`
	// Runtime says how guests are executed.
	Runtime RuntimeConfig `yaml:"runtime"`
	// MicroVM says how guests are executed in virtual machines.
	MicroVM MicroVMConfig `yaml:"microvm"`
	// Providers are registered by this node unless they exist, and run on it alone;
	// those with several replicas are registered for the cluster instead.
	Providers []ProviderConfig `yaml:"providers"`
	// Telemetry says what the node tells about itself.
	Telemetry TelemetryConfig `yaml:"telemetry"`
}

// Self says what a node is.
type Self struct {
	// Name is the node's id; it must equal the one in its certificate.
	Name string `yaml:"name"`
	// Role is "server", "worker" or "both".
	Role string `yaml:"role"`
	// Labels are for placement.
	Labels map[string]string `yaml:"labels"`
}

// BindConfig says where a node listens.
type BindConfig struct {
	// Address is the IP address to listen on; default 127.0.0.1.
	Address string `yaml:"address"`
	// Advertise is the address others use; default Address.
	Advertise string `yaml:"advertise"`
	// PortBase is the first of the node's ports; default 7400.
	PortBase int `yaml:"port_base"`
}

// JoinConfig says how a peer finds the others.
type JoinConfig struct {
	// Peers are gossip addresses (host:port) of any peers.
	Peers []string `yaml:"peers"`
	// BootstrapExpect is the number of peers of a new cluster; 0 joins an existing one.
	BootstrapExpect int `yaml:"bootstrap_expect"`
	// APIPeers are API addresses (host:port) of peers, for a worker; default: derived from Peers.
	APIPeers []string `yaml:"api_peers"`
	// GossipKey encrypts gossip: 16, 24 or 32 bytes in base64; empty means none.
	GossipKey string `yaml:"gossip_key"`
}

// TLSConfig says where a node's certificate is.
type TLSConfig struct {
	// Dir holds node.crt, node.key and ca.crt; default DataDir/tls.
	Dir string `yaml:"dir"`
}

// RaftConfig holds the timers of the control plane.
type RaftConfig struct {
	// HeartbeatTimeout is how long a follower waits for its leader before it
	// asks for votes, and the election timeout; default 250ms. Below 100ms
	// leaders flap.
	HeartbeatTimeout time.Duration `yaml:"heartbeat_timeout"`
	// SnapshotThreshold is the number of log entries between snapshots; default 8192.
	SnapshotThreshold uint64 `yaml:"snapshot_threshold"`
	// SnapshotInterval is how often that number is looked at, up to doubled at random; default 30s.
	SnapshotInterval time.Duration `yaml:"snapshot_interval"`
	// TrailingLogs is the number of log entries kept behind a snapshot for peers
	// that lag; one that lags more gets the snapshot. Default 10240.
	TrailingLogs uint64 `yaml:"trailing_logs"`
	// StabilizationTime is how long a new peer must have been in touch with the
	// leader before it votes; default 2s.
	StabilizationTime time.Duration `yaml:"stabilization_time"`
	// DeadPeerAfter is how long a peer must be gone from gossip before the
	// leader removes it; default 24h, 0 means never.
	DeadPeerAfter *time.Duration `yaml:"dead_peer_after"`
}

// LimitsConfig is what a node offers to instances.
type LimitsConfig struct {
	// Instances is the largest number of instances; default 1000.
	Instances uint32 `yaml:"instances"`
	// Memory is the largest sum of their memory limits, as "4GiB"; default 4GiB.
	Memory string `yaml:"memory"`
}

// RuntimeConfig says how guests are executed.
type RuntimeConfig struct {
	// Default is the runtime of workloads that name none: "wasm" (the default) or
	// "microvm"; "wazero" and "micro-kvm" mean the same.
	Default string `yaml:"default"`
}

// ProviderConfig declares a provider.
type ProviderConfig struct {
	// ID is the provider's id.
	ID string `yaml:"id"`
	// Type is "kv", "http", "messaging" or "external".
	Type string `yaml:"type"`
	// Driver is the type's driver; empty means its default.
	Driver string `yaml:"driver"`
	// Config holds the driver's settings.
	Config map[string]string `yaml:"config"`
}

// TelemetryConfig says what a node tells about itself.
type TelemetryConfig struct {
	// Log configures the log on standard error.
	Log LogConfig `yaml:"log"`
	// MetricsAddr is where /metrics is served besides the HTTP port; default 127.0.0.1:9100, "off" for none.
	MetricsAddr string `yaml:"metrics_addr"`
}

// LogConfig configures the log.
type LogConfig struct {
	// Level is "debug", "info", "warn" or "error"; default "info".
	Level string `yaml:"level"`
	// Format is "text" or "json"; default "text".
	Format string `yaml:"format"`
}

// Default returns the configuration that a file, the environment and flags are laid over.
func Default() Config {
	day := 24 * time.Hour
	return Config{
		Cluster: "wasmatrix",
		Node:    Self{Role: RoleBoth},
		Bind:    BindConfig{Address: "127.0.0.1", PortBase: 7400},
		Raft: RaftConfig{
			HeartbeatTimeout: 250 * time.Millisecond, StabilizationTime: 2 * time.Second, SnapshotThreshold: 8192,
			SnapshotInterval: 30 * time.Second, TrailingLogs: 10240, DeadPeerAfter: &day,
		},
		Limits:    LimitsConfig{Instances: 1000, Memory: "4GiB"},
		Runtime:   RuntimeConfig{Default: runtimeWasm},
		MicroVM:   MicroVMConfig{Accel: survey.Auto},
		Telemetry: TelemetryConfig{Log: LogConfig{Level: "info", Format: "text"}, MetricsAddr: "127.0.0.1:9100"},
	}
}

// LoadConfig reads the configuration file at path over the defaults and lays
// the environment over it. An error names the line and the key.
func LoadConfig(path string, getenv func(string) string) (Config, error) {
	cfg := Default()
	if path != "" {
		raw, err := os.ReadFile(path)
		if err != nil {
			return cfg, fmt.Errorf("read the configuration: %w", err)
		}
		if err := yaml.UnmarshalWithOptions(raw, &cfg, yaml.Strict()); err != nil {
			return cfg, fmt.Errorf("%s: %s", path, strings.TrimSpace(yaml.FormatError(err, false, true)))
		}
	}
	if err := cfg.overlayEnv(getenv); err != nil {
		return cfg, err
	}
	return cfg, nil
}

// overlayEnv lays the WASMATRIX_* variables over the configuration.
func (c *Config) overlayEnv(getenv func(string) string) error {
	for name, set := range map[string]func(string) error{
		"WASMATRIX_NODE_NAME":    setString(&c.Node.Name),
		"WASMATRIX_NODE_ROLE":    setString(&c.Node.Role),
		"WASMATRIX_DATA_DIR":     setString(&c.DataDir),
		"WASMATRIX_BIND_ADDRESS": setString(&c.Bind.Address),
		"WASMATRIX_ADVERTISE":    setString(&c.Bind.Advertise),
		"WASMATRIX_LOG_LEVEL":    setString(&c.Telemetry.Log.Level),
		"WASMATRIX_JOIN":         setList(&c.Join.Peers),
		"WASMATRIX_PORT_BASE": func(v string) (err error) {
			c.Bind.PortBase, err = strconv.Atoi(v)
			return err
		},
		EnvAccel:       setString(&c.MicroVM.Accel),
		"METRICS_ADDR": setString(&c.Telemetry.MetricsAddr),
		EnvRuntime:     setString(&c.Runtime.Default),
	} {
		if v := getenv(name); v != "" {
			if err := set(v); err != nil {
				return fmt.Errorf("environment variable %s=%q: %w", name, v, err)
			}
		}
	}
	return nil
}

func setString(p *string) func(string) error {
	return func(v string) error { *p = v; return nil }
}

func setList(p *[]string) func(string) error {
	return func(v string) error { *p = strings.Split(v, ","); return nil }
}

var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Complete fills in what follows from other settings and checks the whole. All
// problems are reported at once.
func (c *Config) Complete() error {
	if c.Bind.Advertise == "" {
		c.Bind.Advertise = c.Bind.Address
	}
	if c.TLS.Dir == "" {
		c.TLS.Dir = filepath.Join(c.DataDir, "tls")
	}
	if len(c.Join.APIPeers) == 0 {
		c.Join.APIPeers = c.derivedAPIPeers()
	}
	c.Runtime.Default = runtimeName(c.Runtime.Default)
	var problems []error
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if !nodeName.MatchString(c.Node.Name) {
		wrong("node.name %q: want 1 to 63 lower-case letters, digits and dashes", c.Node.Name)
	}
	if !slices.Contains([]string{RoleServer, RoleWorker, RoleBoth, RoleStandalone}, c.Node.Role) {
		wrong("node.role %q: want server, worker or both", c.Node.Role)
	}
	if c.DataDir == "" {
		wrong("data_dir is empty: name a directory for this node's data")
	}
	if net.ParseIP(c.Bind.Address) == nil {
		wrong("bind.address %q: want an IP address", c.Bind.Address)
	}
	if ip := net.ParseIP(c.Bind.Advertise); ip != nil && ip.IsUnspecified() {
		wrong("bind.advertise %q: others cannot reach this; name this machine's own address", c.Bind.Advertise)
	}
	if c.Bind.PortBase < 1024 || c.Bind.PortBase > 65000 {
		wrong("bind.port_base %d: want 1024 to 65000", c.Bind.PortBase)
	}
	if _, err := quantity.ParseBytes(c.Limits.Memory); err != nil {
		wrong("limits.memory: %w", err)
	}
	if c.Raft.HeartbeatTimeout < 50*time.Millisecond {
		wrong("raft.heartbeat_timeout %s: want at least 50ms", c.Raft.HeartbeatTimeout)
	}
	if c.Raft.StabilizationTime < c.Raft.HeartbeatTimeout {
		wrong("raft.stabilization_time %s: want at least raft.heartbeat_timeout, %s", c.Raft.StabilizationTime, c.Raft.HeartbeatTimeout)
	}
	if c.Raft.SnapshotInterval < 5*time.Millisecond {
		wrong("raft.snapshot_interval %s: want at least 5ms", c.Raft.SnapshotInterval)
	}
	if c.Node.Role == RoleWorker && len(c.Join.APIPeers) == 0 {
		wrong("join.api_peers is empty: a worker needs the API address of at least one peer")
	}
	if n := c.Join.BootstrapExpect; n < 0 || n > 9 {
		wrong("join.bootstrap_expect %d: want 0 to 9", n)
	}
	if c.isPeer() && c.Join.BootstrapExpect == 0 && len(c.Join.Peers) == 0 {
		wrong("join: neither bootstrap_expect (a new cluster) nor peers (an existing one) is set")
	}
	if c.Runtime.Default != runtimeWasm && c.Runtime.Default != runtimeMicroVM {
		wrong("runtime.default %q: want wasm or microvm", c.Runtime.Default)
	}
	if err := c.MicroVM.Check(); err != nil {
		wrong("%w", err)
	}
	if c.Runtime.Default == runtimeMicroVM && c.MicroVM.Accel == accelOff {
		wrong("runtime.default is microvm, but microvm.accel is off")
	}
	if l := c.Telemetry.Log.Level; l != "debug" && l != "info" && l != "warn" && l != "error" {
		wrong("telemetry.log.level %q: want debug, info, warn or error", l)
	}
	if f := c.Telemetry.Log.Format; f != "text" && f != "json" {
		wrong("telemetry.log.format %q: want text or json", f)
	}
	if _, err := c.Join.gossipKey(); err != nil {
		wrong("join.gossip_key: %w", err)
	}
	problems = append(problems, c.checkProviders()...)
	return errors.Join(problems...)
}

// providerTypes are those that an agent can host.
var providerTypes = []string{"kv", "http", "messaging", "external"}

func (c *Config) checkProviders() (problems []error) {
	seen := map[string]bool{}
	for i, p := range c.Providers {
		wrong := func(format string, args ...any) {
			problems = append(problems, fmt.Errorf("providers[%d].%s", i, fmt.Sprintf(format, args...)))
		}
		if !nodeName.MatchString(p.ID) {
			wrong("id %q: want 1 to 63 lower-case letters, digits and dashes", p.ID)
		}
		if seen[p.ID] {
			wrong("id %q: it is there twice", p.ID)
		}
		seen[p.ID] = true
		if !slices.Contains(providerTypes, p.Type) {
			wrong("type %q: want %s", p.Type, strings.Join(providerTypes, ", "))
		}
	}
	return problems
}

// gossipKey decodes the key; nil when there is none. The error does not show it.
func (j JoinConfig) gossipKey() ([]byte, error) {
	if j.GossipKey == "" {
		return nil, nil
	}
	key, err := base64.StdEncoding.DecodeString(j.GossipKey)
	if err != nil {
		return nil, fmt.Errorf("want base64: %w", err)
	}
	if n := len(key); n != 16 && n != 24 && n != 32 {
		return nil, fmt.Errorf("it has %d bytes: want 16, 24 or 32, as from `openssl rand -base64 32`", n)
	}
	return key, nil
}

// derivedAPIPeers turns gossip addresses into API addresses by the offsets of
// the ports.
func (c *Config) derivedAPIPeers() []string {
	var out []string
	for _, p := range c.Join.Peers {
		host, port, err := net.SplitHostPort(p)
		n, errPort := strconv.Atoi(port)
		if err == nil && errPort == nil {
			out = append(out, net.JoinHostPort(host, strconv.Itoa(n-portGossip+portAPI)))
		}
	}
	if c.isPeer() {
		out = append(out, c.advertised(portAPI))
	}
	return out
}

func (c *Config) isPeer() bool { return c.Node.Role == RoleServer || c.Node.Role == RoleBoth }

func (c *Config) bound(offset int) string {
	return net.JoinHostPort(c.Bind.Address, strconv.Itoa(c.Bind.PortBase+offset))
}

func (c *Config) advertised(offset int) string {
	host := c.Bind.Advertise
	if host == "" {
		host = c.Bind.Address
	}
	return net.JoinHostPort(host, strconv.Itoa(c.Bind.PortBase+offset))
}

// APIAddress returns the address that clients use to reach the peer of this node.
func (c *Config) APIAddress() string { return c.advertised(portAPI) }

// AgentAddress returns the address of this node's agent.
func (c *Config) AgentAddress() string { return c.advertised(portAgent) }

// HTTPAddress returns the address of the peer's health and metrics.
func (c *Config) HTTPAddress() string { return c.advertised(portHTTP) }

// AgentHTTPAddress returns the address of the agent's health and metrics.
func (c *Config) AgentHTTPAddress() string { return c.advertised(portAgentHTTP) }

// GossipAddress returns the address of the peer's gossip.
func (c *Config) GossipAddress() string { return c.advertised(portGossip) }

func platform() string { return goruntime.GOOS + "/" + goruntime.GOARCH }
