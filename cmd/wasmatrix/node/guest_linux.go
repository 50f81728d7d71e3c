package node

import (
	"slices"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/guest"
)

// BecomeInit makes this process the init of a virtual machine, see
// runtime/microvm/guest, if it was started as one: as the first process, with the
// arguments for it at the end. The kernel puts words of its own command line that
// it does not know before them. Then it does not return.
func BecomeInit(args []string) {
	if from := len(args) - len(initArguments); from >= 0 && slices.Equal(args[from:], initArguments) && guest.IsInit() {
		guest.Main()
	}
}
