package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// spareFile keeps space for what must be written on a full disk, and is what the disk is probed with.
	spareFile = "spare"
	// maxLowMark is the free space below which the disk counts as full; on a small disk it is a sixteenth.
	maxLowMark = 32 << 20
	// probeBlock is how much a probe writes.
	probeBlock = 4096
	// spaceCheck is how often the free space is looked at, and the disk of an idle leader probed.
	spaceCheck = 500 * time.Millisecond
	// offerAgain is how long a leader on a full disk waits, after nobody could take it, before it offers leadership again.
	offerAgain = 2 * time.Second
)

// diskSpace knows how much room the disk has. It keeps a file of some size that
// can be given up, so that a term and a vote can be written when nothing else can.
type diskSpace struct {
	dir   string
	log   *slog.Logger
	watch *diskWatch
	spare *os.File
	// low is the mark below which the disk counts as full, keep the size of the spare file.
	low, keep uint64

	mu    sync.Mutex
	whole bool // the spare file has its size
	full  atomic.Bool
	left  atomic.Uint64
	// changed wakes the leader's duty; it has room for one.
	changed chan struct{}
}

func openSpace(dir string, watch *diskWatch, log *slog.Logger) (*diskSpace, error) {
	free, total, err := diskFree(dir)
	if err != nil {
		return nil, fmt.Errorf("ask for free disk space in %s: %w", dir, err)
	}
	d := &diskSpace{dir: dir, log: log, watch: watch, low: min(maxLowMark, total/16), changed: make(chan struct{}, 1)}
	d.keep = d.low / 2
	d.left.Store(free)
	if d.spare, err = os.OpenFile(filepath.Join(dir, spareFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("open the spare file: %w", err)
	}
	d.look()
	return d, nil
}

func (d *diskSpace) close() error { return d.spare.Close() }

// release gives the spare file up and reports whether that made room.
func (d *diskSpace) release() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	info, err := d.spare.Stat()
	if err != nil || info.Size() <= probeBlock {
		return false
	}
	d.whole = false
	if err := d.spare.Truncate(probeBlock); err != nil {
		d.log.Error("give up the spare file", "error", err)
		return false
	}
	d.log.Warn("the disk is full: gave up the spare file to write the term or a vote", "dir", d.dir)
	return true
}

// look measures the free space and takes the spare file back when there is room again.
func (d *diskSpace) look() {
	free, _, err := diskFree(d.dir)
	if err != nil {
		d.log.Warn("ask for free disk space", "error", err)
		return
	}
	d.left.Store(free)
	d.mu.Lock()
	if !d.whole && free > d.low+d.keep {
		if err := allocate(d.spare, int64(d.keep)); err != nil {
			d.log.Warn("keep space free", "error", err)
		} else {
			d.whole = true
		}
	}
	d.mu.Unlock()
	// What is full stays full until there is clearly more room, so that it does not come and go.
	if d.full.Load() {
		d.setFull(free < d.low+d.low/4)
	} else {
		d.setFull(free < d.low)
	}
}

func (d *diskSpace) setFull(full bool) {
	if d.full.Swap(full) == full {
		return
	}
	if full {
		d.log.Error("the disk is full: this peer takes no writes as a leader until there is room", "dir", d.dir, "free_bytes", d.left.Load(), "low_bytes", d.low)
	} else {
		d.log.Info("there is room on the disk again", "dir", d.dir, "free_bytes", d.left.Load())
	}
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// run looks at the space until ctx ends, tells candidacy, and probes the disk of
// a leader that has nothing to write: it would not notice that its disk hangs
// before somebody needs it. No hanging disk keeps run from returning.
func (d *diskSpace) run(ctx context.Context, leads func() bool, tell func(full bool)) {
	tick := time.NewTicker(spaceCheck)
	defer tick.Stop()
	probed := make(chan struct{})
	close(probed)
	for {
		tell(d.full.Load())
		select {
		case <-ctx.Done():
			pause(context.WithoutCancel(ctx), d.watch.limit, probed)
			return
		case <-tick.C:
		}
		select {
		case <-probed:
		default:
			continue
		}
		probed = make(chan struct{})
		go func(done chan<- struct{}) {
			defer close(done)
			d.look()
			if leads() && d.watch.idle(spaceCheck) {
				// A failure has been told by the watch.
				_ = d.watch.write(d.probe)
			}
		}(probed)
	}
}

func (d *diskSpace) probe() error {
	block := make([]byte, probeBlock)
	if _, err := d.spare.WriteAt(block, 0); err != nil {
		return fmt.Errorf("probe the disk: %w", err)
	}
	if err := d.spare.Sync(); err != nil {
		return fmt.Errorf("probe the disk: %w", err)
	}
	return nil
}

// diskFree returns how many bytes this process may still write in dir, and the size of the disk.
func diskFree(dir string) (free, total uint64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	//nolint:unconvert // the field types differ between operating systems
	return uint64(st.Bavail) * uint64(st.Bsize), uint64(st.Blocks) * uint64(st.Bsize), nil
}

// refuseWhenFull returns why a write cannot be taken, or nil. What the leader's
// own duties write is little, and the cluster depends on it.
func (p *Peer) refuseWhenFull(cmd *pb.Command) error {
	if !p.hasFullDisk() || isDuty(cmd.GetActor()) {
		return nil
	}
	return p.diskFull("the leader")
}

// hasFullDisk reports whether the disk of this peer has no room for a log.
func (p *Peer) hasFullDisk() bool {
	space := p.disk.space.Load()
	return space != nil && space.full.Load()
}

// diskFull says that nothing was done because the disk of this peer is full, and
// what the peer is for the call. Only a peer that looks after its space may say so.
func (p *Peer) diskFull(as string) *apierror.Error {
	space := p.disk.space.Load()
	return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED,
		"the disk of %s %s is full: %d MiB are free in %s, %d MiB are kept for the cluster's own records", as, p.cfg.ID, space.left.Load()>>20, space.dir, space.low>>20).
		With(DetailOutcome, OutcomeFailed).With("peer", p.cfg.ID).With("dir", space.dir).
		Next("free space on the machine of %s; writes go on by themselves then", p.cfg.ID)
}

// isDuty reports whether an actor is the leader itself, not one of its clients.
func isDuty(actor string) bool {
	return slices.Contains([]string{membershipActor, "dispatcher", "scheduler"}, actor)
}

// foundNoRoom reports whether a write of the log found no room, and nothing was
// written or sent. The cache of hashicorp/raft keeps only the text of the cause.
func foundNoRoom(err error) bool {
	return isFull(err) || err != nil && strings.Contains(err.Error(), raftfile.ErrFull.Error())
}

// isElectedInVain reports whether this peer was elected and cannot serve before
// its disk has room.
func (p *Peer) isElectedInVain() bool {
	r := p.raft.Load()
	return r != nil && r.State() == raft.Leader && !p.role.leads.Load() && p.hasFullDisk()
}

// toldFull reports whether gossip says that the disk of a peer is full.
func (p *Peer) toldFull(id string) bool {
	m, ok := p.member(id)
	return ok && m.Metadata.GetDiskFull()
}

// errNoRoomToLead ends a leadership that others can take.
var errNoRoomToLead = errors.New("the disk of this peer is full, others have room")

// othersHaveRoom reports whether the cluster could write without this peer, as far as gossip knows.
func (p *Peer) othersHaveRoom() bool {
	voters, room := 0, 0
	for _, s := range p.servers() {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if id := string(s.ID); id != p.cfg.ID && p.isAlive(id) && !p.toldFull(id) {
			room++
		}
	}
	return room > voters/2
}

// commitEarlier waits until everything that was committed before this peer led is
// applied here. With a full disk that may take for ever: it fails when others have room.
func (p *Peer) commitEarlier(ctx context.Context, r *raft.Raft) error {
	limited, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	go func() {
		for pause(limited, offerAgain, nil) {
			if p.hasFullDisk() && p.othersHaveRoom() {
				giveUp(errNoRoomToLead)
			}
		}
	}()
	err := p.flights.await(limited, r.Barrier(enqueueLimit))
	if ctx.Err() == nil && limited.Err() != nil {
		err = context.Cause(limited)
	}
	return err
}

// diskDuty offers leadership to others while the leader's own disk is full. It
// fails when nobody could take it and others have room: what this peer has not
// written yet keeps it from telling them that they are up to date.
func (p *Peer) diskDuty(ctx context.Context) error {
	space, r := p.disk.space.Load(), p.raft.Load()
	if space == nil || r == nil {
		return nil
	}
	told := false
	for {
		if full := space.full.Load(); !full {
			told = false
		} else if err := p.handOver(ctx, r); err != nil && ctx.Err() == nil {
			if p.othersHaveRoom() {
				return errors.Join(errNoRoomToLead, err)
			}
			if !told {
				p.log.Warn("leadership stays on a full disk for now", "error", err, "again_in", offerAgain)
				told = true
			}
		}
		if !pause(ctx, offerAgain, space.changed) {
			return nil
		}
	}
}

// errNoAllocate is returned where space cannot be allocated ahead.
var errNoAllocate = errors.New("the file system cannot allocate space ahead")

// allocate gives a file its size, and the space for it.
func allocate(f *os.File, size int64) error {
	err := reserveSpace(f, size)
	if !errors.Is(err, errNoAllocate) {
		return err
	}
	block := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(block)) {
		if _, err := f.WriteAt(block[:min(int64(len(block)), size-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}
