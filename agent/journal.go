package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// errJournalDamaged: the journal's content cannot be trusted.
var errJournalDamaged = errors.New("the journal is damaged")

// A journal file is journalMagic, the CRC32C of what follows, the length of what
// follows, and an encoded WatchAssignmentsResponse. The last byte of the magic is
// the version of the format.
const (
	journalName   = "assignments.journal"
	journalMagic  = "wmxjrnl\x01"
	journalHeader = len(journalMagic) + 4 + 8
)

// journal keeps the last full assignment set on disk, so that an agent that
// starts without a control plane knows what to run. It is written whole and
// replaced atomically.
type journal struct {
	path string
	log  *slog.Logger
	// content gives what is to be written.
	content func() *pb.WatchAssignmentsResponse
	written func(err error)

	dirty chan struct{}
	// mu is held from taking the content to writing it, so that no older content
	// replaces a newer one. It is taken before the agent's own mutex.
	mu sync.Mutex
}

func newJournal(dir string, log *slog.Logger, content func() *pb.WatchAssignmentsResponse, written func(error)) *journal {
	return &journal{
		path: filepath.Join(dir, journalName), log: log, content: content, written: written,
		dirty: make(chan struct{}, 1),
	}
}

// touch asks for the journal to be written.
func (j *journal) touch() { poke(j.dirty) }

// run writes the journal whenever it was touched; what is touched during a write
// goes with the next one. A failed write is reported and tried again with the
// next touch: instances run on without a journal.
func (j *journal) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-j.dirty:
			j.write(ctx)
		}
	}
}

// flush writes what was touched and not yet written.
func (j *journal) flush(ctx context.Context) {
	select {
	case <-j.dirty:
		j.write(ctx)
	default:
	}
}

func (j *journal) write(ctx context.Context) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.saveLocked(j.content()); err != nil {
		j.log.ErrorContext(ctx, "writing the journal failed; a restart of the agent may run what is out of date", "error", err)
	}
}

// saveLocked replaces the journal.
func (j *journal) saveLocked(msg *pb.WatchAssignmentsResponse) error {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
	if err != nil {
		return fmt.Errorf("encoding the journal: %w", err)
	}
	data := make([]byte, 0, journalHeader+len(body))
	data = append(data, journalMagic...)
	data = binary.BigEndian.AppendUint32(data, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	data = binary.BigEndian.AppendUint64(data, uint64(len(body)))
	err = writeFile(j.path, append(data, body...))
	j.written(err)
	return err
}

// load reads the journal, and removes what an interrupted write left. It returns
// nil without one, and errJournalDamaged for one that it cannot trust.
func (j *journal) load() (*pb.WatchAssignmentsResponse, error) {
	left, err := filepath.Glob(j.path + ".tmp-*")
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, fmt.Errorf("removing an unfinished journal: %w", err)
	}
	data, err := os.ReadFile(j.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil //nolint:nilnil // no journal is no failure
	}
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	if len(data) < journalHeader || string(data[:len(journalMagic)-1]) != journalMagic[:len(journalMagic)-1] {
		return nil, fmt.Errorf("%w: %s is not a journal", errJournalDamaged, j.path)
	}
	if v := data[len(journalMagic)-1]; v != journalMagic[len(journalMagic)-1] {
		return nil, fmt.Errorf("%w: %s has format %d, want %d", errJournalDamaged, j.path, v, journalMagic[len(journalMagic)-1])
	}
	sum := binary.BigEndian.Uint32(data[len(journalMagic):])
	size := binary.BigEndian.Uint64(data[len(journalMagic)+4:])
	body := data[journalHeader:]
	if size != uint64(len(body)) {
		return nil, fmt.Errorf("%w: %s has %d bytes, want %d", errJournalDamaged, j.path, len(body), size)
	}
	if crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) != sum {
		return nil, fmt.Errorf("%w: the checksum of %s does not match", errJournalDamaged, j.path)
	}
	msg := &pb.WatchAssignmentsResponse{}
	if err := proto.Unmarshal(body, msg); err != nil || !msg.GetComplete() {
		return nil, fmt.Errorf("%w: %s does not hold a full set", errJournalDamaged, j.path)
	}
	return msg, nil
}

// setAside keeps a damaged journal for whoever wants to know, out of the way.
func (j *journal) setAside() error {
	if err := os.Rename(j.path, j.path+".damaged"); err != nil {
		return fmt.Errorf("setting the journal aside: %w", err)
	}
	return nil
}

// writeFile replaces path by data, atomically and durably.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("creating a file: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	return nil
}
