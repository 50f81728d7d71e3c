package gossip

import (
	"errors"
	"fmt"
	"net"
	"strconv"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// MaxMetadata is the largest encoded metadata of a member, in bytes. It is the
// limit of memberlist (memberlist.MetaMaxSize).
const MaxMetadata = 512

const (
	maxNameLength    = 63
	maxAddressLength = 255
	maxVersionLength = 64
	maxExpect        = 99
)

// ErrMetadata is wrapped by every error about metadata that is too long,
// cannot be decoded or breaks a rule.
var ErrMetadata = errors.New("bad peer metadata")

// EncodeMetadata returns the wire form of meta. It fails with ErrMetadata when
// meta breaks a rule that DecodeMetadata checks, or is longer than MaxMetadata.
func EncodeMetadata(meta *pb.PeerMetadata) ([]byte, error) {
	if err := check(meta); err != nil {
		return nil, err
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(meta)
	if err != nil {
		return nil, fmt.Errorf("%w: encode: %w", ErrMetadata, err)
	}
	if len(raw) > MaxMetadata {
		return nil, fmt.Errorf("%w: %d bytes encoded, at most %d", ErrMetadata, len(raw), MaxMetadata)
	}
	return raw, nil
}

// DecodeMetadata reads what another member tells about itself. The bytes come
// from the network and may be anything; what it returns satisfies the length
// and form rules of each field. It fails with ErrMetadata.
func DecodeMetadata(raw []byte) (*pb.PeerMetadata, error) {
	if len(raw) > MaxMetadata {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrMetadata, len(raw), MaxMetadata)
	}
	meta := &pb.PeerMetadata{}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, meta); err != nil {
		return nil, fmt.Errorf("%w: decode: %w", ErrMetadata, err)
	}
	if err := check(meta); err != nil {
		return nil, err
	}
	return meta, nil
}

func check(meta *pb.PeerMetadata) error {
	for name, value := range map[string]string{"cluster": meta.GetCluster(), "peer_id": meta.GetPeerId()} {
		if value == "" || len(value) > maxNameLength {
			return fmt.Errorf("%w: %s has %d bytes, want 1 to %d", ErrMetadata, name, len(value), maxNameLength)
		}
	}
	for name, value := range map[string]string{"raft_address": meta.GetRaftAddress(), "api_address": meta.GetApiAddress()} {
		if err := checkAddress(value); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrMetadata, name, err)
		}
	}
	if meta.GetBootstrapExpect() > maxExpect {
		return fmt.Errorf("%w: bootstrap_expect is %d, at most %d", ErrMetadata, meta.GetBootstrapExpect(), maxExpect)
	}
	if len(meta.GetVersion()) > maxVersionLength {
		return fmt.Errorf("%w: version has %d bytes, at most %d", ErrMetadata, len(meta.GetVersion()), maxVersionLength)
	}
	return nil
}

func checkAddress(address string) error {
	if len(address) > maxAddressLength {
		return fmt.Errorf("%d bytes, at most %d", len(address), maxAddressLength)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return fmt.Errorf("%q is not host:port", address)
	}
	return nil
}
