package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func load(t *testing.T, text string, env map[string]string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(path, func(name string) string { return env[name] })
}

func TestConfigurationIsLaidOverTheDefaults(t *testing.T) {
	c, err := load(t, `
node: {name: n1, role: server, labels: {zone: a}}
data_dir: /data
bind: {address: 10.0.0.1, port_base: 8400}
join: {peers: ["10.0.0.2:8403"], bootstrap_expect: 3}
raft: {heartbeat_timeout: 300ms}
`, map[string]string{"METRICS_ADDR": "127.0.0.1:9999", "WASMATRIX_NODE_NAME": "n9", "WASM_RUNTIME_BACKEND": "wazero"})
	if err == nil {
		err = c.Complete()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ what, got, want string }{
		{"the environment wins over the file", c.Node.Name, "n9"},
		{"an environment variable without a prefix", c.Telemetry.MetricsAddr, "127.0.0.1:9999"},
		{"another spelling of the runtime", c.Runtime.Default, "wasm"},
		{"a default stays", c.Limits.Memory, "4GiB"},
		{"the address for others", c.APIAddress(), "10.0.0.1:8400"},
		{"the agent's port", c.AgentAddress(), "10.0.0.1:8404"},
		{"API peers follow from gossip peers", strings.Join(c.Join.APIPeers, " "), "10.0.0.2:8400 10.0.0.1:8400"},
		{"certificates lie with the data", c.TLS.Dir, "/data/tls"},
		{"a timer", c.Raft.HeartbeatTimeout.String(), (300 * time.Millisecond).String()},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %q, want %q", tc.what, tc.got, tc.want)
		}
	}
}

func TestBadConfigurationSaysWhatIsWrong(t *testing.T) {
	const good = "node: {name: n1}\ndata_dir: /data\njoin: {bootstrap_expect: 1}\n"
	for _, tc := range []struct {
		name, text string
		env        map[string]string
		says       string
	}{
		{"unknown key", good + "nodes: 3\n", nil, "nodes"},
		{"wrong type", good + "bind: {port_base: many}\n", nil, "port_base"},
		{"no YAML", "node: [", nil, "config.yaml"},
		{"bad name", "node: {name: N1}\ndata_dir: /d\njoin: {bootstrap_expect: 1}\n", nil, "node.name"},
		{"bad role", good + "", map[string]string{"WASMATRIX_NODE_ROLE": "boss"}, "node.role"},
		{"no data directory", "node: {name: n1}\njoin: {bootstrap_expect: 1}\n", nil, "data_dir"},
		{"nobody to join", "node: {name: n1}\ndata_dir: /d\n", nil, "bootstrap_expect"},
		{"a worker without peers", "node: {name: n1, role: worker}\ndata_dir: /d\n", nil, "api_peers"},
		{"unreachable address", good + "bind: {address: 0.0.0.0}\n", nil, "bind.advertise"},
		{"low port", good + "bind: {port_base: 80}\n", nil, "port_base"},
		{"bad memory", good + "limits: {memory: lots}\n", nil, "limits.memory"},
		{"bad environment", good, map[string]string{"WASMATRIX_PORT_BASE": "x"}, "WASMATRIX_PORT_BASE"},
		{"runtime of another build", good, map[string]string{"WASM_RUNTIME_BACKEND": "jvm"}, "runtime.default"},
		{"unknown accelerator", good, map[string]string{"WASMATRIX_MICROVM_ACCEL": "warp"}, "microvm.accel"},
		{"microvm by default without virtual machines", good + "microvm: {accel: off}\n", map[string]string{"WASM_RUNTIME_BACKEND": "micro-kvm"}, "microvm.accel"},
		{"hasty timers", good + "raft: {heartbeat_timeout: 1ms}\n", nil, "heartbeat_timeout"},
		{"bad log format", good + "telemetry: {log: {format: xml}}\n", nil, "telemetry.log.format"},
		{"a gossip key that is no base64", "node: {name: n1}\ndata_dir: /d\njoin: {bootstrap_expect: 1, gossip_key: \"***\"}\n", nil, "join.gossip_key"},
		{"a gossip key of a wrong length", "node: {name: n1}\ndata_dir: /d\njoin: {bootstrap_expect: 1, gossip_key: c2hvcnQ=}\n", nil, "5 bytes"},
		{"a provider without an id", good + "providers: [{type: kv}]\n", nil, "providers[0].id"},
		{"a provider of an unknown type", good + "providers: [{id: kv, type: kv}, {id: q, type: queue}]\n", nil, "providers[1].type \"queue\": want kv, http, messaging, external"},
		{"a provider twice", good + "providers: [{id: kv, type: kv}, {id: kv, type: http}]\n", nil, "providers[1].id \"kv\""},
		{"bad level", good + "telemetry: {log: {level: loud}}\n", nil, "telemetry.log.level"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := load(t, tc.text, tc.env)
			if err == nil {
				err = c.Complete()
			}
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("error %v does not name %q", err, tc.says)
			}
		})
	}
}
