package wasmatrix

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// Messaging is a messaging provider as this instance may use it. The zero value
// is the only messaging provider that the instance was granted. Package message
// handles what is delivered.
type Messaging struct {
	// Provider is the provider's id; empty means the only one granted.
	Provider string
}

// Publish sends a message to subject, which has no wildcards; at most 1 MiB and
// 32 header fields. It returns the message's number in its stream once a durable
// provider has stored it, and 0 from a provider that keeps nothing. It needs
// msg:publish.
func (m Messaging) Publish(subject string, payload []byte, headers ...Header) (sequence uint64, err error) {
	out, err := call(msgPublish, m.message(subject, payload, headers))
	if err != nil {
		return 0, err
	}
	err = wire.Fields(out, func(_ protowire.Number, v wire.Value) { sequence = v.Number })
	return sequence, err
}

// Reply is the answer to a request.
type Reply struct {
	// Payload is the content.
	Payload []byte
	// Headers are its header fields.
	Headers []Header
}

// Request sends a message to subject and waits for one reply, in whole
// milliseconds; a wait of 0 means 5 s. It needs msg:publish.
func (m Messaging) Request(subject string, payload []byte, wait time.Duration, headers ...Header) (Reply, error) {
	out, err := call(msgRequest, wire.AppendUint(m.message(subject, payload, headers), 5, timeout(wait)))
	if err != nil {
		return Reply{}, err
	}
	var reply Reply
	var bad error
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			reply.Payload = v.Bytes
		case 2:
			reply.Headers = appendHeader(reply.Headers, v.Bytes, &bad)
		}
	})
	if bad != nil {
		err = bad
	}
	return reply, err
}

// Subscribe subscribes the workload of this instance to subject, where * stands
// for one token and > at the end for the rest: each message goes to the message
// handler of one running replica. The subscription outlives restarts and moves
// of the instance; to subscribe again changes nothing. It needs msg:subscribe.
func (m Messaging) Subscribe(subject string) error {
	_, err := call(msgSubscribe, m.request(subject))
	return err
}

// Unsubscribe ends a subscription of this instance, named exactly as it was
// subscribed to, and reports whether there was one. It needs msg:subscribe.
func (m Messaging) Unsubscribe(subject string) (existed bool, err error) {
	out, err := call(msgUnsubscribe, m.request(subject))
	if err != nil {
		return false, err
	}
	err = wire.Fields(out, func(_ protowire.Number, v wire.Value) { existed = v.Number != 0 })
	return existed, err
}

func (m Messaging) request(subject string) []byte {
	return wire.AppendString(wire.AppendString(nil, 1, m.Provider), 2, subject)
}

func (m Messaging) message(subject string, payload []byte, headers []Header) []byte {
	return appendHeaders(wire.AppendBytes(m.request(subject), 3, payload), 4, headers)
}
