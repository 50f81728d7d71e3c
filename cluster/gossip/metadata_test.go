package gossip

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestMetadataRules(t *testing.T) {
	long := strings.Repeat("x", 300)
	tests := map[string]struct {
		change func(*pb.PeerMetadata)
		ok     bool
	}{
		"good":             {func(*pb.PeerMetadata) {}, true},
		"no id":            {func(m *pb.PeerMetadata) { m.PeerId = "" }, false},
		"no cluster":       {func(m *pb.PeerMetadata) { m.Cluster = "" }, false},
		"long id":          {func(m *pb.PeerMetadata) { m.PeerId = long }, false},
		"no raft port":     {func(m *pb.PeerMetadata) { m.RaftAddress = "127.0.0.1" }, false},
		"port zero":        {func(m *pb.PeerMetadata) { m.ApiAddress = "127.0.0.1:0" }, false},
		"no api host":      {func(m *pb.PeerMetadata) { m.ApiAddress = ":7400" }, false},
		"long address":     {func(m *pb.PeerMetadata) { m.ApiAddress = long + ":1" }, false},
		"absurd expect":    {func(m *pb.PeerMetadata) { m.BootstrapExpect = 1000 }, false},
		"long version":     {func(m *pb.PeerMetadata) { m.Version = long }, false},
		"too long in sum":  {func(m *pb.PeerMetadata) { m.RaftAddress, m.ApiAddress = long[:250]+":1", long[:250]+":2" }, false},
		"expected at boot": {func(m *pb.PeerMetadata) { m.BootstrapExpect = 5; m.Bootstrapped = true }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			meta := metadata("n1")
			tt.change(meta)
			raw, err := EncodeMetadata(meta)
			if tt.ok != (err == nil) {
				t.Fatalf("encode: %v", err)
			}
			if err != nil {
				if !errors.Is(err, ErrMetadata) {
					t.Errorf("%v does not wrap ErrMetadata", err)
				}
				return
			}
			back, err := DecodeMetadata(raw)
			if err != nil || !proto.Equal(meta, back) {
				t.Errorf("decoded %v, %v; want %v", back, err, meta)
			}
		})
	}
}

func FuzzDecodeMetadata(f *testing.F) {
	good, err := EncodeMetadata(metadata("n1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 600))
	f.Fuzz(func(t *testing.T, raw []byte) {
		meta, err := DecodeMetadata(raw)
		if err != nil {
			if !errors.Is(err, ErrMetadata) {
				t.Fatalf("%v does not wrap ErrMetadata", err)
			}
			return
		}
		again, err := EncodeMetadata(meta)
		if err != nil {
			t.Fatalf("accepted what cannot be sent: %v", err)
		}
		if back, err := DecodeMetadata(again); err != nil || !proto.Equal(meta, back) {
			t.Fatalf("round trip: %v, %v", back, err)
		}
	})
}
