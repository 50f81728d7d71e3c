package node

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/wasmatrix/wasmatrix/identity"
	"github.com/wasmatrix/wasmatrix/internal/faults"
)

// faultsVariable names the environment variable that holds the path of the rules
// by which a development cluster breaks its network.
const faultsVariable = "WASMATRIX_DEV_FAULTS"

// FaultsEnv returns the environment entry with which a node's network can be
// broken by the rules at path.
func FaultsEnv(path string) string { return faultsVariable + "=" + path }

// errFaults is returned when a network that can be broken is asked for where it must not be.
var errFaults = errors.New("only the nodes of a development cluster can have their network broken")

// openNetwork returns what breaks this node's network, and the identity that makes
// its connections through that; nil for any node but one of a development cluster.
func openNetwork(cfg Config, id *identity.Identity, log *slog.Logger) (*faults.Injector, *identity.Identity, error) {
	path := os.Getenv(faultsVariable)
	if path == "" {
		return nil, id, nil
	}
	// Three signs of a development cluster, of which an environment variable that
	// was left over gives one.
	if ip := net.ParseIP(cfg.Bind.Address); os.Getenv(lifelineVariable) == "" || cfg.Cluster != DevCluster || ip == nil || !ip.IsLoopback() {
		return nil, nil, fmt.Errorf("environment variable %s: %w", faultsVariable, errFaults)
	}
	in, err := faults.Open(path, cfg.Node.Name, log)
	if err != nil {
		return nil, nil, err
	}
	return in, id.Over(in), nil
}

// DevCluster is the name of a development cluster.
const DevCluster = "dev"
