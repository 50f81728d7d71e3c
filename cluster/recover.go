package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/fsm"
)

var (
	// ErrNoFiles is returned by OpenFiles for a directory in which no peer ever kept its files.
	ErrNoFiles = errors.New("there are no raft files")
	// ErrSuperseded is wrapped by the error of Run of a peer whose cluster was
	// recovered without it: what it holds is not the state of the cluster any more.
	ErrSuperseded = errors.New("this peer's cluster was recovered without it")
)

// Files are the raft files of a peer that does not run, opened and checked as
// the peer itself would. Close them.
type Files struct {
	storage *storage
	log     *slog.Logger
	dir     string
}

// OpenFiles opens the files in a peer's data directory. The error wraps
// ErrNoFiles, ErrCorrupt, or raftfile.ErrInUse while the peer runs.
func OpenFiles(dataDir string, log *slog.Logger) (*Files, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dir := raftDir(dataDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNoFiles, dataDir)
	}
	cfg := Config{DataDir: dataDir, Logger: log}.withDefaults()
	nothing := func() {}
	watch := &diskWatch{limit: time.Hour, slow: nothing, recovered: nothing, damaged: func(error) {}}
	s, err := openStorage(cfg, watch)
	if err != nil {
		return nil, err
	}
	return &Files{storage: s, log: log, dir: dir}, nil
}

// Close lets go of the files.
func (f *Files) Close() error { return f.storage.close() }

// Summary is what the files of a peer hold.
type Summary struct {
	// FirstIndex and LastIndex are the bounds of the log, 0 when it is empty.
	FirstIndex, LastIndex uint64
	// SnapshotIndex is the index of the newest snapshot, 0 without any.
	SnapshotIndex uint64
	// StateIndex and StateTerm are those of the last entry or snapshot: what a recovery ends with.
	StateIndex, StateTerm uint64
	// Term and VoteTerm are the peer's own, Vote is whom it voted for.
	Term, VoteTerm uint64
	Vote           string
	// Servers is the Raft configuration that the peer knew last.
	Servers []raft.Server
	// Settled is false for a peer that never finished joining.
	Settled bool
	// ClusterID is the cluster's identity, StateHash the hash of its state.
	ClusterID, StateHash string
	// Nodes and Instances count what the registry holds.
	Nodes, Instances int
}

// Entries calls f with every entry of the log, oldest first.
func (f *Files) Entries(each func(*raft.Log) error) error {
	first, err := f.storage.logs.FirstIndex()
	if err != nil {
		return err
	}
	last, err := f.storage.logs.LastIndex()
	if err != nil {
		return err
	}
	for i := first; i != 0 && i <= last; i++ {
		var entry raft.Log
		err := f.storage.logs.GetLog(i, &entry)
		if errors.Is(err, raft.ErrLogNotFound) {
			continue // a restored snapshot leaves a hole
		}
		if err == nil {
			err = each(&entry)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Summary reads everything.
func (f *Files) Summary() (*Summary, error) {
	out := &Summary{}
	var errs [3]error
	out.FirstIndex, errs[0] = f.storage.logs.FirstIndex()
	out.LastIndex, errs[1] = f.storage.logs.LastIndex()
	errs[2] = f.stable(out)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	state := fsm.New()
	machine := fsm.NewRaftFSM(state, func(error) {})
	if err := f.restore(out, machine); err != nil {
		return nil, err
	}
	err := f.Entries(func(e *raft.Log) error {
		if e.Index <= out.SnapshotIndex {
			return nil
		}
		if e.Type == raft.LogConfiguration {
			out.Servers = raft.DecodeConfiguration(e.Data).Servers
		}
		out.StateIndex, out.StateTerm = e.Index, e.Term
		if stopped, is := machine.Apply(e).(error); is {
			return stopped
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	view := state.View()
	out.ClusterID, out.StateHash = view.ClusterID(), view.Hash()
	out.Nodes, out.Instances = len(view.Nodes(nil)), len(view.Instances(nil))
	return out, nil
}

func (f *Files) stable(out *Summary) error {
	number := func(key string, into *uint64) error {
		value, err := f.storage.stable.GetUint64([]byte(key))
		if err != nil && err.Error() != textNotFound {
			return err
		}
		*into = value
		return nil
	}
	var mark uint64
	err := errors.Join(number("CurrentTerm", &out.Term), number("LastVoteTerm", &out.VoteTerm), number(string(unsettledKey), &mark))
	vote, voteErr := f.storage.stable.Get([]byte("LastVoteCand"))
	if voteErr != nil && voteErr.Error() != textNotFound {
		err = errors.Join(err, voteErr)
	}
	out.Vote, out.Settled = string(vote), mark == 0
	return err
}

// restore reads the newest snapshot, if there is one.
func (f *Files) restore(out *Summary, machine raft.FSM) error {
	all, err := f.storage.snapshots.List()
	if err != nil || len(all) == 0 {
		return err
	}
	meta, source, err := f.storage.snapshots.Open(all[0].ID)
	if err != nil {
		return err
	}
	if err := machine.Restore(source); err != nil {
		return fmt.Errorf("%w: snapshot %s: %w", ErrCorrupt, meta.ID, err)
	}
	out.SnapshotIndex, out.StateIndex, out.StateTerm = meta.Index, meta.Index, meta.Term
	out.Servers = meta.Configuration.Servers
	return nil
}

// Recover makes this peer the only voter of the cluster and everything that is
// in its log committed, after it copied the files to backup, which must not
// exist. The cluster gets a new identity, which begins with the old one: peers
// that come back with the old one stop when they see it. Close the files afterwards.
func (f *Files) Recover(id, raftAddress, backup string) error {
	before, err := f.Summary()
	switch {
	case err != nil:
		return err
	case before.StateIndex == 0:
		return fmt.Errorf("%w in %s", ErrNoFiles, f.dir)
	case !before.Settled:
		return errors.New("this peer never finished joining its cluster, so it may lack a part of the state: recover another peer")
	}
	if err := copyTree(f.dir, backup); err != nil {
		return errors.Join(fmt.Errorf("copy %s to %s: %w", f.dir, backup, err), os.RemoveAll(backup))
	}
	state := fsm.New()
	var fatal error
	machine := &recovering{RaftFSM: fsm.NewRaftFSM(state, func(err error) { fatal = err }), state: state, id: successor(before.ClusterID)}
	address := raft.ServerAddress(raftAddress)
	_, transport := raft.NewInmemTransport(address)
	cfg := Config{ID: id, Logger: f.log}.withDefaults().raftConfig()
	err = raft.RecoverCluster(cfg, machine, f.storage.logs, f.storage.stable, f.storage.snapshots, transport,
		raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: address}}})
	if err = errors.Join(err, fatal); err != nil {
		return err
	}
	return f.storage.stable.Set(incarnationKey, []byte(machine.id))
}

// recovering is the state machine during a recovery: its snapshot is that of the new cluster.
type recovering struct {
	*fsm.RaftFSM
	state *fsm.State
	id    string
}

// Snapshot captures the state under the new identity.
func (r *recovering) Snapshot() (raft.FSMSnapshot, error) {
	return &recoveredState{state: r.state, view: r.state.View().WithClusterID(r.id)}, nil
}

type recoveredState struct {
	state *fsm.State
	view  fsm.View
}

// Persist writes the snapshot to sink and closes or cancels it.
func (s *recoveredState) Persist(sink raft.SnapshotSink) error {
	if err := s.state.WriteSnapshot(s.view, sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release does nothing.
func (*recoveredState) Release() {}

// successorMark joins the identity of a cluster and what its recovery adds.
const successorMark = "-r"

// successor returns the identity of a cluster that was recovered from that of id.
func successor(id string) string {
	raw := make([]byte, 4)
	_, _ = rand.Read(raw) // it never fails
	return id + successorMark + hex.EncodeToString(raw)
}

// supersedes reports whether the cluster newer was recovered from older, at once or in steps.
func supersedes(newer, older string) bool {
	return older != "" && strings.HasPrefix(newer, older+successorMark)
}

// supersededCheck is how often a peer asks the others for the identity of their cluster.
const supersededCheck = 5 * time.Second

// watchSuperseded stops this peer when another one is of a cluster that was
// recovered from this peer's. With enough others like it, it would else go on as
// a second cluster of the same name.
func (p *Peer) watchSuperseded(ctx context.Context) error {
	for ctx.Err() == nil {
		changed := p.changed.wait()
		for _, m := range p.known() {
			if !m.Alive || m.Metadata.GetPeerId() == p.cfg.ID || !m.Metadata.GetBootstrapped() {
				continue
			}
			own := p.state.View().ClusterID()
			if own == "" {
				continue
			}
			status, err := p.askStatus(ctx, m.Metadata.GetApiAddress())
			if err == nil && supersedes(status.GetClusterId(), own) {
				dir := raftDir(p.cfg.DataDir)
				return fmt.Errorf("%w, at %s: nothing that it holds counts any more\n`mv %s %s` and start this peer again: it joins the recovered cluster",
					ErrSuperseded, m.Metadata.GetPeerId(), dir, filepath.Join(p.cfg.DataDir, "raft.superseded"))
			}
		}
		if !pause(ctx, time.Second, nil) || !pause(ctx, supersededCheck, changed) {
			break
		}
	}
	return nil
}

// Describe returns a line of text about a server of a Raft configuration.
func Describe(s raft.Server) string {
	return fmt.Sprintf("%s at %s (%s)", s.ID, s.Address, strings.ToLower(s.Suffrage.String()))
}

// copyTree copies a directory and makes the copy durable.
func copyTree(from, to string) error {
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s exists already", to)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	return filepath.WalkDir(to, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return syncPath(path)
	})
}
