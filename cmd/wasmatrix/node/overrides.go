package node

// Overrides are settings of the command line. They win over the environment and
// the configuration file; empty ones change nothing.
type Overrides struct {
	// Runtime is runtime.default.
	Runtime string
	// Accel is microvm.accel.
	Accel string
}

// The flags that carry them.
const (
	FlagRuntime = "runtime"
	FlagAccel   = "microvm-accel"
)

// The environment variables of the same settings.
const (
	EnvRuntime = "WASM_RUNTIME_BACKEND"
	EnvAccel   = "WASMATRIX_MICROVM_ACCEL"
)

// Apply writes o over c.
func (o Overrides) Apply(c *Config) {
	if o.Runtime != "" {
		c.Runtime.Default = o.Runtime
	}
	if o.Accel != "" {
		c.MicroVM.Accel = o.Accel
	}
}

// args pass o on to a process of the same node.
func (o Overrides) args() (out []string) {
	if o.Runtime != "" {
		out = append(out, "--"+FlagRuntime, o.Runtime)
	}
	if o.Accel != "" {
		out = append(out, "--"+FlagAccel, o.Accel)
	}
	return out
}
