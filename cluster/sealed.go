package cluster

import (
	"fmt"

	"github.com/hashicorp/raft"

	"github.com/wasmatrix/wasmatrix/fsm"
)

// sealedLogs looks at the checksum that the proposer of a command put on it,
// before the entry is stored and whenever it is read. What lies below makes its
// own checksum of what it is given, so damage from before would look sound there.
type sealedLogs struct {
	raft.LogStore
	// damaged is told of an entry that is not what its proposer made: this peer
	// must not go on.
	damaged func(error)
}

// StoreLog stores one entry.
func (s *sealedLogs) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries, or none of them when one is damaged.
func (s *sealedLogs) StoreLogs(entries []*raft.Log) error {
	for _, e := range entries {
		if err := s.check(e, "was damaged on its way to the log of this peer; start the peer again, and if it happens again have a look at the memory of this machine and of the leader"); err != nil {
			return err
		}
	}
	return s.LogStore.StoreLogs(entries)
}

// GetLog reads an entry.
func (s *sealedLogs) GetLog(index uint64, entry *raft.Log) error {
	if err := s.LogStore.GetLog(index, entry); err != nil {
		return err
	}
	return s.check(entry, "is in the log of this peer as its proposer never made it; move the directory raft aside and start again, the peer recovers from the others")
}

func (s *sealedLogs) check(e *raft.Log, what string) error {
	if e.Type != raft.LogCommand {
		return nil
	}
	if err := fsm.VerifyCommand(e.Data); err != nil {
		err = fmt.Errorf("entry %d %s: %w", e.Index, what, err)
		s.damaged(err)
		return err
	}
	return nil
}
