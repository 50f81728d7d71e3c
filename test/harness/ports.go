package harness

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// Port bases that tests use: below the range from which the kernel takes the
// ports of outgoing connections.
const (
	firstBase = 11000
	lastBase  = 30000
	stride    = 100
)

var held []net.Listener // what keeps other processes off a range, until this one ends

// FreePortBase returns a port base with room for nodes nodes that nothing
// listens on. Test processes that run side by side keep clear of each other by
// listening, for each node, on a port that no node uses. It panics when there is none.
func FreePortBase(nodes int) int {
	for base := firstBase; base+nodes*stride <= lastBase; base += stride {
		if locks, ok := claim(base, nodes); ok {
			held = append(held, locks...)
			return base
		}
	}
	panic(fmt.Sprintf("no free ports for %d nodes between %d and %d", nodes, firstBase, lastBase))
}

// claim takes the ranges of nodes from base on, or none of them.
func claim(base, nodes int) (locks []net.Listener, ok bool) {
	defer func() {
		if !ok {
			for _, lock := range locks {
				_ = lock.Close()
			}
		}
	}()
	for at := base; at < base+nodes*stride; at += stride {
		lock, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", at+stride-1))
		if err != nil {
			return locks, false
		}
		locks = append(locks, lock)
		if !free(at) {
			return locks, false
		}
	}
	return locks, true
}

func free(base int) bool {
	for offset := range node.PortCount {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+offset))
		if err != nil {
			return false
		}
		_ = l.Close()
	}
	return true
}

// Binary returns the built wasmatrix binary and the directory of the built
// guests. A test that needs them is skipped with the reason where they are not
// named, and fails in CI.
func Binary(t testing.TB) (binary, guests string) {
	t.Helper()
	binary, guests = os.Getenv("WASMATRIX_BINARY"), os.Getenv("WASMATRIX_GUESTS")
	if binary == "" || guests == "" {
		reason := "WASMATRIX_BINARY and WASMATRIX_GUESTS are not set: run `make e2e`"
		if os.Getenv("CI") == "true" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	return binary, guests
}
