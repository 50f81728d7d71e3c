package fsm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

var (
	// ErrBadSnapshot means that a snapshot is damaged, cut off, or not one at all.
	ErrBadSnapshot = errors.New("the snapshot is damaged")
	// ErrSnapshotFormat means that a snapshot is in a format this version does not read.
	ErrSnapshotFormat = errors.New("the snapshot has a format that this version does not read")
)

// Restore replaces the whole state by a snapshot, up to the end of r. It checks
// the format, the order of the records, their number and their CRC32C first; on
// an error, which wraps ErrBadSnapshot, ErrSnapshotFormat or the error of r, the
// state stays as it was. Everyone who waits for a change is woken.
func (s *State) Restore(r io.Reader) error {
	b := s.begin()
	for _, table := range append(snapshotParts(), snapshotPart{table: tableLoads}) {
		_, err := b.txn.DeleteAll(table.table, indexID)
		must(err)
	}
	in := restorer{txn: b.txn}
	header, err := readSnapshot(r, in.put)
	if err != nil {
		b.abort()
		return fmt.Errorf("restoring a snapshot: %w", err)
	}
	in.sum.index = header.GetIndex()
	in.sum.time = header.GetTime()
	in.sum.hash = digest(header.GetStateHash())
	in.sum.clusterID = header.GetClusterId()
	in.sum.lastEvent = header.GetEventSequence()
	in.sum.denials = denialWindow{header.GetDenials().GetMinute(), header.GetDenials().GetRecorded()}
	b.sum = in.sum
	b.replace()
	return nil
}

// InspectSnapshot checks a snapshot as Restore does and returns its header,
// without touching any state. Whoever hands a snapshot of another cluster to
// Raft needs its index: the log must go on above it.
func InspectSnapshot(r io.Reader) (*pb.SnapshotHeader, error) {
	header, err := readSnapshot(r, func(*pb.SnapshotRecord) {})
	if err != nil {
		return nil, fmt.Errorf("inspecting a snapshot: %w", err)
	}
	return header, nil
}

// restorer puts records into tables.
type restorer struct {
	txn      *memdb.Txn
	sum      summary
	previous *pb.Instance
}

func (in *restorer) put(rec *pb.SnapshotRecord) {
	switch r := rec.GetRecord().(type) {
	case *pb.SnapshotRecord_Node:
		must(in.txn.Insert(tableNodes, r.Node))
	case *pb.SnapshotRecord_Peer:
		must(in.txn.Insert(tablePeers, r.Peer))
	case *pb.SnapshotRecord_Module:
		must(in.txn.Insert(tableModules, r.Module))
	case *pb.SnapshotRecord_Instance:
		in.shareSpec(r.Instance)
		must(in.txn.Insert(tableInstances, r.Instance))
		addLoad(in.txn, loadNode(r.Instance), 1)
	case *pb.SnapshotRecord_Provider:
		must(in.txn.Insert(tableProviders, r.Provider))
	case *pb.SnapshotRecord_Assignment:
		must(in.txn.Insert(tableAssignments, r.Assignment))
	case *pb.SnapshotRecord_Event:
		must(in.txn.Insert(tableEvents, r.Event))
		in.sum.eventCount++
	case *pb.SnapshotRecord_Dedup:
		must(in.txn.Insert(tableDedup, r.Dedup))
		in.sum.countAnswer(r.Dedup, 1)
	case *pb.SnapshotRecord_Session:
		must(in.txn.Insert(tableSessions, r.Session))
		in.sum.sessionCount++
	}
}

// shareSpec lets replicas share one spec again, as they did before the snapshot.
// They follow each other because their ids begin with the workload's name.
func (in *restorer) shareSpec(next *pb.Instance) {
	if in.previous.GetName() == next.GetName() && proto.Equal(in.previous.GetSpec(), next.GetSpec()) {
		next.Spec = in.previous.GetSpec()
	}
	in.previous = next
}

// readSnapshot reads and checks a whole snapshot. It calls put for each record
// between header and trailer as it goes; only when it returns without an error
// may what was put be believed.
func readSnapshot(r io.Reader, put func(*pb.SnapshotRecord)) (*pb.SnapshotHeader, error) {
	src := &recordReader{r: bufio.NewReader(r), table: castagnoli()}
	rec, err := src.read()
	if err != nil {
		return nil, err
	}
	header := rec.GetHeader()
	if err := checkHeader(header); err != nil {
		return nil, err
	}
	order := sequence{sessions: map[string]bool{}}
	for {
		before := src.crc
		rec, err := src.read()
		if err != nil {
			return nil, err
		}
		if trailer := rec.GetTrailer(); trailer != nil {
			if err := order.end(header.GetEventSequence()); err != nil {
				return nil, err
			}
			return header, src.end(trailer, before)
		}
		if err := order.next(rec); err != nil {
			return nil, err
		}
		put(rec)
	}
}

func checkHeader(h *pb.SnapshotHeader) error {
	switch {
	case h == nil:
		return fmt.Errorf("%w: it does not begin with a header", ErrBadSnapshot)
	case h.GetFormat() < oldestFormat || h.GetFormat() > snapshotFormat:
		return fmt.Errorf("%w: format %d, not %d to %d", ErrSnapshotFormat, h.GetFormat(), oldestFormat, snapshotFormat)
	case len(h.GetStateHash()) != len(digest{}):
		return fmt.Errorf("%w: its state hash has %d bytes", ErrBadSnapshot, len(h.GetStateHash()))
	case h.GetTime() != nil && !h.GetTime().IsValid():
		return fmt.Errorf("%w: its time is invalid", ErrBadSnapshot)
	}
	return nil
}

// recordReader reads framed records and keeps their CRC. Memory grows with what
// is really there, not with what a damaged length claims.
type recordReader struct {
	r       *bufio.Reader
	table   *crc32.Table
	frame   bytes.Buffer
	crc     uint32
	records uint64
}

func (s *recordReader) read() (*pb.SnapshotRecord, error) {
	size, err := binary.ReadUvarint(s.r)
	if err != nil {
		return nil, cutOff(err)
	}
	if size > maxRecordBytes {
		return nil, fmt.Errorf("%w: record %d claims %d bytes", ErrBadSnapshot, s.records, size)
	}
	s.frame.Reset()
	s.frame.Write(binary.AppendUvarint(nil, size))
	head := s.frame.Len()
	if _, err := io.CopyN(&s.frame, s.r, int64(size)); err != nil {
		return nil, cutOff(err)
	}
	rec := &pb.SnapshotRecord{}
	if err := proto.Unmarshal(s.frame.Bytes()[head:], rec); err != nil {
		return nil, fmt.Errorf("%w: record %d: %w", ErrBadSnapshot, s.records, err)
	}
	s.crc = crc32.Update(s.crc, s.table, s.frame.Bytes())
	s.records++
	return rec, nil
}

// end checks the trailer, which must be exactly as it would be written, against
// the CRC before it, and that nothing follows.
func (s *recordReader) end(trailer *pb.SnapshotTrailer, crc uint32) error {
	want := &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Trailer{
		Trailer: &pb.SnapshotTrailer{Records: s.records - 1, Crc32C: crc},
	}}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
	must(err)
	if !bytes.Equal(s.frame.Bytes(), append(binary.AppendUvarint(nil, uint64(len(body))), body...)) {
		return fmt.Errorf("%w: %d records with CRC %08x, the trailer says %d with %08x", ErrBadSnapshot,
			s.records-1, crc, trailer.GetRecords(), trailer.GetCrc32C())
	}
	switch _, err := s.r.ReadByte(); {
	case err == nil:
		return fmt.Errorf("%w: it goes on after its trailer", ErrBadSnapshot)
	case !errors.Is(err, io.EOF):
		return err
	}
	return nil
}

// cutOff turns an end of the data within a snapshot into ErrBadSnapshot.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it is cut off", ErrBadSnapshot)
	}
	return err
}

// sequence checks that records come in the order that WriteSnapshot gives them,
// each key once, and that no event is missing.
type sequence struct {
	place  int
	key    string
	number uint64
	event  uint64
	// sessions are the ids of those seen; an answer that a session keeps needs it.
	sessions map[string]bool
}

func (q *sequence) next(rec *pb.SnapshotRecord) error {
	place, key, number := keyOf(rec)
	switch {
	case key == "" && number == 0:
		return fmt.Errorf("%w: a record has no key or is of no known kind", ErrBadSnapshot)
	case place < q.place:
		return fmt.Errorf("%w: its tables are out of order", ErrBadSnapshot)
	case place == q.place && key <= q.key && number <= q.number:
		return fmt.Errorf("%w: its records are out of order", ErrBadSnapshot)
	}
	q.place, q.key, q.number = place, key, number
	switch {
	case rec.GetSession() != nil:
		q.sessions[key] = true
		return nil
	case rec.GetDedup().GetSessionId() != "" && !q.sessions[rec.GetDedup().GetSessionId()]:
		return fmt.Errorf("%w: an answer is of a session that is not in it", ErrBadSnapshot)
	case rec.GetEvent() == nil:
		return nil
	}
	if q.event != 0 && number != q.event+1 {
		return fmt.Errorf("%w: event %d is missing", ErrBadSnapshot, q.event+1)
	}
	q.event = number
	return nil
}

func (q *sequence) end(lastEvent uint64) error {
	if q.event != lastEvent {
		return fmt.Errorf("%w: its last event is %d, not %d", ErrBadSnapshot, q.event, lastEvent)
	}
	return nil
}

// keyOf returns the place of a record's table in a snapshot and its key there,
// which is a string or, for events and answers by age, a number.
func keyOf(rec *pb.SnapshotRecord) (place int, key string, number uint64) {
	switch r := rec.GetRecord().(type) {
	case *pb.SnapshotRecord_Node:
		return 1, r.Node.GetId(), 0
	case *pb.SnapshotRecord_Peer:
		return 2, r.Peer.GetId(), 0
	case *pb.SnapshotRecord_Module:
		return 3, r.Module.GetDigest(), 0
	case *pb.SnapshotRecord_Instance:
		return 4, r.Instance.GetId(), 0
	case *pb.SnapshotRecord_Provider:
		return 5, replicaKey(r.Provider.GetId(), r.Provider.GetReplica()), 0
	case *pb.SnapshotRecord_Assignment:
		if r.Assignment.GetInstanceId() == "" || r.Assignment.GetProviderId() == "" {
			return 6, "", 0
		}
		return 6, assignmentKey(r.Assignment.GetInstanceId(), r.Assignment.GetProviderId()), 0
	case *pb.SnapshotRecord_Event:
		return 7, "", r.Event.GetSequence()
	case *pb.SnapshotRecord_Dedup:
		switch {
		case r.Dedup.GetRequestId() == "" || r.Dedup.GetResult().GetIndex() == 0:
			return 8, "", 0
		case r.Dedup.GetSessionId() == "":
			return 8, "", r.Dedup.GetResult().GetIndex()
		default:
			return 10, answerKey(r.Dedup.GetSessionId(), r.Dedup.GetSequence()), 0
		}
	case *pb.SnapshotRecord_Session:
		return 9, r.Session.GetId(), 0
	default:
		return 0, "", 0
	}
}
