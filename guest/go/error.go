package wasmatrix

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Code says what kind of failure an Error is. The numbers are those of
// wasmatrix.v1.ErrorCode.
type Code uint32

// The codes.
const (
	InvalidRequest       Code = 1
	InstanceNotFound     Code = 2
	ProviderNotFound     Code = 3
	ModuleNotFound       Code = 4
	NodeNotFound         Code = 5
	PermissionDenied     Code = 6
	ResourceExhausted    Code = 7
	Unavailable          Code = 8
	CommunicationFailure Code = 9
	Timeout              Code = 10
	Conflict             Code = 11
	NoLeader             Code = 12
	Internal             Code = 13
)

// ErrNotFound is returned by KV.Get for a key that does not exist.
var ErrNotFound = errors.New("key not found")

// Error is a refused or failed capability call, or a handler's own refusal.
type Error struct {
	// Code is the kind of failure.
	Code Code
	// Message says what failed.
	Message string
	// Details tell the state that was found; nil when there is nothing to tell.
	// "outcome" is "unknown" when the call may have had its effect all the same.
	Details map[string]string
}

// Error returns the message, or the code when there is none.
func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("capability call failed with code %d", e.Code)
	}
	return e.Message
}

// Errorf makes an Error for a handler to return.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of the *Error that err is or wraps, and 0 for any
// other error.
func CodeOf(err error) Code {
	var own *Error
	if errors.As(err, &own) {
		return own.Code
	}
	return 0
}

// decodeError reads what the host says about a failure. The code is known
// without it, so that a malformed text loses only the text.
func decodeError(code Code, b []byte) error {
	e := &Error{Code: code}
	_ = wire.Fields(b, func(n protowire.Number, v wire.Value) {
		switch n {
		case 2:
			e.Message = string(v.Bytes)
		case 3:
			key, text, _ := wire.Pair(v.Bytes)
			if e.Details == nil {
				e.Details = map[string]string{}
			}
			e.Details[key] = text
		}
	})
	return e
}
