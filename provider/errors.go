package provider

import (
	"context"
	"errors"
	"fmt"
	"maps"
)

// Sentinels: what kind of failure a capability call met. Every error of this
// package and of every provider wraps exactly one of them.
var (
	// ErrInvalid: the request is malformed; sending it again unchanged fails again.
	ErrInvalid = errors.New("invalid request")
	// ErrDenied: the caller may not do this.
	ErrDenied = errors.New("permission denied")
	// ErrNotFound: no provider has this id.
	ErrNotFound = errors.New("provider not found")
	// ErrInstanceNotFound: the calling instance is not known.
	ErrInstanceNotFound = errors.New("instance not found")
	// ErrUnavailable: the provider exists and does not serve at the moment. Without
	// the detail "outcome": "unknown" the call was certainly not carried out.
	ErrUnavailable = errors.New("provider unavailable")
	// ErrExhausted: a limit was reached, such as a full disk.
	ErrExhausted = errors.New("resource exhausted")
	// ErrTimeout: the deadline passed first; the call may have been carried out.
	ErrTimeout = errors.New("timeout")
	// ErrCommunication: the other side could not be reached, or the connection
	// broke before an answer came. Without the detail "outcome": "unknown" the call
	// was certainly not carried out, or may be carried out twice.
	ErrCommunication = errors.New("communication failure")
	// ErrConflict: the request does not fit the present state.
	ErrConflict = errors.New("conflict")
	// ErrInternal: the provider itself failed, such as by a damaged file.
	ErrInternal = errors.New("internal error")
)

// Error is a failure with all that a user should see of it. Make one with Errorf
// and complete it with With, NextStep and Because before it is shared.
type Error struct {
	// Kind is one of the sentinels.
	Kind error
	// Message is one sentence in lower case without a final stop.
	Message string
	// Details are the state that was found; may be nil.
	Details map[string]string
	// Next is what to try next, as a command or an imperative; may be empty.
	Next string

	cause     error
	unsettled bool // mayHeal
	onTheWay  bool // OnTheWay
	denial    *Denial
}

// Errorf makes an Error of one of the sentinels.
func Errorf(kind error, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// With adds a detail of the state that was found and returns e.
func (e *Error) With(key, value string) *Error {
	if e.Details == nil {
		e.Details = map[string]string{}
	}
	e.Details[key] = value
	return e
}

// WithAll adds several details and returns e.
func (e *Error) WithAll(details map[string]string) *Error {
	if len(details) > 0 && e.Details == nil {
		e.Details = make(map[string]string, len(details))
	}
	maps.Copy(e.Details, details)
	return e
}

// NextStep sets what to try next and returns e.
func (e *Error) NextStep(format string, args ...any) *Error {
	e.Next = fmt.Sprintf(format, args...)
	return e
}

// Because sets the error that led to this one, for errors.Is and errors.As, and
// returns e. Its text is not added to the message.
func (e *Error) Because(err error) *Error {
	e.cause = err
	return e
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the sentinel and the cause.
func (e *Error) Unwrap() []error {
	if e.cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.cause}
}

// mayHeal marks a refusal that records under way to this node may lift.
func (e *Error) mayHeal() *Error {
	e.unsettled = true
	return e
}

// Unsettled reports whether err is a refusal that may only be due to records
// which have not reached this node yet. The serving side waits briefly before
// it makes such a refusal final.
func Unsettled(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.unsettled
}

// OnTheWay marks a failure of the way to another node, not of what is there, and
// returns e. A Remote marks that way what it says itself.
func (e *Error) OnTheWay() *Error {
	e.onTheWay = true
	return e
}

// TransportFailed reports whether err was marked with OnTheWay.
func TransportFailed(err error) bool {
	e, own := errors.AsType[*Error](err)
	return own && e.onTheWay
}

// FromContext returns the error for a call whose context has ended, or nil when
// ctx is alive: ErrTimeout after the deadline, ErrCommunication when the caller
// went away.
func FromContext(ctx context.Context) error {
	switch err := ctx.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return Errorf(ErrTimeout, "the deadline of the call has passed").Because(err)
	default:
		return Errorf(ErrCommunication, "the call was cancelled by its caller").Because(err)
	}
}
