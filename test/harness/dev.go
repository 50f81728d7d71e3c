package harness

import (
	"bufio"
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// StartDev starts a `wasmatrix dev` and returns when its cluster is ready, with what
// it writes to standard error; read that after its end, which is the caller's to bring.
func StartDev(t testing.TB, dev *exec.Cmd) (stderr *bytes.Buffer) {
	t.Helper()
	out, err := dev.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr = &bytes.Buffer{}
	dev.Stderr = stderr
	if err := dev.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "ready in") {
			return stderr
		}
	}
	t.Fatalf("dev ended before it was ready: %v, %s", dev.Wait(), stderr)
	return nil
}
