package channel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Kind says what a frame is.
type Kind byte

// What the host sends.
const (
	// Hello is the first frame of a machine that was booted or cloned; answered by Done.
	Hello Kind = iota + 1
	// Load carries the next piece of the module; no answer.
	Load
	// Prepare carries a Spec; answered by Done or Failed.
	Prepare
	// Start starts what was prepared; answered by Done or Failed.
	Start
	// Invoke carries an Invocation; answered by Done with the answer, or Failed.
	Invoke
	// Cancel says that nobody waits any more for the Invoke of the same id; no answer.
	Cancel
	// Stop carries the grace; answered by Ended.
	Stop
	// Answer is the answer to the Call of the same id.
	Answer
	// Refusal is the failure of the Call of the same id.
	Refusal
	// Written says that the Output of the same id was taken.
	Written
	// Warm carries a Spec: compile the module and make the machine fit to be
	// copied; answered by Done or Failed.
	Warm
	// Settle makes a machine that has booted fit to be copied; answered by Done.
	Settle
	// Rehearse carries a Spec: go through a start of the module that nobody sees, so
	// that the next one is quick; answered by Done or Failed.
	Rehearse
)

// What the guest sends.
const (
	// Ready says that the machine has booted and waits for its Hello.
	Ready Kind = iota + 65
	// Done is the good end of an exchange that the host opened.
	Done
	// Failed is its bad end: a Failure.
	Failed
	// Call carries a CapabilityCall; answered by Answer or Refusal.
	Call
	// Abandon says that nobody waits any more for the Call of the same id; no answer.
	Abandon
	// Output carries a stream's number and what was written to it; answered by Written.
	Output
	// Ended carries an Exit; the last frame of a machine.
	Ended
	// Usage carries the present size of the linear memories, 8 bytes.
	Usage
)

// Bounds of payloads in bytes.
const (
	// MaxFromGuest bounds what the host accepts: the largest message of the guest
	// interface, 4 MiB and 64 KiB, with what stands around it.
	MaxFromGuest = 4<<20 + 128<<10
	// MaxFromHost bounds what the guest accepts.
	MaxFromHost = 64 << 20
	// Piece is how much of a module one Load carries.
	Piece = 1 << 20
	// MaxOutput bounds one Output.
	MaxOutput = 64 << 10
)

const headerBytes = 13

// ErrMalformed means that what came is no frame or no message of this version.
var ErrMalformed = errors.New("malformed message")

// Frame is one frame.
type Frame struct {
	Kind    Kind
	ID      uint64
	Payload []byte
}

// Conn sends and receives frames. Send may be called concurrently; Receive by one
// goroutine at a time. It does not close the stream.
type Conn struct {
	reader *bufio.Reader
	most   uint32

	mu     sync.Mutex
	writer io.Writer
	buffer []byte
}

// New returns a Conn over a stream that accepts payloads of up to most bytes.
func New(stream io.ReadWriter, most uint32) *Conn {
	return &Conn{reader: bufio.NewReaderSize(stream, 64<<10), writer: stream, most: most}
}

// Send writes one frame whose payload is the concatenation of parts. It blocks
// while the other side does not read.
func (c *Conn) Send(kind Kind, id uint64, parts ...[]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	b := binary.LittleEndian.AppendUint32(c.buffer[:0], uint32(size))
	b = append(b, byte(kind))
	b = binary.LittleEndian.AppendUint64(b, id)
	for _, p := range parts {
		b = append(b, p...)
	}
	// A buffer that one large frame needed is not kept.
	if cap(b) <= 64<<10 {
		c.buffer = b
	}
	if _, err := c.writer.Write(b); err != nil {
		return fmt.Errorf("writing to the channel: %w", err)
	}
	return nil
}

// Receive reads the next frame; its payload belongs to the caller.
func (c *Conn) Receive() (Frame, error) {
	var h [headerBytes]byte
	if _, err := io.ReadFull(c.reader, h[:]); err != nil {
		return Frame{}, fmt.Errorf("reading from the channel: %w", err)
	}
	size := binary.LittleEndian.Uint32(h[:])
	if size > c.most {
		return Frame{}, fmt.Errorf("%w: a frame of %d bytes, at most %d are allowed", ErrMalformed, size, c.most)
	}
	f := Frame{Kind: Kind(h[4]), ID: binary.LittleEndian.Uint64(h[5:]), Payload: make([]byte, size)}
	if _, err := io.ReadFull(c.reader, f.Payload); err != nil {
		return Frame{}, fmt.Errorf("reading from the channel: %w", err)
	}
	return f, nil
}

// Stream is the first byte of an Output: which stream was written to.
type Stream byte

// The streams.
const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// IsCommand is what follows the number in the Done of a Prepare whose module is a
// command; nothing does for a reactor.
const IsCommand byte = 1
