//go:build !planted

package sim

import "testing"

// plantBug refuses: this binary holds no bugs.
func plantBug(t *testing.T, bug string) {
	t.Helper()
	if bug != "" {
		t.Fatalf("bug %q cannot be planted: build with -tags planted", bug)
	}
}
