// Ledger is a guest for tests: it writes one key after another, each named after
// its generation and a counter, until it is ended. The versions of the keys say
// in which order the provider let them in, so that a test can see afterwards
// whether the effects of two generations ever overlapped.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
)

func main() {
	pace := flag.Duration("pace", 2*time.Millisecond, "time between two effects")
	flag.Parse()
	of, err := wasmatrix.CurrentContext()
	if err != nil || of.Generation == 0 {
		fmt.Fprintln(os.Stderr, "the host does not say which generation this is:", err)
		os.Exit(1)
	}
	var kv wasmatrix.KV
	for n := 0; ; n++ {
		// A refusal is what the test wants to see; it shows in what is missing.
		_, _ = kv.Set(fmt.Sprintf("effect/%06d/%08d", of.Generation, n), nil, 0)
		time.Sleep(*pace)
	}
}
