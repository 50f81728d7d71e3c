package providertest

import (
	"os"
	"os/exec"
	"testing"
)

// Program returns the path of a server program, which may be where only
// administrators look. Where there is none the test is skipped with the reason; in
// CI it fails.
func Program(t testing.TB, name string) string {
	t.Helper()
	for _, candidate := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	const missing = "%s is not installed; scripts/setup.sh installs it"
	if os.Getenv("CI") == "true" {
		t.Fatalf(missing, name)
	}
	t.Skipf(missing, name)
	return ""
}
