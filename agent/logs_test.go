package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/runtime"
)

func messages(entries []*pb.LogEntry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.GetMessage())
	}
	return out
}

// kept returns the messages that a book has for a request without follow.
func kept(t *testing.T, b *logBook, req *pb.FollowLogsRequest) []string {
	t.Helper()
	var out []*pb.LogEntry
	err := b.follow(t.Context(), req, func(e *pb.LogEntry) error {
		out = append(out, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return messages(out)
}

func writer(l *instanceLog) *lineWriter {
	return &lineWriter{log: l, stream: pb.LogStream_LOG_STREAM_STDOUT, correlationID: func() string { return "c" }}
}

func TestOutputIsSplitIntoLines(t *testing.T) {
	long := strings.Repeat("x", maxLineBytes)
	for _, c := range []struct {
		name   string
		writes []string
		want   []string
	}{
		{"whole lines", []string{"a\nb\n"}, []string{"a", "b"}},
		{"pieces", []string{"a", "b\nc", "", "d\n"}, []string{"ab", "cd"}},
		{"an unfinished line", []string{"a\nb"}, []string{"a", "b"}},
		{"empty lines", []string{"\n\na\n"}, []string{"", "", "a"}},
		{"carriage returns", []string{"a\r\nb\r\n"}, []string{"a", "b"}},
		{"the longest line", []string{long + "\n" + "y\n"}, []string{long, "y"}},
		{"a longer one is cut", []string{long + "zz\ny\n"}, []string{long, "zz", "y"}},
		{"byte by byte", strings.Split("ab\nc\n", ""), []string{"ab", "c"}},
		{"no valid text", []string{"a\xffb\n"}, []string{"a\uFFFDb"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newLogBook("n", time.Now)
			w := writer(b.open("i", "n"))
			for _, p := range c.writes {
				if n, err := w.Write([]byte(p)); n != len(p) || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
			}
			w.flush()
			if got := kept(t, b, &pb.FollowLogsRequest{Targets: []string{"i"}}); !slices.Equal(got, c.want) {
				t.Fatalf("got %d lines %.80q, want %d", len(got), got, len(c.want))
			}
		})
	}
}

func TestALogIsBounded(t *testing.T) {
	b := newLogBook("n", time.Now)
	l := b.open("i", "n")
	for i := range 3 * maxLogLines {
		l.add(&pb.LogEntry{Message: fmt.Sprint(i)})
	}
	if len(l.entries) != maxLogLines || l.entries[0].GetMessage() != fmt.Sprint(2*maxLogLines) {
		t.Fatalf("%d lines are kept, from %s", len(l.entries), l.entries[0].GetMessage())
	}
	attributes := cutAttributes(map[string]string{"k": strings.Repeat("v", maxLineBytes-10)})
	for range 100 {
		l.add(&pb.LogEntry{Message: strings.Repeat("é", maxLineBytes), Attributes: attributes})
	}
	size := 0
	for _, e := range l.entries {
		size += entrySize(e)
		if len(e.GetMessage()) > maxLineBytes || !utf8.ValidString(e.GetMessage()) {
			t.Fatalf("a line of %d bytes, valid: %t", len(e.GetMessage()), utf8.ValidString(e.GetMessage()))
		}
	}
	if size != l.bytes || size > maxLogBytes {
		t.Fatalf("%d bytes are kept and %d counted", size, l.bytes)
	}
	many := map[string]string{}
	for i := range 100 {
		many[fmt.Sprintf("k%03d", i)] = "v"
	}
	if got := cutAttributes(many); len(got) != maxLogAttributes || got["k000"] == "" || got["k099"] != "" {
		t.Fatalf("%d attributes are kept", len(got))
	}
}

func TestTailAndSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLogBook("n", time.Now)
		one, two := b.open("web-1", "web"), b.open("web-2", "web")
		for i := range 3 {
			one.add(&pb.LogEntry{Message: fmt.Sprint("one ", i)})
			<-time.After(time.Second)
			two.add(&pb.LogEntry{Message: fmt.Sprint("two ", i)})
			<-time.After(time.Second)
		}
		for _, c := range []struct {
			req  *pb.FollowLogsRequest
			want []string
		}{
			{&pb.FollowLogsRequest{Targets: []string{"web"}}, []string{"one 0", "two 0", "one 1", "two 1", "one 2", "two 2"}},
			{&pb.FollowLogsRequest{Targets: []string{"web"}, Tail: 1}, []string{"one 2", "two 2"}},
			{&pb.FollowLogsRequest{Targets: []string{"web"}, Tail: -1}, nil},
			{&pb.FollowLogsRequest{Targets: []string{"web-1"}, Tail: 2}, []string{"one 1", "one 2"}},
			{&pb.FollowLogsRequest{Targets: []string{"web-1", "web-1"}, Tail: 1}, []string{"one 2"}},
			{&pb.FollowLogsRequest{Targets: []string{"web"}, Since: durationpb.New(2500 * time.Millisecond)}, []string{"one 2", "two 2"}},
			{&pb.FollowLogsRequest{Targets: []string{"web"}, Since: durationpb.New(time.Millisecond)}, nil},
		} {
			if got := kept(t, b, c.req); !slices.Equal(got, c.want) {
				t.Errorf("%v gives %q, want %q", c.req, got, c.want)
			}
		}
		for target, want := range map[string]pb.ErrorCode{
			"web-": pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "nix": pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND,
		} {
			err := b.follow(t.Context(), &pb.FollowLogsRequest{Targets: []string{target}}, nil)
			if apierror.CodeOf(err) != want {
				t.Errorf("%q: %v", target, err)
			}
		}
	})
}

func TestFollowersGetWhatComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLogBook("n", time.Now)
		b.open("web-1", "web").add(&pb.LogEntry{Message: "before"})
		var got []*pb.LogEntry
		done := make(chan error, 1)
		go func() {
			done <- b.follow(t.Context(), &pb.FollowLogsRequest{Targets: []string{"web"}, Follow: true}, func(e *pb.LogEntry) error {
				got = append(got, e)
				return nil
			})
		}()
		synctest.Wait()
		b.open("web-1", "web").add(&pb.LogEntry{Message: "after"})
		b.open("web-2", "web").add(&pb.LogEntry{Message: "a new replica"})
		b.open("job-1", "job").add(&pb.LogEntry{Message: "of another workload"})
		synctest.Wait()
		if want := []string{"before", "after", "a new replica"}; !slices.Equal(messages(got), want) {
			t.Fatalf("got %q", messages(got))
		}
		b.drop("web-1")
		synctest.Wait()
		if len(done) != 0 {
			t.Fatal("it ended while a replica is left")
		}
		b.drop("web-2")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if len(b.followers) != 0 {
			t.Fatal("the follower is still registered")
		}
	})
}

func TestASlowFollowerHoldsUpNobodyAndIsToldWhatItMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLogBook("n", time.Now)
		l := b.open("web-1", "web")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		gate, done := make(chan struct{}), make(chan error, 1)
		var got []*pb.LogEntry
		go func() {
			done <- b.follow(ctx, &pb.FollowLogsRequest{Targets: []string{"web"}, Follow: true}, func(e *pb.LogEntry) error {
				<-gate
				got = append(got, e)
				return nil
			})
		}()
		synctest.Wait()
		const total = 2*maxFollowLines + 1
		for i := range total {
			l.add(&pb.LogEntry{Message: fmt.Sprint(i)})
			synctest.Wait()
		}
		close(gate)
		synctest.Wait()
		l.add(&pb.LogEntry{Message: "last"})
		synctest.Wait()
		// The first line was taken at once; then one queue was filled.
		if len(got) != 1+maxFollowLines+1+1 || got[len(got)-1].GetMessage() != "last" {
			t.Fatalf("%d lines arrived", len(got))
		}
		note := got[len(got)-2]
		if want := fmt.Sprintf("%d lines were left out", total-1-maxFollowLines); !strings.HasPrefix(note.GetMessage(), want) || note.GetStream() != pb.LogStream_LOG_STREAM_SYSTEM {
			t.Fatalf("the note is %v", note)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatalf("it ended with %v", err)
		}
	})
}

func TestLogsSurviveRestartsOfTheInstance(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, leader *fakePeer) {
		agent := start(t, testConfig(t, n))
		agent.fake.OnStart(func(spec runtime.Spec) error {
			fmt.Fprintf(spec.Stdout, "generation %d\nunfinished", spec.Generation)
			return nil
		})
		leader.put(putInstance(instance(leader, "web-1")))
		within(t, time.Second, "it runs", agent.running("web-1"))
		agent.fake.Crash("web-1", trap)
		within(t, 5*time.Second, "it runs again", agent.running("web-1"))
		leader.put(putInstance(instance(leader, "web-1", generation(2))))
		within(t, 5*time.Second, "a new generation runs", leader.reports("web-1", stateRunning, 2))
		got := kept(t, agent.logs, &pb.FollowLogsRequest{Targets: []string{"web-1"}})
		if count(got, "generation 1") != 2 || count(got, "generation 2") != 1 || count(got, "unfinished") != 2 {
			t.Fatalf("kept %q", got)
		}
		if !slices.ContainsFunc(got, func(s string) bool {
			return strings.HasPrefix(s, "attempt 1 crashed: unreachable; starts again in ")
		}) {
			t.Fatalf("no note of the crash in %q", got)
		}
	})
}

func count(list []string, s string) (n int) {
	for _, l := range list {
		if l == s {
			n++
		}
	}
	return n
}
