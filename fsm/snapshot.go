package fsm

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/internal/plant"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// snapshotFormat is the version of the format that is written; all from
	// oldestFormat on are read.
	snapshotFormat = 3
	oldestFormat   = 1
	// maxRecordBytes bounds one record of a snapshot. A record comes from one
	// command of at most MaxCommandBytes.
	maxRecordBytes = 2 * MaxCommandBytes
)

// castagnoli returns the table of CRC32C.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// WriteSnapshot writes the state that v shows to w: length-delimited
// pb.SnapshotRecord messages, the header first, then nodes, peers, modules,
// instances, providers, assignments, events, answers by age, client sessions and
// the answers they keep, each table in the order of its keys, and the trailer last. Equal states give equal bytes. It holds one
// record at a time in memory; Apply goes on meanwhile. It neither flushes nor
// closes w.
func (s *State) WriteSnapshot(v View, w io.Writer) error {
	out := &recordWriter{w: bufio.NewWriter(w), crc: crc32.New(castagnoli())}
	out.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Header{Header: v.header()}})
	for _, part := range snapshotParts() {
		it, err := v.txn.Get(part.table, part.order)
		must(err)
		for raw := it.Next(); raw != nil && out.err == nil; raw = it.Next() {
			out.write(wrap(raw))
		}
	}
	out.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Trailer{Trailer: &pb.SnapshotTrailer{
		Records: out.records,
		Crc32C:  out.crc.Sum32(),
	}}})
	if out.err != nil {
		return fmt.Errorf("writing a snapshot: %w", out.err)
	}
	if err := out.w.Flush(); err != nil {
		return fmt.Errorf("writing a snapshot: %w", err)
	}
	return nil
}

func (v View) header() *pb.SnapshotHeader {
	return &pb.SnapshotHeader{
		Format:        snapshotFormat,
		Index:         v.sum.index,
		StateHash:     v.sum.hash[:],
		Time:          v.sum.time,
		EventSequence: v.sum.lastEvent,
		ClusterId:     v.sum.clusterID,
		Denials:       v.sum.denials.message(),
	}
}

// snapshotPart is a table, or a part of one, in a snapshot.
type snapshotPart struct {
	table string
	// order names the index that gives the records and their order.
	order string
}

// snapshotParts lists the parts of a snapshot in their order. Answers by age are
// forgotten in the same order after a restore.
func snapshotParts() []snapshotPart {
	return []snapshotPart{
		{tableNodes, indexID},
		{tablePeers, indexID},
		{tableModules, indexID},
		{tableInstances, indexID},
		{tableProviders, indexID},
		{tableAssignments, indexID},
		{tableEvents, indexID},
		{tableDedup, indexOrder},
		{tableSessions, indexID},
		{tableDedup, indexSession},
	}
}

func wrap(rec any) *pb.SnapshotRecord {
	switch r := rec.(type) {
	case *pb.Node:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Node{Node: r}}
	case *pb.Peer:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Peer{Peer: r}}
	case *pb.Module:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Module{Module: r}}
	case *pb.Instance:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Instance{Instance: r}}
	case *pb.Provider:
		if plant.On(plant.LostSnapshotField) {
			r = shallow(r)
			r.SpecVersion = 0
		}
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Provider{Provider: r}}
	case *pb.CapabilityAssignment:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Assignment{Assignment: r}}
	case *pb.Event:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Event{Event: r}}
	case *pb.ClientSession:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Session{Session: r}}
	case *pb.DedupRecord:
		return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Dedup{Dedup: r}}
	default:
		return nil
	}
}

// recordWriter frames records as protodelim does: a varint length, then the
// message. After the first error it does nothing.
type recordWriter struct {
	w       *bufio.Writer
	crc     hash.Hash32
	buf     []byte
	records uint64
	err     error
}

func (o *recordWriter) write(rec *pb.SnapshotRecord) {
	if o.err != nil {
		return
	}
	opts := proto.MarshalOptions{Deterministic: true}
	size := opts.Size(rec)
	if size > maxRecordBytes {
		o.err = fmt.Errorf("a record has %d bytes, more than %d", size, maxRecordBytes)
		return
	}
	o.buf = binary.AppendUvarint(o.buf[:0], uint64(size))
	o.buf, o.err = opts.MarshalAppend(o.buf, rec)
	if o.err != nil {
		return
	}
	o.crc.Write(o.buf)
	o.records++
	_, o.err = o.w.Write(o.buf)
}
