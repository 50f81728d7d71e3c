package node

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/wasmatrix/wasmatrix/cluster"
	"github.com/wasmatrix/wasmatrix/cluster/raftfile"
)

// Recover makes the peer of this configuration the only voter of its cluster,
// from its files alone, after confirm said yes to what was written to out. The
// peer must not run. Everything is left as it was on an error before confirm.
func Recover(cfg Config, out io.Writer, log *slog.Logger, confirm func(question string) error) (err error) {
	if !cfg.isPeer() {
		return fmt.Errorf("node %s is no control-plane peer (node.role is %q)", cfg.Node.Name, cfg.Node.Role)
	}
	files, err := cluster.OpenFiles(cfg.DataDir, log)
	switch {
	case errors.Is(err, raftfile.ErrInUse):
		return fmt.Errorf("the peer of %s runs: stop it first: %w", cfg.DataDir, err)
	case errors.Is(err, cluster.ErrCorrupt):
		return fmt.Errorf("%w\na recovery needs sound files. Recover another peer that is left; without any, move %s aside, start one new peer with join.bootstrap_expect 1, and `wasmatrix cluster snapshot restore FILE` with the last saved snapshot",
			err, filepath.Join(cfg.DataDir, "raft"))
	case err != nil:
		return err
	}
	defer func() { err = errors.Join(err, files.Close()) }()
	found, err := files.Summary()
	if err != nil {
		return err
	}
	backup := filepath.Join(cfg.DataDir, "raft.before-recovery-"+time.Now().UTC().Format("20060102-150405"))
	fmt.Fprintf(out, "peer %s, %s\n", cfg.Node.Name, cfg.DataDir)
	fmt.Fprintf(out, "  last entry   index %d, term %d (snapshot at %d, log from %d to %d)\n", found.StateIndex, found.StateTerm, found.SnapshotIndex, found.FirstIndex, found.LastIndex)
	fmt.Fprintf(out, "  registry     %d nodes, %d instances\n", found.Nodes, found.Instances)
	for _, s := range found.Servers {
		fmt.Fprintf(out, "  peer         %s\n", cluster.Describe(s))
	}
	fmt.Fprintf(out, `
With a recovery this peer becomes the only voter. Everything in its log counts as
committed, also what was not yet; what only the other peers had is lost. Prefer
the peer with the highest last entry. The other peers must stay off: their files
are of the old cluster. To use their machines again move their raft directories
aside; they join like new ones. A copy of the files is kept in
%s
`, backup)
	if err := confirm(fmt.Sprintf("Make %s the only voter of cluster %s?", cfg.Node.Name, cfg.Cluster)); err != nil {
		return err
	}
	if err := files.Recover(cfg.Node.Name, cfg.advertised(portRaft), backup); err != nil {
		return fmt.Errorf("recover %s: %w; what was there before is in %s", cfg.DataDir, err, backup)
	}
	fmt.Fprintf(out, "\nrecovered at index %d: start this peer, then the new ones (join.peers: %s)\n", found.StateIndex, cfg.GossipAddress())
	return nil
}
