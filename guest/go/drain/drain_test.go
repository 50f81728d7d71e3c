package drain

import "testing"

func TestRunCallsTheHandlerIfThereIsOne(t *testing.T) {
	run()
	ran := false
	Handle(func() { ran = true })
	run()
	if !ran {
		t.Error("the handler was not called")
	}
}
