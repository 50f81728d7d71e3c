package wasmatrix

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Context says who this guest is and what it works on.
type Context struct {
	// InstanceID is the instance's id.
	InstanceID string
	// InstanceName is the workload's name.
	InstanceName string
	// Generation counts the placements of the instance.
	Generation uint64
	// CorrelationID is that of the present call, or of the start outside one.
	CorrelationID string
	// Left is the time left for the present call; 0 when there is no limit.
	Left time.Duration
}

// CurrentContext asks the host who this guest is.
func CurrentContext() (c Context, err error) {
	out, err := call(contextGet, nil)
	if err != nil {
		return Context{}, err
	}
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			c.InstanceID = string(v.Bytes)
		case 2:
			c.InstanceName = string(v.Bytes)
		case 3:
			c.Generation = v.Number
		case 4:
			c.CorrelationID = string(v.Bytes)
		case 5:
			c.Left = time.Duration(v.Number) * time.Millisecond
		}
	})
	return c, err
}
