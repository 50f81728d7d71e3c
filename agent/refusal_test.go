package agent

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestAGuestsRefusalIsBounded(t *testing.T) {
	for name, c := range map[string]struct{ message, want string }{
		"short":            {"out of stock", "out of stock"},
		"exactly":          {strings.Repeat("x", maxRefusal), strings.Repeat("x", maxRefusal)},
		"too long":         {strings.Repeat("x", 1<<20), strings.Repeat("x", maxRefusal)},
		"within a rune":    {"x" + strings.Repeat("é", 1<<10), "x" + strings.Repeat("é", maxRefusal/2-1)},
		"not UTF-8":        {"a\xffb", "a\uFFFDb"},
		"nothing but junk": {strings.Repeat("a\xff", 1<<10), ""},
	} {
		e := apierror.From(guestRefusal(&pb.Error{Code: pb.ErrorCode_ERROR_CODE_CONFLICT, Message: c.message}, "web-1"))
		got := bounded(c.message)
		if len(got) > maxRefusal || !utf8.ValidString(got) || c.want != "" && got != c.want {
			t.Errorf("%s: %d bytes, %.40q", name, len(got), got)
		}
		if e.Code() != pb.ErrorCode_ERROR_CODE_CONFLICT || !strings.Contains(e.Error(), got) || len(e.Error()) > maxRefusal+100 {
			t.Errorf("%s: the error is %.80q of %d bytes", name, e.Error(), len(e.Error()))
		}
	}
}
