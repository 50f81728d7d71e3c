//go:build linux && amd64

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxLine bounds one message of QEMU.
const maxLine = 1 << 20

// errMonitor: QEMU's monitor has ended, and with it QEMU.
var errMonitor = errors.New("the monitor has ended")

// monitor speaks QMP (docs/interop/qmp-spec in QEMU).
type monitor struct {
	conn *net.UnixConn

	mu      sync.Mutex
	next    uint64
	replies map[uint64]chan message
	// migration is the last state of a migration that was told, shutdown the
	// reason of a shutdown. changed is closed at the next change of them.
	migration, shutdown string
	changed             chan struct{}
	ended               bool
}

// message is whatever QEMU sends.
type message struct {
	ID    *uint64 `json:"id"`
	Event string  `json:"event"`
	Data  struct {
		Status string `json:"status"`
		Reason string `json:"reason"`
	} `json:"data"`
	Error *struct {
		Description string `json:"desc"`
	} `json:"error"`
}

func newMonitor(conn *net.UnixConn) *monitor {
	return &monitor{conn: conn, replies: map[uint64]chan message{}, changed: make(chan struct{})}
}

// run takes what QEMU says until it ends.
func (m *monitor) run() {
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var got message
		if err := json.Unmarshal(lines.Bytes(), &got); err != nil {
			break
		}
		m.take(got)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = true
	for _, r := range m.replies {
		close(r)
	}
	m.replies = nil
	m.changedLocked()
}

func (m *monitor) take(got message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case got.Event == "MIGRATION":
		m.migration = got.Data.Status
		m.changedLocked()
	case got.Event == "SHUTDOWN":
		m.shutdown = got.Data.Reason
		m.changedLocked()
	case got.ID != nil:
		if r := m.replies[*got.ID]; r != nil {
			delete(m.replies, *got.ID)
			r <- got
		}
	}
}

func (m *monitor) changedLocked() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// send sends a command without waiting; the channel yields the answer, or is
// closed when QEMU ends. Commands may be sent before QEMU is ready for them.
func (m *monitor) send(command string, arguments any, files ...*os.File) (<-chan message, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return nil, errMonitor
	}
	m.next++
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, m.next})
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", command, err)
	}
	var rights []byte
	for _, f := range files {
		rights = append(rights, unix.UnixRights(int(f.Fd()))...)
	}
	reply := make(chan message, 1)
	m.replies[m.next] = reply
	if _, _, err := m.conn.WriteMsgUnix(append(line, '\n'), rights, nil); err != nil {
		delete(m.replies, m.next)
		return nil, fmt.Errorf("sending %s: %w", command, err)
	}
	return reply, nil
}

// do carries out a command.
func (m *monitor) do(ctx context.Context, command string, arguments any, files ...*os.File) error {
	reply, err := m.send(command, arguments, files...)
	if err != nil {
		return err
	}
	return await(ctx, command, reply)
}

// await waits for the answer to a command.
func await(ctx context.Context, command string, reply <-chan message) error {
	select {
	case got, ok := <-reply:
		switch {
		case !ok:
			return fmt.Errorf("%s: %w", command, errMonitor)
		case got.Error != nil:
			return fmt.Errorf("%s: %s", command, got.Error.Description)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
}

// expectMigration forgets a migration of before.
func (m *monitor) expectMigration() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.migration = ""
}

// migrated waits for the end of a migration.
func (m *monitor) migrated(ctx context.Context) error {
	for {
		m.mu.Lock()
		state, ended, changed := m.migration, m.ended, m.changed
		m.mu.Unlock()
		switch {
		case state == "completed":
			return nil
		case state == "failed" || state == "cancelled":
			return fmt.Errorf("the transfer of the machine's state has %s", state)
		case ended:
			return errMonitor
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("transferring the machine's state: %w", ctx.Err())
		}
	}
}

// shutdownReason returns why QEMU says it shut down, "" when it did not say.
func (m *monitor) shutdownReason() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.shutdown
}
