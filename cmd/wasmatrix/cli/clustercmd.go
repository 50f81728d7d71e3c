package cli

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newCluster() *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "the control plane: its peers and snapshots"}
	snapshot := &cobra.Command{Use: "snapshot", Short: "save, restore and inspect the whole registry"}
	snapshot.AddCommand(a.newSnapshotSave(), a.newSnapshotRestore(), a.newSnapshotInspect())
	cmd.AddCommand(a.newPeers(), a.newTransferLeader(), a.newRemovePeer(), a.newPromote(), snapshot)
	return cmd
}

func (a *app) newPeers() *cobra.Command {
	return &cobra.Command{
		Use: "peers", Aliases: []string{"members"}, Short: "list the control-plane peers, as one of them sees them", Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			resp, err := c.Status(cmd.Context(), &pb.StatusRequest{})
			if err != nil {
				return err
			}
			var ids []string
			for _, p := range sortedPeers(resp) {
				ids = append(ids, p.GetId())
			}
			return a.print(result{message: resp, names: ids, table: func(w io.Writer) { peerTable(w, resp) }})
		}),
	}
}

func (a *app) newTransferLeader() *cobra.Command {
	return &cobra.Command{
		Use: "transfer-leader [PEER]", Short: "hand leadership to a peer, or to the most up-to-date one", Args: cobra.MaximumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			req := &pb.TransferLeadershipRequest{}
			if len(args) == 1 {
				req.PeerId = args[0]
			}
			resp, err := c.TransferLeadership(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.print(result{message: resp, names: []string{resp.GetLeaderId()}, table: func(w io.Writer) {
				fmt.Fprintf(w, "leadership moved from %s to %s\n", resp.GetPreviousLeaderId(), resp.GetLeaderId())
			}})
		}),
	}
}

func (a *app) newRemovePeer() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "remove PEER", Short: "take a peer out of the control plane", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.Remove(cmd.Context(), &pb.RemoveRequest{PeerId: args[0], Force: force})
			if err != nil {
				return err
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) { fmt.Fprintf(w, "peer %s removed\n", args[0]) }})
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove it even when a quorum then depends on peers that are not reached")
	return cmd
}

func (a *app) newPromote() *cobra.Command {
	return &cobra.Command{
		Use: "promote PEER", Short: "make a non-voter a voter", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.Promote(cmd.Context(), &pb.PromoteRequest{PeerId: args[0]})
			if err != nil {
				return err
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) { fmt.Fprintf(w, "peer %s votes\n", args[0]) }})
		}),
	}
}

func (a *app) newSnapshotSave() *cobra.Command {
	return &cobra.Command{
		Use: "save FILE", Short: "write a snapshot of the registry to a file, - for standard output", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			if args[0] == "-" {
				_, err := c.SnapshotSave(cmd.Context(), a.env.Stdout)
				return err
			}
			var index uint64
			n, err := writeFile(args[0], func(w io.Writer) (err error) {
				index, err = c.SnapshotSave(cmd.Context(), w)
				return err
			})
			if err != nil {
				return err
			}
			return a.print(result{message: &pb.SnapshotSaveResponse{Index: index}, names: args, table: func(w io.Writer) {
				fmt.Fprintf(w, "%s saved: index %d, %s\n", args[0], index, size(uint64(n)))
			}})
		}),
	}
}

// writeFile gives a file its content as a whole or leaves it alone.
func writeFile(path string, fill func(io.Writer) error) (n int64, err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return 0, Usage(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	w := bufio.NewWriter(tmp)
	err = fill(w)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err == nil {
		n, err = tmp.Seek(0, io.SeekCurrent)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	return n, err
}

func (a *app) newSnapshotRestore() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "replace the whole registry by a saved snapshot", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			summary, err := inspectFile(args[0])
			if err != nil {
				return err
			}
			if !yes {
				question := fmt.Sprintf("Replace everything that cluster knows by %s (index %d of %s)?", args[0],
					summary.header.GetIndex(), summary.header.GetTime().AsTime().Format("2006-01-02 15:04:05 MST"))
				if err := a.confirm(question); err != nil {
					return err
				}
			}
			f, err := openFile(args[0])
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			index, err := c.SnapshotRestore(cmd.Context(), f)
			if err != nil {
				return err
			}
			return a.print(result{message: &pb.SnapshotRestoreResponse{Index: index}, names: args, table: func(w io.Writer) {
				fmt.Fprintf(w, "%s restored: the registry is at index %d\n", args[0], index)
			}})
		}),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) newSnapshotInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect FILE", Short: "check a saved snapshot and tell what it holds; needs no cluster", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := inspectFile(args[0])
			if err != nil {
				return err
			}
			message, err := s.message()
			if err != nil {
				return err
			}
			return a.print(result{message: message, names: args, table: s.write})
		},
	}
}

// summary is what a snapshot holds.
type summary struct {
	header  *pb.SnapshotHeader
	records map[string]int
	bytes   int64
	digest  string
}

// maxRecordBytes bounds one record of a snapshot.
const maxRecordBytes = 64 << 20

// inspectFile reads a whole snapshot and checks its frame, count and checksum.
func inspectFile(path string) (*summary, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	s, err := inspect(f)
	if err != nil {
		return nil, usagef("%s is not a complete snapshot: %w", path, err)
	}
	return s, nil
}

func inspect(r io.Reader) (*summary, error) {
	digest := sha256.New()
	in := &summing{r: bufio.NewReader(r), w: digest}
	s := &summary{records: map[string]int{}}
	opts := protodelim.UnmarshalOptions{MaxSize: maxRecordBytes}
	for count := uint64(0); ; count++ {
		before := in.crc
		rec := &pb.SnapshotRecord{}
		err := opts.UnmarshalFrom(in, rec)
		switch {
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		}
		if count == 0 {
			if s.header = rec.GetHeader(); s.header == nil {
				return nil, errors.New("it does not begin with a header")
			}
			continue
		}
		if t := rec.GetTrailer(); t != nil {
			if t.GetRecords() != count || t.GetCrc32C() != before {
				return nil, errors.New("its checksum does not fit")
			}
			if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
				return nil, errors.New("something follows its end")
			}
			s.bytes, s.digest = in.n, fmt.Sprintf("sha256:%x", digest.Sum(nil))
			return s, nil
		}
		s.records[kindOf(rec)]++
	}
}

// kindOf names the kind of a record; a newer version may have more kinds.
func kindOf(rec *pb.SnapshotRecord) string {
	m := rec.ProtoReflect()
	if field := m.WhichOneof(m.Descriptor().Oneofs().ByName("record")); field != nil {
		return string(field.Name())
	}
	return "unknown"
}

// summing reads and sums up what was read.
type summing struct {
	r   *bufio.Reader
	w   io.Writer
	crc uint32
	n   int64
}

func (s *summing) note(p []byte) {
	_, _ = s.w.Write(p)
	s.crc = crc32.Update(s.crc, crc32.MakeTable(crc32.Castagnoli), p)
	s.n += int64(len(p))
}

func (s *summing) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.note(p[:n])
	return n, err
}

func (s *summing) ReadByte() (byte, error) {
	b, err := s.r.ReadByte()
	if err == nil {
		s.note([]byte{b})
	}
	return b, err
}

func (s *summary) write(w io.Writer) {
	fmt.Fprintf(w, "format %d · index %d · %s · %s · complete\n", s.header.GetFormat(), s.header.GetIndex(),
		s.header.GetTime().AsTime().UTC().Format("2006-01-02 15:04:05 MST"), size(uint64(s.bytes)))
	for _, kind := range slices.Sorted(maps.Keys(s.records)) {
		fmt.Fprintf(w, "  %-11s %d\n", kind, s.records[kind])
	}
	fmt.Fprintf(w, "state %x\n%s\n", s.header.GetStateHash(), s.digest)
}

func (s *summary) message() (*structpb.Struct, error) {
	records := map[string]any{}
	for kind, n := range s.records {
		records[kind] = n
	}
	return structpb.NewStruct(map[string]any{
		"format": s.header.GetFormat(), "index": s.header.GetIndex(), "time": s.header.GetTime().AsTime().UTC().Format("2006-01-02T15:04:05Z07:00"),
		"stateHash": fmt.Sprintf("%x", s.header.GetStateHash()), "bytes": s.bytes, "digest": s.digest, "records": records,
	})
}
