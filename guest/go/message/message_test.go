package message

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// result is a MessageResult as it goes to the host.
type result struct {
	verdict, after uint64
	reply, reason  string
}

func delivered(t *testing.T, in []byte) (r result) {
	t.Helper()
	err := wire.Fields(serve(in), func(n protowire.Number, v wire.Value) {
		switch n {
		case fieldVerdict:
			r.verdict = v.Number
		case fieldReply:
			r.reply = string(v.Bytes)
		case fieldRetryAfter:
			r.after = v.Number
		case fieldReason:
			r.reason = string(v.Bytes)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestVerdicts(t *testing.T) {
	t.Cleanup(func() { handler = nil })
	in := wire.AppendPair(wire.AppendString(wire.AppendString(nil, fieldSubject, "a.b"), fieldPayload, "in"), fieldHeaders, "Id", "7")
	if got := delivered(t, in); got.verdict != reject || got.reason != "this guest registered no handler for messages" {
		t.Errorf("without a handler: %+v", got)
	}
	for name, tc := range map[string]struct {
		give error
		want result
	}{
		"nil":               {nil, result{verdict: acknowledge, reply: "a.b in 7"}},
		"rejected":          {fmt.Errorf("around: %w", Reject("never %d", 1)), result{verdict: reject, reason: "around: never 1"}},
		"again in a while":  {Retry(1500*time.Microsecond, errors.New("later")), result{verdict: retry, after: 2, reason: "later"}},
		"again, no reason":  {Retry(0, nil), result{verdict: retry, reason: "asked for again"}},
		"again, in no time": {Retry(-time.Second, errors.New("later")), result{verdict: retry, reason: "later"}},
		"any other error":   {errors.New("no store"), result{verdict: retry, reason: "no store"}},
	} {
		Handle(func(m *Message) error {
			m.Reply([]byte("not sent"))
			m.Reply([]byte(m.Subject + " " + string(m.Payload) + " " + m.Header("ID")))
			return tc.give
		})
		if got := delivered(t, in); got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
	Handle(func(*Message) error { return nil })
	for _, damaged := range [][]byte{{0xff}, wire.AppendBytes(nil, fieldHeaders, []byte{0xff})} {
		if got := delivered(t, damaged); got.verdict != reject {
			t.Errorf("a malformed message: %+v", got)
		}
	}
}
