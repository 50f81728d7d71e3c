package sim

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// errCrashed is what a process sees of its disk after its machine has crashed.
var errCrashed = errors.New("sim: the machine has crashed")

// errDisk is a write that failed.
var errDisk = errors.New("sim: input/output error")

// Disk keeps what one peer has written. A write takes its time; until it returns
// the data is not synced, and a crash keeps all of it, some of it, or nothing, as
// the dice say. What was acknowledged survives every crash.
type Disk struct {
	counts *Counts

	mu       sync.Mutex
	rand     *rand.Rand
	mount    int // grows with each crash; handles of older mounts are dead
	logs     map[uint64]*raft.Log
	values   map[string][]byte
	shots    []*shot
	unsynced []*pendingWrite
	trouble  diskTrouble
	woken    sync.Cond
	// begun is closed and replaced when a write begins.
	begun chan struct{}
}

// diskTrouble is what is wrong with a disk.
type diskTrouble struct {
	// slow is how long a write takes at most, besides what it takes anyway.
	slow time.Duration
	// hangs: no write returns before it is over, or the machine crashes.
	hangs bool
	// fails is the part of writes that fail with nothing written.
	fails float64
	// full: no write finds room.
	full bool
}

// pendingWrite is a write that was not acknowledged.
type pendingWrite struct {
	steps []func() // in the order of the disk; a crash keeps a prefix
}

// shot is one snapshot.
type shot struct {
	meta raft.SnapshotMeta
	data []byte
}

func newDisk(seed uint64, counts *Counts) *Disk {
	d := &Disk{counts: counts, rand: rand.New(rand.NewPCG(seed, 0x6469736b)), logs: map[uint64]*raft.Log{}, values: map[string][]byte{}, begun: make(chan struct{})}
	d.woken.L = &d.mu
	return d
}

// open returns the disk as the process that runs now sees it.
func (d *Disk) open() *handle {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &handle{disk: d, mount: d.mount}
}

// crash cuts the present process off and lets the dice decide what is left of
// its unsynced writes.
func (d *Disk) crash() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mount++
	for _, w := range d.unsynced {
		keep := 0
		switch d.rand.IntN(3) {
		case 0:
		case 1:
			keep = d.rand.IntN(len(w.steps) + 1)
		default:
			keep = len(w.steps)
		}
		if keep < len(w.steps) {
			d.counts.UnsyncedLost.Add(1)
		}
		for _, step := range w.steps[:keep] {
			step()
		}
	}
	d.unsynced = nil
	d.woken.Broadcast()
}

// nextWrite is closed when the next write begins.
func (d *Disk) nextWrite() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.begun
}

// wipe replaces the disk by an empty one.
func (d *Disk) wipe() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mount++
	d.logs, d.values, d.shots, d.unsynced = map[uint64]*raft.Log{}, map[string][]byte{}, nil, nil
	d.woken.Broadcast()
}

// set changes what is wrong with the disk.
func (d *Disk) set(change func(*diskTrouble)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.trouble)
	d.woken.Broadcast()
}

// flip changes one bit of the data of a log entry, and reports which entry it was.
func (d *Disk) flip() (index uint64, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var with []uint64
	for i, e := range d.logs {
		if e.Type == raft.LogCommand && len(e.Data) > 0 {
			with = append(with, i)
		}
	}
	if len(with) == 0 {
		return 0, false
	}
	slices.Sort(with)
	// The newest entries are the ones that are read again.
	index = with[len(with)-1-d.rand.IntN(min(len(with), 20))]
	own := *d.logs[index]
	own.Data = slices.Clone(own.Data)
	own.Data[d.rand.IntN(len(own.Data))] ^= 1 << d.rand.IntN(8)
	d.logs[index] = &own
	return index, true
}

// describe says what is on the disk: the ranges of the log, and the snapshots.
func (d *Disk) describe() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var text strings.Builder
	indexes := slices.Sorted(maps.Keys(d.logs))
	for i, index := range indexes {
		if i == 0 || indexes[i-1] != index-1 {
			fmt.Fprintf(&text, " %d", index)
		}
		if i == len(indexes)-1 || indexes[i+1] != index+1 {
			fmt.Fprintf(&text, "..%d", index)
		}
	}
	for _, s := range d.shots {
		fmt.Fprintf(&text, ", snapshot %s of %d", s.meta.ID, s.meta.Index)
	}
	return "log" + text.String()
}

// entry returns a log entry as it is on the disk, whoever has it open.
func (d *Disk) entry(index uint64) (*raft.Log, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, ok := d.logs[index]
	return e, ok
}

// handle is a Disk opened by one process: a LogStore, a StableStore and a SnapshotStore.
type handle struct {
	disk  *Disk
	mount int
}

var (
	_ raft.LogStore      = (*handle)(nil)
	_ raft.StableStore   = (*handle)(nil)
	_ raft.SnapshotStore = (*handle)(nil)
)

// write makes steps durable; they run in order, with the disk's lock held.
func (h *handle) write(steps ...func()) error {
	d := h.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mount != h.mount {
		return errCrashed
	}
	w := &pendingWrite{steps: steps}
	d.unsynced = append(d.unsynced, w)
	close(d.begun)
	d.begun = make(chan struct{})
	took := 50*time.Microsecond + time.Duration(d.rand.Int64N(int64(200*time.Microsecond)))
	if d.trouble.slow > 0 {
		took += time.Duration(d.rand.Int64N(int64(d.trouble.slow)))
	}
	d.mu.Unlock()
	time.Sleep(took)
	d.mu.Lock()
	for d.trouble.hangs && d.mount == h.mount {
		d.woken.Wait()
	}
	if d.mount != h.mount {
		return errCrashed
	}
	d.unsynced = slices.DeleteFunc(d.unsynced, func(o *pendingWrite) bool { return o == w })
	switch {
	case d.trouble.full:
		return syscall.ENOSPC
	case d.trouble.fails > 0 && d.rand.Float64() < d.trouble.fails:
		d.counts.WritesFailed.Add(1)
		return errDisk
	}
	for _, step := range steps {
		step()
	}
	d.counts.DiskWrites.Add(1)
	return nil
}

func (h *handle) read(f func() error) error {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	if h.disk.mount != h.mount {
		return errCrashed
	}
	return f()
}

func (h *handle) bounds() (first, last uint64, err error) {
	err = h.read(func() error {
		for i := range h.disk.logs {
			if first == 0 || i < first {
				first = i
			}
			last = max(last, i)
		}
		return nil
	})
	return first, last, err
}

// FirstIndex returns the index of the first entry, 0 without any.
func (h *handle) FirstIndex() (uint64, error) { first, _, err := h.bounds(); return first, err }

// LastIndex returns the index of the last entry, 0 without any.
func (h *handle) LastIndex() (uint64, error) { _, last, err := h.bounds(); return last, err }

// GetLog reads an entry.
func (h *handle) GetLog(index uint64, into *raft.Log) error {
	return h.read(func() error {
		e, ok := h.disk.logs[index]
		if !ok {
			return raft.ErrLogNotFound
		}
		*into = *e
		into.Data, into.Extensions = slices.Clone(e.Data), slices.Clone(e.Extensions)
		return nil
	})
}

// StoreLog stores one entry.
func (h *handle) StoreLog(e *raft.Log) error { return h.StoreLogs([]*raft.Log{e}) }

// StoreLogs stores entries.
func (h *handle) StoreLogs(entries []*raft.Log) error {
	steps := make([]func(), len(entries))
	for i, e := range entries {
		own := *e
		own.Data, own.Extensions = slices.Clone(e.Data), slices.Clone(e.Extensions)
		steps[i] = func() { h.disk.logs[own.Index] = &own }
	}
	return h.write(steps...)
}

// DeleteRange deletes entries.
func (h *handle) DeleteRange(first, last uint64) error {
	return h.write(func() {
		for i := first; i <= last; i++ {
			delete(h.disk.logs, i)
		}
	})
}

// Set stores a value.
func (h *handle) Set(key, value []byte) error {
	k, v := string(key), slices.Clone(value)
	return h.write(func() { h.disk.values[k] = v })
}

// Get reads a value.
func (h *handle) Get(key []byte) (value []byte, err error) {
	err = h.read(func() error {
		v, ok := h.disk.values[string(key)]
		if !ok {
			return errors.New("not found")
		}
		value = slices.Clone(v)
		return nil
	})
	return value, err
}

// SetUint64 stores a number.
func (h *handle) SetUint64(key []byte, value uint64) error {
	return h.Set(key, []byte(fmt.Sprint(value)))
}

// GetUint64 reads a number.
func (h *handle) GetUint64(key []byte) (value uint64, err error) {
	b, err := h.Get(key)
	if err != nil {
		return 0, err
	}
	_, err = fmt.Sscan(string(b), &value)
	return value, err
}

// Create begins a snapshot.
func (h *handle) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration, configurationIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	meta := raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixNano()), Index: index, Term: term,
		Configuration: configuration, ConfigurationIndex: configurationIndex,
	}
	return &sink{handle: h, meta: meta}, nil
}

// List returns the snapshots, the newest first.
func (h *handle) List() (out []*raft.SnapshotMeta, err error) {
	err = h.read(func() error {
		for _, s := range h.disk.shots {
			meta := s.meta
			out = append(out, &meta)
		}
		slices.SortFunc(out, func(a, b *raft.SnapshotMeta) int {
			return cmp.Or(cmp.Compare(b.Term, a.Term), cmp.Compare(b.Index, a.Index), cmp.Compare(b.ID, a.ID))
		})
		return nil
	})
	return out, err
}

// Open reads a snapshot.
func (h *handle) Open(id string) (meta *raft.SnapshotMeta, data io.ReadCloser, err error) {
	err = h.read(func() error {
		at := slices.IndexFunc(h.disk.shots, func(s *shot) bool { return s.meta.ID == id })
		if at < 0 {
			return errors.New("sim: no such snapshot")
		}
		own := h.disk.shots[at].meta
		meta, data = &own, io.NopCloser(bytes.NewReader(h.disk.shots[at].data))
		return nil
	})
	return meta, data, err
}

// sink is a snapshot that is being written.
type sink struct {
	bytes.Buffer
	handle *handle
	meta   raft.SnapshotMeta
	done   bool
}

// ID returns the snapshot's id.
func (s *sink) ID() string { return s.meta.ID }

// Cancel gives it up.
func (s *sink) Cancel() error { s.done = true; return nil }

// Close makes it durable; only the last two are kept.
func (s *sink) Close() error {
	if s.done {
		return nil
	}
	s.done = true
	s.meta.Size = int64(s.Len())
	kept := &shot{meta: s.meta, data: slices.Clone(s.Bytes())}
	d := s.handle.disk
	return s.handle.write(func() {
		d.shots = append(d.shots, kept)
		if len(d.shots) > 2 {
			d.shots = d.shots[len(d.shots)-2:]
		}
	})
}
