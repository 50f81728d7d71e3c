package cli

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func healthy() *pb.StatusResponse {
	return &pb.StatusResponse{
		PeerId: "n2", Cluster: "dev", LeaderId: "n1", Term: 3, AppliedIndex: 42, Version: "1.0.0", NodesReady: 2,
		Runtimes:  []*pb.RuntimeOffer{{Name: "microvm", Isolation: "hardware", Nodes: 1}, {Name: "wasm", Isolation: "sandbox", Nodes: 2}},
		Instances: map[string]uint32{"RUNNING": 2, "PENDING": 1}, Providers: map[string]uint32{"RUNNING": 1},
		Peers: []*pb.PeerStatus{
			{Id: "n1", Voter: true, Leader: true, Alive: true, ApiAddress: "a:1", RaftAddress: "a:2"}, {Id: "n3", Alive: true}, {Id: "n2", Voter: true, Self: true},
		},
	}
}

func TestStatus(t *testing.T) {
	b := newBench(t)
	b.fake.status = healthy()
	want := `cluster dev · leader n1 · term 3 · index 42 · wasmatrix 1.0.0
  nodes      2 ready
  instances  1 PENDING, 2 RUNNING
  providers  1 RUNNING
  runtimes   microvm (hardware) on 1 node, wasm on 2 nodes
PEER  ROLE       SEEN     API  RAFT  MESSAGE
n1    leader     yes      a:1  a:2
n2    follower   answers  -    -
n3    non-voter  yes      -    -
`
	if got := b.want("status", "--check"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := b.want("cluster", "peers", "-o", "name"); got != "n1\nn2\nn3\n" {
		t.Errorf("peers: %q", got)
	}
	for name, tt := range map[string]struct {
		breaks func(*pb.StatusResponse)
		code   int
		want   string
	}{
		"peer gone":        {func(s *pb.StatusResponse) { s.Peers[0].Alive = false }, 7, "the cluster is degraded: peer n1 is not seen"},
		"node lost":        {func(s *pb.StatusResponse) { s.NodesLost = 1 }, 7, "1 node lost"},
		"provider failed":  {func(s *pb.StatusResponse) { s.Providers["FAILED"] = 2 }, 7, "2 providers failed or lost"},
		"instances failed": {func(s *pb.StatusResponse) { s.Instances["FAILED"] = 2 }, 7, "2 instances failed"},
		"no leader": {func(s *pb.StatusResponse) {
			s.LeaderId, s.WithoutLeader, s.Peers[0].Leader, s.Peers[0].Alive = "", durationpb.New(12*time.Second), false, false
		}, 6, "error: no leader: 1 of 2 voting peers seen, quorum is 2"},
	} {
		b.fake.status = healthy()
		tt.breaks(b.fake.status)
		code, stdout, stderr := b.run("status", "--check")
		if code != tt.code || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d\n%s", name, code, stderr)
		}
		if !strings.Contains(stdout, "\n! ") {
			t.Errorf("%s: not marked in\n%s", name, stdout)
		}
		if code, _, _ := b.run("status"); code != 0 {
			t.Errorf("%s: without --check exit %d", name, code)
		}
	}
}

func TestWatchShowsAgainWhenSomethingHappened(t *testing.T) {
	b := newBench(t)
	b.fake.status = healthy()
	b.fake.status.AppliedIndex = 0
	i := b.fake.add("hello-aaaaa", pb.InstanceState_INSTANCE_STATE_STARTING)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	shown := 0
	b.fake.seen = func(method string) {
		if method != "ListInstances" {
			return
		}
		shown++
		switch shown {
		case 1:
			go b.fake.change(pb.EventKind_EVENT_KIND_INSTANCE_STARTED, i.GetId(), func() { i.Status.State = pb.InstanceState_INSTANCE_STATE_RUNNING })
		case 2:
			time.AfterFunc(50*time.Millisecond, cancel)
		}
	}
	code, stdout, stderr := b.runIn(ctx, "ps", "--watch")
	first, second, again := strings.Cut(stdout, "\n\n")
	if code != 0 || !strings.Contains(first, "STARTING") || !again || !strings.Contains(second, "RUNNING") {
		t.Errorf("exit %d\n%s\n%s", code, stdout, stderr)
	}
}

func TestClusterCommands(t *testing.T) {
	b := newBench(t)
	if got := b.want("cluster", "transfer-leader", "n2"); got != "leadership moved from n1 to n2\n" {
		t.Errorf("transfer: %q", got)
	}
	if got := b.want("cluster", "remove", "n3", "--force"); got != "peer n3 removed\n" || !request[*pb.RemoveRequest](b.fake).GetForce() {
		t.Errorf("remove: %q", got)
	}
	if got := b.want("cluster", "promote", "n3"); got != "peer n3 votes\n" {
		t.Errorf("promote: %q", got)
	}
}

// aSnapshot is one in the format that package fsm writes.
func aSnapshot(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	records := []*pb.SnapshotRecord{
		{Record: &pb.SnapshotRecord_Header{Header: &pb.SnapshotHeader{Format: 1, Index: 42, Time: timestamppb.New(epoch()), StateHash: []byte{0xab}}}},
		{Record: &pb.SnapshotRecord_Instance{Instance: &pb.Instance{Id: "a"}}},
		{Record: &pb.SnapshotRecord_Instance{Instance: &pb.Instance{Id: "b"}}},
		{Record: &pb.SnapshotRecord_Event{Event: &pb.Event{Sequence: 1}}},
	}
	write := func(m proto.Message) {
		if _, err := protodelim.MarshalTo(&out, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range records {
		write(r)
	}
	sum := crc32.Checksum(out.Bytes(), crc32.MakeTable(crc32.Castagnoli))
	write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Trailer{Trailer: &pb.SnapshotTrailer{Records: uint64(len(records)), Crc32C: sum}}})
	return out.Bytes()
}

func TestSnapshotIsSavedInspectedAndRestored(t *testing.T) {
	b := newBench(t)
	b.fake.snapshot = aSnapshot(t)
	path := filepath.Join(b.home, "snap")
	if got := b.want("cluster", "snapshot", "save", path); !strings.HasPrefix(got, path+" saved: index 42, ") {
		t.Errorf("save: %q", got)
	}
	if got := b.want("cluster", "snapshot", "save", "-"); got != string(b.fake.snapshot) {
		t.Errorf("save to standard output: %d bytes", len(got))
	}
	got := b.want("cluster", "snapshot", "inspect", path)
	if !strings.HasPrefix(got, "format 1 · index 42 · 2026-01-02 03:04:05 UTC · ") || !strings.Contains(got, "  event       1\n  instance    2\nstate ab\n") {
		t.Errorf("inspect:\n%s", got)
	}
	if code, _, stderr := b.run("cluster", "snapshot", "restore", path); code != 2 || !strings.Contains(stderr, "say so with --yes") {
		t.Errorf("restore unasked: exit %d\n%s", code, stderr)
	}
	saved := b.fake.snapshot
	b.fake.snapshot = nil
	if got := b.want("cluster", "snapshot", "restore", path, "--yes"); !strings.HasSuffix(got, "the registry is at index 43\n") || !bytes.Equal(b.fake.snapshot, saved) {
		t.Errorf("restore: %q", got)
	}

	b.fake.fail["SnapshotSave"] = errors.New("disk broke")
	if code, _, _ := b.run("cluster", "snapshot", "save", path); code != 1 {
		t.Errorf("a failing save: exit %d", code)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, saved) {
		t.Errorf("a failing save changed the file: %v", err)
	}
	if entries, err := os.ReadDir(b.home); err != nil || len(entries) != 3 {
		t.Errorf("a failing save left something: %v, %v", entries, err)
	}
}

func TestDamagedSnapshotIsToldAndNeverSent(t *testing.T) {
	b := newBench(t)
	good := aSnapshot(t)
	for i := range good {
		damaged := bytes.Clone(good)
		damaged[i] ^= 4
		if s, err := inspect(bytes.NewReader(damaged)); err == nil {
			t.Errorf("a flipped bit in byte %d was not noticed: %+v", i, s)
		}
		if _, err := inspect(bytes.NewReader(good[:i])); err == nil {
			t.Errorf("a snapshot cut to %d bytes was not noticed", i)
		}
	}
	if _, err := inspect(bytes.NewReader(append(bytes.Clone(good), 0))); err == nil {
		t.Error("a byte too many was not noticed")
	}
	code, _, stderr := b.run("cluster", "snapshot", "restore", b.file("snap", string(good[:20])), "--yes")
	if code != 2 || !strings.Contains(stderr, "is not a complete snapshot") || b.fake.snapshot != nil {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

func TestContextsAreShown(t *testing.T) {
	b := newBench(t)
	got := b.want("context", "show")
	for _, want := range []string{"cluster      dev\n", "subject      spiffe://dev/user/ann/admin\n", "certificate  " + filepath.Join(b.home, "tls") + "\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := b.want("context", "show", "-o", "name"); got != filepath.Join(b.home, "tls")+"\n" {
		t.Errorf("name: %q", got)
	}
	dir := filepath.Join(b.home, ".config", "wasmatrix", "contexts")
	if err := os.WriteFile(filepath.Join(dir, "prod.yaml"), []byte("addresses: ['p:1']\ncluster: prod\ntls_dir: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := b.want("context", "list"); !strings.Contains(got, "*  default  dev") || !strings.Contains(got, "   prod     prod     p:1\n") {
		t.Errorf("list:\n%s", got)
	}
	code, stdout, _ := b.run("context", "show", "--context", "prod")
	if code == 0 || !strings.Contains(stdout, "subject      unusable: ") {
		t.Errorf("unusable: exit %d\n%s", code, stdout)
	}
}
