package invoke

import (
	"errors"
	"fmt"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// called serves one call and returns the fields of the answer.
func called(t *testing.T, in []byte) map[protowire.Number]string {
	t.Helper()
	out := map[protowire.Number]string{}
	if err := wire.Fields(serve(in), func(n protowire.Number, v wire.Value) { out[n] = string(v.Bytes) }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestServe(t *testing.T) {
	t.Cleanup(func() { handler = nil })
	refused := func(code wasmatrix.Code, text string) string {
		b := wire.AppendError(nil, 1, uint32(code), text, nil)
		return string(b[2:])
	}
	in := wire.AppendString(wire.AppendString(wire.AppendString(nil, fieldTarget, "me"), fieldInput, "in"), fieldInputType, "a/b")
	if got := called(t, in); got[fieldOutputRefuse] != refused(wasmatrix.InvalidRequest, "this guest registered no handler for calls") {
		t.Errorf("without a handler: %q", got)
	}
	Handle(func(r Request) (Response, error) {
		return Response{Payload: append([]byte(r.Target+" "), r.Payload...), ContentType: r.ContentType}, nil
	})
	if got := called(t, in); len(got) != 2 || got[fieldOutput] != "me in" || got[fieldOutputType] != "a/b" {
		t.Errorf("an answer: %q", got)
	}
	if got := called(t, []byte{0xff}); got[fieldOutputRefuse] == "" {
		t.Errorf("a malformed call: %q", got)
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{errors.New("broken"), refused(wasmatrix.Internal, "broken")},
		{fmt.Errorf("around: %w", wasmatrix.Errorf(wasmatrix.Conflict, "no")), refused(wasmatrix.Conflict, "around: no")},
	} {
		Handle(func(Request) (Response, error) { return Response{Payload: []byte("not sent")}, tc.err })
		if got := called(t, in); len(got) != 1 || got[fieldOutputRefuse] != tc.want {
			t.Errorf("%v: %q, want %q", tc.err, got, tc.want)
		}
	}
}
