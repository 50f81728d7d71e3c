package fsm

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// MaxCommandBytes is the largest encoded command. It leaves room above the 16 MiB
// that the API accepts in one message.
const MaxCommandBytes = 32 << 20

// Errors of encoding and decoding commands.
var (
	// ErrCommandTooLarge means that a command exceeds MaxCommandBytes.
	ErrCommandTooLarge = errors.New("the command is too large")
	// ErrUnknownCommand means that a command has no payload this version knows. A
	// newer version wrote it, and a peer that skipped it would hold another state.
	ErrUnknownCommand = errors.New("the command has no payload that this version knows")
	// ErrDamagedCommand means that a log entry does not decode.
	ErrDamagedCommand = errors.New("the command is damaged")
)

// EncodeCommand returns the bytes of a command as they stand in the Raft log: the
// message in deterministic encoding. It fails with ErrUnknownCommand for a
// command without payload and with ErrCommandTooLarge.
func EncodeCommand(cmd *pb.Command) ([]byte, error) {
	if cmd.GetPayload() == nil {
		return nil, fmt.Errorf("encoding a command: %w", ErrUnknownCommand)
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(cmd)
	if err != nil {
		return nil, fmt.Errorf("encoding a command: %w", err)
	}
	if len(data) > MaxCommandBytes {
		return nil, fmt.Errorf("encoding a command of %d bytes: %w", len(data), ErrCommandTooLarge)
	}
	return data, nil
}

// DecodeCommand reads what EncodeCommand wrote. It fails with ErrDamagedCommand
// and ErrUnknownCommand.
func DecodeCommand(data []byte) (*pb.Command, error) {
	cmd := &pb.Command{}
	if err := proto.Unmarshal(data, cmd); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamagedCommand, err)
	}
	if cmd.GetPayload() == nil {
		return nil, ErrUnknownCommand
	}
	return cmd, nil
}
