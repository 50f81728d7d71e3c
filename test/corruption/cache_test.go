package corruption

import (
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// TestNoDamageOfTheCompilationCacheIsSilent damages every file that an agent keeps
// of a compiled module while the node is down: the guest answers as before, since
// what is damaged is compiled again.
func TestNoDamageOfTheCompilationCacheIsSilent(t *testing.T) {
	r, from := source(t)
	c := harness.Start(t, dev.Options{Nodes: 1})
	hello := c.RunHello("hello", "")
	n := c.Nodes()[0]
	for round := range max(3, *flips/200) {
		if err := n.Stop(c.Context(time.Minute)); err != nil {
			t.Fatal(err)
		}
		damaged := 0
		err := filepath.WalkDir(n.Config.DataDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.Contains(path, "/metered-") {
				return err
			}
			if info, err := d.Info(); err != nil || info.Size() == 0 {
				return err
			}
			t.Logf("seed %d, round %d: %s: %s", from, round, filepath.Base(path), damage(t, r, path))
			damaged++
			return nil
		})
		if err != nil || damaged == 0 {
			t.Fatalf("damaged %d files: %v", damaged, err)
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		ctx := c.Context(time.Minute)
		if _, err := c.WaitReady(ctx, c.Client); err != nil {
			t.Fatal(err)
		}
		if err := harness.WaitState(ctx, c.Client, hello.Id, pb.InstanceState_INSTANCE_STATE_RUNNING); err != nil {
			t.Fatal(err)
		}
		answer, err := c.Client.Invoke(ctx, &pb.InvokeRequest{Target: "hello", Payload: []byte("cache")})
		if err != nil || !strings.Contains(string(answer.GetPayload()), "cache") {
			t.Fatalf("the guest answers %q, %v", answer.GetPayload(), err)
		}
	}
}
