package kv

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// client calls a provider in one bucket.
type client struct {
	testing.TB
	p provider.Provider
}

func openIn(t testing.TB, dir string, settings map[string]string) (client, error) {
	t.Helper()
	p, err := New(Options{}).Open(t.Context(), provider.Config{ID: "kv", Dir: dir, Settings: settings})
	if err != nil {
		return client{}, err
	}
	t.Cleanup(func() { _ = p.Close() })
	return client{t, p}, nil
}

func mustOpen(t testing.TB, dir string, settings map[string]string) client {
	t.Helper()
	c, err := openIn(t, dir, settings)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return c
}

func (c client) call(ctx context.Context, operation string, m proto.Message) ([]byte, error) {
	return c.p.Invoke(ctx, provider.Call{Bucket: "b", Operation: operation, Payload: marshal(c, m)})
}

func (c client) set(key string, value []byte) error {
	_, err := c.call(c.Context(), opSet, &pb.KvSetRequest{Key: []byte(key), Value: value})
	return err
}

func (c client) get(key string) ([]byte, bool, error) {
	answer, err := c.call(c.Context(), opGet, &pb.KvGetRequest{Key: []byte(key)})
	if err != nil {
		return nil, false, err
	}
	var got pb.KvGetResponse
	err = proto.Unmarshal(answer, &got)
	return got.GetValue(), got.GetFound(), err
}

// wantRefusal checks that an error has a sentinel and tells what to do next.
func wantRefusal(t *testing.T, err, sentinel error, mentions string) {
	t.Helper()
	var e *provider.Error
	if !errors.Is(err, sentinel) || !errors.As(err, &e) || e.Next == "" || !strings.Contains(e.Error(), mentions) {
		t.Errorf("got %v (next %q), want %v that mentions %q and a next step", err, nextOf(err), sentinel, mentions)
	}
}

func nextOf(err error) string {
	var e *provider.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Next
}

func TestBboltKeepsDataAndVersionsOverARestart(t *testing.T) {
	dir := t.TempDir()
	c := mustOpen(t, dir, nil)
	for i := range 10 {
		if err := c.set(fmt.Sprint(i), []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.call(t.Context(), opDelete, &pb.KvDeleteRequest{Key: []byte("9")}); err != nil {
		t.Fatal(err)
	}
	if err := c.p.Close(); err != nil {
		t.Fatal(err)
	}
	c = mustOpen(t, dir, nil)
	if v, found, err := c.get("8"); err != nil || !found || string(v) != "value" {
		t.Errorf("after the restart: %q, %v, %v", v, found, err)
	}
	answer, err := c.call(t.Context(), opSet, &pb.KvSetRequest{Key: []byte("9")})
	var got pb.KvSetResponse
	if err != nil || proto.Unmarshal(answer, &got) != nil || got.GetVersion() != 11 {
		t.Errorf("version %d after 10 before the restart, %v", got.GetVersion(), err)
	}
}

const killEnv = "WASMATRIX_KV_TEST_KILL_DIR"

// TestBboltLosesNoAcknowledgedWriteWhenKilled kills a process of this test
// binary that writes, and looks for all that it had acknowledged.
func TestBboltLosesNoAcknowledgedWriteWhenKilled(t *testing.T) {
	if dir := os.Getenv(killEnv); dir != "" {
		writeForever(t, dir)
		return
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), killEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var acknowledged []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if key, ok := strings.CutPrefix(lines.Text(), "ack "); ok {
			acknowledged = append(acknowledged, key)
		}
		if len(acknowledged) == 50 {
			break
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // what was acknowledged before the kill arrived
		if key, ok := strings.CutPrefix(lines.Text(), "ack "); ok {
			acknowledged = append(acknowledged, key)
		}
	}
	_ = cmd.Wait() // killed
	if len(acknowledged) < 50 {
		t.Fatalf("the process acknowledged %d writes, want 50", len(acknowledged))
	}
	c := mustOpen(t, dir, map[string]string{"verify": "always"})
	for _, key := range acknowledged {
		if v, found, err := c.get(key); err != nil || !found || string(v) != "v"+key {
			t.Errorf("%s was acknowledged and is %q, %v, %v", key, v, found, err)
		}
	}
}

func writeForever(t *testing.T, dir string) {
	c := mustOpen(t, dir, nil)
	for w := range 4 {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d-%d", w, i)
				if err := c.set(key, []byte("v"+key)); err != nil {
					return
				}
				fmt.Println("ack " + key)
			}
		}()
	}
	<-t.Context().Done()
}

func TestBboltFullByItsLimit(t *testing.T) {
	c := mustOpen(t, t.TempDir(), map[string]string{"max_bytes": "1MiB", "fsync": "false"})
	testFull(t, c)
}

func TestMemoryFullByItsLimit(t *testing.T) {
	p, err := New(Options{}).Open(t.Context(), provider.Config{
		ID: "kv", Driver: "memory", Settings: map[string]string{"max_bytes": "1MiB"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	testFull(t, client{t, p})
}

func TestBboltOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("mount a small tmpfs: %v", err)
		}
		t.Skipf("a small tmpfs could not be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	testFull(t, mustOpen(t, filepath.Join(dir, "kv"), nil))
}

// testFull fills a store of 1 MiB: writes are refused, reads go on, and after a
// delete there is room again.
func testFull(t *testing.T, c client) {
	t.Helper()
	value := bytes.Repeat([]byte("x"), 50<<10)
	var full error
	stored := 0
	for ; full == nil && stored < 100; stored++ {
		full = c.set(fmt.Sprint(stored), value)
	}
	stored--
	wantRefusal(t, full, provider.ErrExhausted, "")
	if stored < 5 {
		t.Fatalf("full after %d writes of 50 KiB", stored)
	}
	for i := range stored {
		if v, found, err := c.get(fmt.Sprint(i)); err != nil || !found || !bytes.Equal(v, value) {
			t.Fatalf("key %d when full: found %v, %v", i, found, err)
		}
	}
	if _, found, err := c.get(fmt.Sprint(stored)); err != nil || found {
		t.Errorf("the refused write is found: %v, %v", found, err)
	}
	for i := range 4 {
		if _, err := c.call(t.Context(), opDelete, &pb.KvDeleteRequest{Key: []byte(fmt.Sprint(i))}); err != nil {
			t.Fatalf("delete when full: %v", err)
		}
	}
	if err := c.set("again", value); err != nil {
		t.Errorf("set after deletes: %v", err)
	}
}

func fill(t *testing.T, dir string, n int) {
	t.Helper()
	c := mustOpen(t, dir, map[string]string{"fsync": "false"})
	for i := range n {
		if err := c.set(fmt.Sprintf("key-%04d", i), bytes.Repeat([]byte(strconv.Itoa(i)), 40)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBboltSaysThatItsFileIsDamaged(t *testing.T) {
	damages := map[string]func(b []byte) []byte{
		"not a database":           func([]byte) []byte { return []byte(strings.Repeat("this is no database\n", 1000)) },
		"truncated":                func(b []byte) []byte { return b[:len(b)/2/4096*4096] },
		"truncated short":          func(b []byte) []byte { return b[:100] },
		"truncated to a few pages": func(b []byte) []byte { return b[:5*4096] },
		"no meta pages":            func(b []byte) []byte { return append(make([]byte, 8192), b[8192:]...) },
		"a value": func(b []byte) []byte {
			return bytes.ReplaceAll(b, []byte("424242"), []byte("434242"))
		},
		"zeroed pages": func(b []byte) []byte { clear(b[8192:]); return b },
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			fill(t, dir, 200)
			path := filepath.Join(dir, fileName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = openIn(t, dir, nil)
			wantRefusal(t, err, provider.ErrInternal, "is damaged")
			if err := os.Rename(path, path+".damaged"); err != nil {
				t.Fatal(err)
			}
			mustOpen(t, dir, nil) // what the next step says works
		})
	}
}

// Whatever bit of the file is damaged, nothing wrong is ever returned: opening
// fails, or a read fails, or every answer is right. Without the check at start a
// key may be missing instead. A damaged meta page looks like a commit that a
// crash interrupted, so the last write is then undone.
func TestBboltDamageIsNeverSilent(t *testing.T) {
	dir := t.TempDir()
	const n = 100
	fill(t, dir, n)
	good, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	noticed := 0
	for i := range 150 {
		bad := bytes.Clone(good)
		at := random.IntN(len(bad))
		bad[at] ^= byte(1 << random.IntN(8))
		verify := []string{"auto", "never"}[i%2]
		damagedDir := t.TempDir()
		if err := os.WriteFile(filepath.Join(damagedDir, fileName), bad, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := openIn(t, damagedDir, map[string]string{"verify": verify, "fsync": "false"})
		if err != nil {
			noticed++
			continue
		}
		for i := range n {
			v, found, err := c.get(fmt.Sprintf("key-%04d", i))
			undone := i == n-1 && at < 2*os.Getpagesize()
			switch {
			case err != nil:
				noticed++
			case !found && (verify == "never" || undone):
			case !bytes.Equal(v, bytes.Repeat([]byte(strconv.Itoa(i)), 40)):
				t.Fatalf("byte %d damaged, verify=%s: key %d silently is %q", at, verify, i, v)
			}
		}
		if err := c.p.Close(); err != nil {
			noticed++
		}
	}
	if noticed == 0 {
		t.Error("no damage was noticed at all; the test proves nothing")
	}
	t.Logf("%d damages or damaged records noticed", noticed)
}

func TestBboltNamesTheDamagedRecordAndGoesOn(t *testing.T) {
	dir := t.TempDir()
	fill(t, dir, 100)
	path := filepath.Join(dir, fileName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte("424242"), []byte("434242")), 0o600); err != nil {
		t.Fatal(err)
	}
	c := mustOpen(t, dir, map[string]string{"verify": "never"})
	_, _, err = c.get("key-0042")
	wantRefusal(t, err, provider.ErrInternal, "checksum")
	if _, found, err := c.get("key-0043"); err != nil || !found {
		t.Errorf("the key beside it: %v, %v", found, err)
	}
	if _, err := c.call(t.Context(), opCas, &pb.KvCasRequest{Key: []byte("key-0042")}); !errors.Is(err, provider.ErrInternal) {
		t.Errorf("cas over a damaged record: %v, want ErrInternal", err)
	}
	if err := c.set("key-0042", []byte("new")); err != nil {
		t.Errorf("overwriting it: %v", err)
	}
	if v, found, err := c.get("key-0042"); err != nil || !found || string(v) != "new" {
		t.Errorf("after overwriting: %q, %v, %v", v, found, err)
	}
}

func TestBboltFileInUse(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir, nil)
	_, err := openIn(t, dir, nil)
	wantRefusal(t, err, provider.ErrUnavailable, "in use by another process")
}

// After a failed write nobody can say what is on the disk: the store stops
// until it is opened anew, and then holds all that was acknowledged.
func TestBboltStopsAfterAFailedWrite(t *testing.T) {
	dir := t.TempDir()
	s, err := openBolt(boltOptions{dir: dir, sync: true, verify: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	svc := newService(s, time.Now, New(Options{}).log)
	c := client{t, svc}
	if err := c.set("k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := s.file.Close(); err != nil { // every further write fails, as on a broken disk
		t.Fatal(err)
	}
	wantRefusal(t, c.set("k", []byte("w")), provider.ErrUnavailable, "failed")
	_, _, err = c.get("k")
	wantRefusal(t, err, provider.ErrUnavailable, "failed")
	_ = svc.Close() // the file is closed already
	if v, found, err := mustOpen(t, dir, nil).get("k"); err != nil || !found || string(v) != "v" {
		t.Errorf("after opening anew: %q, %v, %v", v, found, err)
	}
}

func TestSettingsAreChecked(t *testing.T) {
	tests := []struct {
		driver   string
		settings map[string]string
		mentions string
	}{
		{"redis-typo", nil, `no driver "redis-typo"; expected bbolt, memory, redis or nats`},
		{"bbolt", map[string]string{"fsnyc": "false"}, "has no setting fsnyc; expected fsync, verify, max_bytes"},
		{"bbolt", map[string]string{"fsync": "no"}, `fsync of kv driver bbolt is "no"; expected true or false`},
		{"bbolt", map[string]string{"verify": "maybe"}, "expected auto, always or never"},
		{"bbolt", map[string]string{"max_bytes": "many"}, "expected a size"},
		{"bbolt", map[string]string{"max_bytes": "-1MiB"}, "expected a size"},
		{"bbolt", map[string]string{"max_bytes": "99999999999TiB"}, "expected a size"},
		{"memory", map[string]string{"fsync": "true"}, "has no setting fsync; expected max_bytes"},
	}
	for _, tt := range tests {
		_, err := New(Options{}).Open(t.Context(), provider.Config{ID: "kv", Driver: tt.driver, Dir: t.TempDir(), Settings: tt.settings})
		if !errors.Is(err, provider.ErrInvalid) || !strings.Contains(err.Error(), tt.mentions) {
			t.Errorf("%s %v: %v, want ErrInvalid that mentions %q", tt.driver, tt.settings, err, tt.mentions)
		}
	}
	if _, err := New(Options{}).Open(t.Context(), provider.Config{ID: "kv"}); !errors.Is(err, provider.ErrInvalid) {
		t.Errorf("bbolt without a directory: %v", err)
	}
}

func BenchmarkBboltVerify(b *testing.B) {
	dir := b.TempDir()
	c := mustOpen(b, dir, map[string]string{"fsync": "false"})
	for i := range 64 {
		if err := c.set(fmt.Sprint("large", i), make([]byte, MaxValue/2)); err != nil {
			b.Fatal(err)
		}
	}
	for i := range 20000 {
		if err := c.set(fmt.Sprint("small", i), make([]byte, 1000)); err != nil {
			b.Fatal(err)
		}
	}
	if err := c.p.Close(); err != nil {
		b.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, fileName))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(info.Size())
	for b.Loop() {
		p := mustOpen(b, dir, map[string]string{"verify": "always"})
		if err := p.p.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
