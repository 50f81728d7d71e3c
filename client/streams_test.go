package client_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func eventsTo(n uint64) []*pb.Event {
	var out []*pb.Event
	for i := uint64(1); i <= n; i++ {
		out = append(out, &pb.Event{Sequence: i})
	}
	return out
}

func TestEventsGoOnAtAnotherPeerEachOnce(t *testing.T) {
	w := newWorld(t)
	a, b := w.peer(t, "n1"), w.peer(t, "n2")
	a.events, a.cut = eventsTo(9), 3
	b.events = eventsTo(9)
	c := w.client(t, client.Config{Addresses: []string{a.address, b.address}})
	for _, follow := range []bool{false, true} {
		var got []uint64
		for e, err := range c.WatchEvents(t.Context(), &pb.WatchEventsRequest{Follow: follow}) {
			if err != nil {
				t.Fatalf("follow %v: %v", follow, err)
			}
			if got = append(got, e.GetEvent().GetSequence()); len(got) == 9 && follow {
				break
			}
		}
		if want := []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9}; !slices.Equal(got, want) {
			t.Errorf("follow %v: got %v, want %v", follow, got, want)
		}
	}
	if a.count("watch") == 0 || b.count("watch") == 0 {
		t.Errorf("%d streams at n1 and %d at n2, want some at both", a.count("watch"), b.count("watch"))
	}
}

func TestMessagesGoOnAfterABreakAndSaySo(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	p.messages = []*pb.Message{{Payload: []byte("a")}, {Payload: []byte("b")}}
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	var got []string
	for m, err := range c.SubscribeMessages(t.Context(), &pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: ">"}) {
		if err != nil {
			t.Fatal(err)
		}
		text := "stands"
		if m.GetMessage() != nil {
			text = string(m.GetMessage().GetPayload())
		}
		if got = append(got, text); len(got) == 6 {
			break
		}
	}
	if want := []string{"stands", "a", "b", "stands", "a", "b"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	p.answers(func(string, int) error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE, "it was stopped")
	})
	before := p.count("subscribe")
	for _, err := range c.SubscribeMessages(t.Context(), &pb.SubscribeMessagesRequest{ProviderId: "bus", Subject: ">"}) {
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE {
			t.Errorf("got %v", err)
		}
	}
	if n := p.count("subscribe") - before; n != 1 {
		t.Errorf("%d streams for a refusal", n)
	}
}

func TestEventsEndWithTheError(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	c := w.client(t, client.Config{Addresses: []string{p.address}, Timeout: 200 * time.Millisecond})
	last := func(ctx context.Context) (err error) {
		for _, err = range c.WatchEvents(ctx, &pb.WatchEventsRequest{Follow: true}) {
		}
		return err
	}
	p.answers(func(string, int) error {
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "no such subject")
	})
	if err := last(t.Context()); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST || p.count("watch") != 1 {
		t.Errorf("a refusal: got %v after %d streams", err, p.count("watch"))
	}
	p.answers(func(string, int) error { return unreachable() })
	if err := last(t.Context()); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE || p.count("watch") < 3 {
		t.Errorf("no peer for longer than the timeout: got %v after %d streams", err, p.count("watch"))
	}
	p.answers(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := last(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the context ended: got %v", err)
	}
	p.server.Stop()
	if err := last(t.Context()); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE {
		t.Errorf("the peer is gone: got %v", err)
	}
}

func TestLogsGoOnWithoutRepeatedOrLostLines(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	base := time.Now()
	line := func(i int, instance string) *pb.LogEntry {
		// Three lines of one instance share each time, and two of them are the same.
		return &pb.LogEntry{InstanceId: instance, NodeId: "n1", Message: fmt.Sprintf("%s-%d", instance, i/2), Time: timestamppb.New(base.Add(time.Duration(i/3) * time.Millisecond))}
	}
	var requests []*pb.FollowLogsRequest
	p.logs = func(req *pb.FollowLogsRequest, send func(*pb.LogEntry) error) error {
		requests = append(requests, req)
		last := 5 // the first stream breaks in the middle
		if len(requests) > 1 {
			last = 9
		}
		for i := range last {
			for _, instance := range []string{"a", "b"} {
				if err := send(line(i, instance)); err != nil {
					return err
				}
			}
		}
		if len(requests) == 1 {
			return unreachable()
		}
		return nil
	}
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	var got []string
	for e, err := range c.FollowLogs(t.Context(), &pb.FollowLogsRequest{Targets: []string{"a", "b"}, Follow: true, Tail: 100}) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.GetMessage())
	}
	var want []string
	for i := range 9 {
		want = append(want, fmt.Sprintf("a-%d", i/2), fmt.Sprintf("b-%d", i/2))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if len(requests) != 2 || requests[0].GetTail() != 100 || requests[1].GetTail() != 0 || requests[1].GetSince().AsDuration() <= 0 {
		t.Errorf("requests: %v", requests)
	}
}

func TestUploadIsRepeatedFromTheStartWithOneRequestID(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1").answers(func(_ string, n int) error {
		if n == 1 {
			return noLeader()
		}
		return nil
	})
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	data := bytes.Repeat([]byte("wasm"), 200_000)
	path := filepath.Join(t.TempDir(), "hello.wasm")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := c.UploadModuleFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
	if m.GetDigest() != want || m.GetName() != "hello.wasm" || !bytes.Equal(p.upload, data) {
		t.Errorf("got %v and %d bytes", m, len(p.upload))
	}
	if ids := p.seen(); len(ids) != 2 || ids[0] == "" || ids[0] != ids[1] {
		t.Errorf("request ids %q", ids)
	}

	p.answers(func(string, int) error { return noLeader() })
	before := p.count("upload")
	if _, err := c.UploadModule(t.Context(), "pipe", io.MultiReader(bytes.NewReader(data)), int64(len(data))); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NO_LEADER {
		t.Errorf("got %v, want NO_LEADER", err)
	}
	if got := p.count("upload") - before; got != 1 {
		t.Errorf("a reader that cannot go back was used %d times", got)
	}
	if _, err := c.UploadModule(t.Context(), "empty", strings.NewReader(""), 0); apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST {
		t.Errorf("an empty module: got %v", err)
	}
}

func TestFailingReaderEndsTheUpload(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	broken := errors.New("disk broken")
	_, err := c.UploadModule(t.Context(), "x", io.MultiReader(strings.NewReader("abc"), brokenReader{broken}), 10)
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

type brokenReader struct{ err error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.err }

func TestModulesAndSnapshotsComeAndGoWhole(t *testing.T) {
	w := newWorld(t)
	p := w.peer(t, "n1")
	p.upload = []byte("snapshot")
	c := w.client(t, client.Config{Addresses: []string{p.address}})
	var out bytes.Buffer
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(p.upload))
	if err := c.FetchModule(t.Context(), digest, &out); err != nil || out.String() != "snapshot" {
		t.Errorf("fetch: got %q, %v", out.String(), err)
	}
	if err := c.FetchModule(t.Context(), "sha256:"+strings.Repeat("0", 64), io.Discard); err == nil {
		t.Error("bytes of another digest were accepted")
	}
	out.Reset()
	if index, err := c.SnapshotSave(t.Context(), &out); err != nil || index != 42 || out.String() != "snapshot" {
		t.Errorf("save: got %d, %q, %v", index, out.String(), err)
	}
	if index, err := c.SnapshotRestore(t.Context(), strings.NewReader("other")); err != nil || index != 43 || string(p.upload) != "other" {
		t.Errorf("restore: got %d, %q, %v", index, p.upload, err)
	}
	p.answers(func(string, int) error { return unreachable() })
	before := p.count("restore")
	if _, err := c.SnapshotRestore(t.Context(), strings.NewReader("x")); err == nil || p.count("restore") != before+1 {
		t.Errorf("restore was repeated %d times, %v", p.count("restore")-before-1, err)
	}
}
