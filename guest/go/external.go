package wasmatrix

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// External is an external provider as this instance may use it. The zero value
// is the only external provider that the instance was granted.
type External struct {
	// Provider is the provider's id; empty means the only one granted.
	Provider string
}

// Call calls an operation of the provider; input and output are in the
// operation's own form, at most 4 MiB. It needs provider:<id>:<operation>.
func (e External) Call(operation string, payload []byte) (output []byte, err error) {
	b := wire.AppendString(wire.AppendString(nil, 1, e.Provider), 2, operation)
	out, err := call(providerCall, wire.AppendBytes(b, 3, payload))
	if err != nil {
		return nil, err
	}
	err = wire.Fields(out, func(_ protowire.Number, v wire.Value) { output = v.Bytes })
	return output, err
}
