// Package drain lets a guest finish up before a graceful stop. Importing it
// exports wasmatrix_on_drain.
package drain

var handler func()

// Handle registers a function that is called once before a graceful stop. Call
// it from an init function.
func Handle(h func()) { handler = h }

// run calls the handler, if there is one.
func run() {
	if handler != nil {
		handler()
	}
}
