package node

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/wasmatrix/wasmatrix/cluster"
)

// The exit codes of a node whose peer lost its disk, for the case that it cannot
// return them: as the command line has them.
const (
	exitDisk    = 10
	exitDamaged = 11
)

// endWithin is how long the rest of the process may take to end once the disk of
// its peer is gone. A part that waits for the same disk would never end.
const endWithin = 5 * time.Second

// endSoon passes the reason on with which the peer ended. When that is its disk
// the process ends soon, in order or not.
func (p *peerProcess) endSoon(err error) error {
	if !cluster.IsDiskFailure(err) {
		return err
	}
	code := exitDisk
	if errors.Is(err, cluster.ErrCorrupt) {
		code = exitDamaged
	}
	time.AfterFunc(endWithin, func() {
		fmt.Fprintf(os.Stderr, "error: %v\nthe process does not end in order, because something waits for the disk: it ends now · exit %d\n", err, code)
		os.Exit(code)
	})
	return err
}
