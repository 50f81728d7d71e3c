package wasmatrix

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
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
}

// Error returns the message and the code.
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

func decodeError(code Code, b []byte) error {
	e := &Error{Code: code}
	_ = fields(b, func(n protowire.Number, v value) {
		if n == 2 {
			e.Message = string(v.bytes)
		}
	})
	return e
}

func encodeError(err error) []byte {
	var own *Error
	if !errors.As(err, &own) {
		own = &Error{Code: Internal}
	}
	b := appendUint(nil, 1, uint64(own.Code))
	return appendBytes(b, 2, []byte(err.Error()))
}
