// Package message handles messages of subjects that the workload is subscribed
// to: by a subscribe trigger in its manifest, or by Messaging.Subscribe.
// Importing it makes a module a reactor with the handler wasmatrix_on_message.
package message

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Message is one message as it is delivered. It is valid until the handler returns.
type Message struct {
	// Subject is what it was published to.
	Subject string
	// Payload is the content.
	Payload []byte
	// Headers are its header fields.
	Headers []wasmatrix.Header
	// Subscription is the subscription that it matched.
	Subscription string
	// Provider is the id of the provider that delivers it.
	Provider string
	// Delivery counts the deliveries of this message, from 1.
	Delivery uint32
	// WantsReply is true when the sender waits for a reply.
	WantsReply bool
	// Sequence is the message's number in its stream; 0 when nothing keeps it.
	Sequence uint64

	reply []byte
}

// Header returns the first value of the header field name, in any case, or "".
func (m *Message) Header(name string) string { return wasmatrix.HeaderValue(m.Headers, name) }

// Reply answers the sender once the handler has returned nil; the last one
// counts. A sender that does not wait gets none.
func (m *Message) Reply(payload []byte) { m.reply = payload }

// Handler handles one message. Nil acknowledges it. An error of Reject says that
// it can never be handled, one of Retry that it is to be delivered again; any
// other error means Retry with the provider's own backoff. How often a message
// is delivered again, if at all, is the provider's to say: one that keeps no
// messages may lose it.
type Handler func(*Message) error

var handler Handler

// Handle registers the handler. Call it from an init function.
func Handle(h Handler) { handler = h }

// verdict is an error that says what became of a message.
type verdict struct {
	err    error
	after  time.Duration
	reject bool
}

func (v *verdict) Error() string { return v.err.Error() }
func (v *verdict) Unwrap() error { return v.err }

// Reject returns an error with which a handler says that a message can never be
// handled: it is not delivered again. The text, made as by fmt.Errorf, is shown
// to operators.
func Reject(format string, args ...any) error {
	return &verdict{err: fmt.Errorf(format, args...), reject: true}
}

// Retry returns an error with which a handler asks for a message again, in whole
// milliseconds after the given time; 0 means the provider's backoff. The reason
// is shown to operators.
func Retry(after time.Duration, reason error) error {
	if reason == nil {
		reason = errors.New("asked for again")
	}
	return &verdict{err: reason, after: max(0, after)}
}

// The fields of wasmatrix.v1.Message and MessageResult, and the values of
// MessageVerdict.
const (
	fieldSubject      = 1
	fieldPayload      = 2
	fieldHeaders      = 3
	fieldSubscription = 4
	fieldProvider     = 5
	fieldDelivery     = 6
	fieldWantsReply   = 7
	fieldSequence     = 8

	fieldVerdict    = 1
	fieldReply      = 2
	fieldRetryAfter = 3
	fieldReason     = 4

	acknowledge = 1
	retry       = 2
	reject      = 3
)

func serve(in []byte) []byte {
	m := &Message{}
	err := decode(in, m)
	switch {
	case err != nil:
		err = Reject("%w", err)
	case handler == nil:
		err = Reject("this guest registered no handler for messages")
	default:
		err = handler(m)
	}
	if err == nil {
		return wire.AppendBytes(wire.AppendUint(nil, fieldVerdict, acknowledge), fieldReply, m.reply)
	}
	v := &verdict{err: err}
	errors.As(err, &v)
	says := uint64(retry)
	if v.reject {
		says = reject
	}
	b := wire.AppendUint(nil, fieldVerdict, says)
	b = wire.AppendUint(b, fieldRetryAfter, wire.Milliseconds(v.after))
	return wire.AppendString(b, fieldReason, err.Error())
}

func decode(b []byte, m *Message) error {
	var bad error
	err := wire.Fields(b, func(n protowire.Number, v wire.Value) {
		switch n {
		case fieldSubject:
			m.Subject = string(v.Bytes)
		case fieldPayload:
			m.Payload = v.Bytes
		case fieldHeaders:
			name, value, err := wire.Pair(v.Bytes)
			bad = errors.Join(bad, err)
			m.Headers = append(m.Headers, wasmatrix.Header{Name: name, Value: value})
		case fieldSubscription:
			m.Subscription = string(v.Bytes)
		case fieldProvider:
			m.Provider = string(v.Bytes)
		case fieldDelivery:
			m.Delivery = uint32(v.Number)
		case fieldWantsReply:
			m.WantsReply = v.Number != 0
		case fieldSequence:
			m.Sequence = v.Number
		}
	})
	return errors.Join(err, bad)
}
