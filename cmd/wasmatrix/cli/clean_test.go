package cli

import (
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestCleanEscapesWhatATerminalWouldObey(t *testing.T) {
	for in, want := range map[string]string{
		"plain, größer \u2026 \U0001f600": "plain, größer \u2026 \U0001f600",
		"a\tb\nc":                         "a\tb\nc",
		"a\r\nb":                          "a\nb",
		"\x1b[31mred":                     `\x1b[31mred`,
		"over\rwritten":                   `over\rwritten`,
		"bell\a\x00\x7f":                  `bell\x07\x00\x7f`,
		"c1 \u009b2J":                     `c1 \u009b2J`,
		"byte \x9b":                       `byte \x9b`,
		"turned \u202e":                   `turned \u202e`,
		"replaced \uFFFD":                 "replaced \uFFFD",
	} {
		if got := clean(in); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
	if got := cleanLine("a\tb\nc"); got != "a\tb"+`\nc` {
		t.Errorf("line: %q", got)
	}
	if got := cleanCell("a\tb\nc"); got != `a\tb\nc` {
		t.Errorf("cell: %q", got)
	}
}

// hostile is what a guest may say to take a terminal over.
const hostile = "\x1b]0;owned\x07\rdone\u009b2J"

func TestNoGuestTextReachesTheTerminalAsItIs(t *testing.T) {
	b := newBench(t)
	i := b.fake.add("web-1", pb.InstanceState_INSTANCE_STATE_CRASHED)
	i.Status.Message = hostile
	b.fake.logs = []*pb.LogEntry{
		{InstanceId: "web-1", Message: hostile + "\nother-1 | forged", Stream: pb.LogStream_LOG_STREAM_LOG, Attributes: map[string]string{hostile: hostile + "\n"}},
	}
	b.fake.events = append(b.fake.events, &pb.Event{Sequence: 1, Kind: pb.EventKind_EVENT_KIND_INSTANCE_CRASHED, InstanceId: "web-1", Message: hostile})
	b.fake.fail["Invoke"] = apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "%s", hostile+"\ntry:  rm -rf").With("key", hostile+"\n").Next("%s", hostile)
	for _, args := range [][]string{
		{"logs", "web-1"}, {"ps"}, {"instance", "get", "web-1"}, {"explain", "web-1"}, {"events"}, {"invoke", "web-1"},
	} {
		_, stdout, stderr := b.run(args...)
		all := stdout + stderr
		if strings.ContainsAny(all, "\x1b\x07\r\u009b") || !strings.Contains(all, `\x1b]0;owned`) {
			t.Errorf("%v printed %q", args, all)
		}
		if strings.Contains(all, "\nother-1") || strings.Contains(all, "\ntry:  rm") {
			t.Errorf("%v: the guest forged a line of %q", args, all)
		}
	}
}
