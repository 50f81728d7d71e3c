// Command init is the only process of a virtual machine that executes one
// instance: the smallest program that holds package guest. `make microvm-init`
// builds it; without it, the agent's own binary takes its part.
package main

import (
	"fmt"
	"os"
)

func main() {
	if !isInit() {
		fmt.Fprintln(os.Stderr, "this program is the init of a virtual machine of wasmatrix; it does nothing elsewhere")
		os.Exit(2)
	}
	serve()
}
