package fsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// MaxCommandBytes is the largest encoded command. It leaves room above the 16 MiB
// that the API accepts in one message.
const MaxCommandBytes = 32 << 20

// The envelope of a command in the log: one byte of format, the CRC32C of what
// follows in big endian, the message. No protobuf message begins with this byte,
// so bytes without an envelope are never taken for one.
const (
	envelopeFormat = 0x01
	envelopeHead   = 1 + crc32.Size
)

// Errors of encoding and decoding commands.
var (
	// ErrCommandTooLarge means that a command exceeds MaxCommandBytes.
	ErrCommandTooLarge = errors.New("the command is too large")
	// ErrUnknownCommand means that a command has no payload this version knows, or
	// expects something that it cannot check. A newer version wrote it, and a peer
	// that skipped it would hold another state.
	ErrUnknownCommand = errors.New("the command is not one that this version knows")
	// ErrDamagedCommand means that the bytes of a command are not those that its
	// proposer made.
	ErrDamagedCommand = errors.New("the command is damaged")
)

// EncodeCommand returns the bytes of a command as they stand in the Raft log: the
// message in deterministic encoding behind its checksum, which goes with it to
// every peer. It fails with ErrUnknownCommand for a command without payload and
// with ErrCommandTooLarge.
func EncodeCommand(cmd *pb.Command) ([]byte, error) {
	if cmd.GetPayload() == nil {
		return nil, fmt.Errorf("encoding a command: %w", ErrUnknownCommand)
	}
	opts := proto.MarshalOptions{Deterministic: true}
	size := envelopeHead + opts.Size(cmd)
	if size > MaxCommandBytes {
		return nil, fmt.Errorf("encoding a command of %d bytes: %w", size, ErrCommandTooLarge)
	}
	data, err := opts.MarshalAppend(make([]byte, envelopeHead, size), cmd)
	if err != nil {
		return nil, fmt.Errorf("encoding a command: %w", err)
	}
	data[0] = envelopeFormat
	binary.BigEndian.PutUint32(data[1:envelopeHead], crc32.Checksum(data[envelopeHead:], castagnoli()))
	return data, nil
}

// VerifyCommand checks the envelope of a command's bytes, which is cheap: whoever
// stores or reads them can do it. It fails with ErrDamagedCommand.
func VerifyCommand(data []byte) error {
	if len(data) < envelopeHead || data[0] != envelopeFormat {
		return fmt.Errorf("%w: %d bytes without the envelope of a command", ErrDamagedCommand, len(data))
	}
	want := binary.BigEndian.Uint32(data[1:envelopeHead])
	if got := crc32.Checksum(data[envelopeHead:], castagnoli()); got != want && !plant.On(plant.ChecksumOff) {
		return fmt.Errorf("%w: its CRC32C is %08x, its proposer made %08x", ErrDamagedCommand, got, want)
	}
	return nil
}

// DecodeCommand verifies and reads what EncodeCommand wrote. It fails with
// ErrDamagedCommand and ErrUnknownCommand.
func DecodeCommand(data []byte) (*pb.Command, error) {
	if err := VerifyCommand(data); err != nil {
		return nil, err
	}
	cmd := &pb.Command{}
	if err := proto.Unmarshal(data[envelopeHead:], cmd); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamagedCommand, err)
	}
	if cmd.GetPayload() == nil {
		return nil, fmt.Errorf("%w: it has no known payload", ErrUnknownCommand)
	}
	for _, p := range cmd.GetPreconditions() {
		if p.GetRecord() == nil {
			return nil, fmt.Errorf("%w: it has no known precondition", ErrUnknownCommand)
		}
	}
	return cmd, nil
}
