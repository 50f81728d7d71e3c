package corruption

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cluster/gossip"
	"github.com/wasmatrix/wasmatrix/cluster/modules"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

var (
	flips = flag.Int("flips", 200, "how many times a file is damaged")
	seed  = flag.Uint64("seed", 0, "the seed of the damage; 0 takes another each time")
)

// truth is everything that the files of a peer say.
type truth struct {
	summary string
	entries string
}

// read opens a peer's files as the peer does and reads all of them.
func read(dataDir string) (truth, error) {
	files, err := cluster.OpenFiles(dataDir, nil)
	if err != nil {
		return truth{}, err
	}
	defer func() { _ = files.Close() }()
	summary, err := files.Summary()
	if err != nil {
		return truth{}, err
	}
	// Which snapshot it starts from does not matter, what comes of it does.
	summary.SnapshotIndex = 0
	out := truth{summary: fmt.Sprintf("%+v", *summary)}
	var entries strings.Builder
	err = files.Entries(func(e *raft.Log) error {
		_, err := fmt.Fprintf(&entries, "%d %d %d %x %x\n", e.Index, e.Term, e.Type, e.Data, e.Extensions)
		return err
	})
	out.entries = entries.String()
	return out, err
}

// noLeave is a gossip of one.
type noLeave struct{ meta *pb.PeerMetadata }

func (n *noLeave) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (n *noLeave) Members() []gossip.Member {
	return []gossip.Member{{Metadata: n.meta, Alive: true}}
}
func (n *noLeave) Events() <-chan gossip.Event        { return nil }
func (n *noLeave) Update(meta *pb.PeerMetadata) error { n.meta = meta; return nil }

// populate lets a real peer write a data directory: a log of some hundred
// entries, its term and vote, and two snapshots.
func populate(t *testing.T, dir string) {
	t.Helper()
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := ca.Issue(identity.Subject{Cluster: "test", Kind: identity.Node, Name: "n1", Role: identity.RoleServer}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.FromBundle(bundle)
	if err != nil {
		t.Fatal(err)
	}
	api, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(id.ServerOption())
	defer server.Stop()
	go func() { _ = server.Serve(api) }()
	p, err := cluster.New(cluster.Config{
		ID: "n1", Cluster: "test", DataDir: dir, RaftBind: "127.0.0.1:0", APIAdvertise: api.Addr().String(), BootstrapExpect: 1,
		Identity: id, Seams: cluster.Seams{Members: &noLeave{}},
		Snapshots: cluster.Snapshots{Threshold: 60, Trailing: 40, Interval: 50 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	wait := func(what string, ok func() bool) {
		bounded, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		err := harness.Until(bounded, "a "+what, func(context.Context) error {
			if !ok() {
				return errors.New("there is none")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	wait("leader", p.IsLeader)
	snapshots := func() int {
		found, _ := filepath.Glob(filepath.Join(dir, "raft", "snapshots", "*[0-9]", "meta.json"))
		return len(found)
	}
	wrote := 0
	for i := 0; i < 400 || snapshots() < 2; i++ {
		_, err := p.Propose(ctx, &pb.Command{Actor: "test", Payload: &pb.Command_PutPeer{PutPeer: &pb.PutPeerCommand{
			Peer: &pb.Peer{Id: fmt.Sprintf("p%d", i%50), RaftAddress: "127.0.0.1:1", ApiAddress: strings.Repeat("a", 1+i%300) + ":1"},
		}}})
		if err == nil {
			wrote++
		}
		if i > 5000 {
			t.Fatalf("%d snapshots after %d writes", snapshots(), wrote)
		}
	}
	if wrote == 0 {
		t.Fatal("nothing was written")
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// damage flips bits of a file or cuts it, and says what it did.
func damage(t *testing.T, r *rand.Rand, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	what := ""
	switch k := r.IntN(10); {
	case k < 6:
		at, bit := hot(r, raw), r.IntN(8)
		raw[at] ^= 1 << bit
		what = fmt.Sprintf("bit %d of byte %d of %d flipped", bit, at, len(raw))
	case k < 8:
		at, n := hot(r, raw), 1+r.IntN(64)
		for i := at; i < min(at+n, len(raw)); i++ {
			raw[i] = byte(r.Uint32())
		}
		what = fmt.Sprintf("%d bytes at %d of %d overwritten", n, at, len(raw))
	default:
		to := r.IntN(len(raw))
		if r.IntN(5) == 0 {
			to = 0
		}
		what = fmt.Sprintf("cut from %d to %d bytes", len(raw), to)
		raw = raw[:to]
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return what
}

// hot picks a byte, every other time near something that is not empty: most of a
// file of pages is.
func hot(r *rand.Rand, raw []byte) int {
	at := r.IntN(len(raw))
	if r.IntN(2) == 0 {
		return at
	}
	marks := [][]byte{[]byte("CurrentTerm"), []byte("LastVote"), []byte("Wasmatrix"), {0xED, 0xDA, 0x0C, 0xED}, []byte("head"), []byte("logs")}
	mark := marks[r.IntN(len(marks))]
	if i := bytes.Index(raw[at:], mark); i >= 0 {
		return min(at+i+r.IntN(80), len(raw)-1)
	}
	for range 100 {
		if at = r.IntN(len(raw)); raw[at] != 0 {
			break
		}
	}
	return at
}

// TestNoDamageOfAPeersFilesIsSilent damages the files of a stopped peer, one at a
// time, and opens them as the peer would: it refuses with a reason, or everything
// is as it was.
func TestNoDamageOfAPeersFilesIsSilent(t *testing.T) {
	r, from := source(t)
	good := t.TempDir()
	populate(t, good)
	want, err := read(good)
	if err != nil {
		t.Fatal(err)
	}
	files := []string{"raft/raft.db"}
	for _, name := range []string{"meta.json", "state.bin"} {
		found, err := filepath.Glob(filepath.Join(good, "raft", "snapshots", "*", name))
		if err != nil || len(found) < 2 {
			t.Fatalf("snapshots: %v, %v", found, err)
		}
		for _, path := range found {
			rel, _ := filepath.Rel(good, path)
			files = append(files, rel)
		}
	}
	refused, same := map[string]int{}, map[string]int{}
	for i := range *flips {
		dir := filepath.Join(t.TempDir(), "data")
		if err := os.CopyFS(dir, os.DirFS(good)); err != nil {
			t.Fatal(err)
		}
		file := files[0]
		if r.IntN(2) == 0 {
			file = files[r.IntN(len(files))]
		}
		what := damage(t, r, filepath.Join(dir, file))
		kind := filepath.Base(file)
		got, err := read(dir)
		switch {
		case errors.Is(err, cluster.ErrCorrupt):
			refused[kind]++
		case err != nil:
			t.Errorf("seed %d, round %d: %s: %s: not called damage: %v", from, i, file, what, err)
		case got != want:
			t.Errorf("seed %d, round %d: %s: %s: silent\n got %s\nwant %s\nsame entries: %v", from, i, file, what, got.summary, want.summary, got.entries == want.entries)
		default:
			same[kind]++
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d, %d times: refused %v, without effect %v, silent 0", from, *flips, refused, same)
}

// TestNoDamageOfAModuleIsSilent does the same to the module store.
func TestNoDamageOfAModuleIsSilent(t *testing.T) {
	r, from := source(t)
	dir := t.TempDir()
	store, err := modules.NewStore(modules.StoreConfig{Dir: dir, Reserve: -1})
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 200_000)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	digest, _, err := store.Put(bytes.NewReader(content), "")
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "modules", "sha256", "??", "*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	refused, same := 0, 0
	for i := range *flips / 2 {
		what := damage(t, r, found[0])
		f, err := store.Open(digest)
		switch {
		case errors.Is(err, modules.ErrDamaged):
			refused++
		case err != nil:
			t.Fatalf("seed %d, round %d: %s: %v", from, i, what, err)
		default:
			got, err := io.ReadAll(f)
			_ = f.Close()
			if err != nil || !bytes.Equal(got, content) {
				t.Fatalf("seed %d, round %d: %s: silent, %v", from, i, what, err)
			}
			same++
		}
		// The damaged one is gone, as for the replicator that fetches it again.
		if err != nil && store.Has(digest) {
			t.Fatalf("seed %d, round %d: %s: the damaged file is still there", from, i, what)
		}
		if _, _, err := store.Put(bytes.NewReader(content), digest); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d, %d times: refused %d, without effect %d", from, *flips/2, refused, same)
}

func source(t *testing.T) (*rand.Rand, uint64) {
	from := *seed
	if from == 0 {
		from = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", from)
	return rand.New(rand.NewPCG(from, 0)), from
}
