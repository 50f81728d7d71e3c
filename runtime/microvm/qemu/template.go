//go:build linux && amd64

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/vmm"
)

const (
	// maxState bounds the device state of a machine; it is some 60 KiB.
	maxState = 16 << 20
	// pipeBytes is the room of the pipe that a clone's state comes through, so that
	// all of it is there before QEMU starts.
	pipeBytes = 1 << 20
)

// template is a machine at rest.
type template struct {
	driver *Driver
	memory *os.File // sealed
	size   uint64
	state  []byte
}

var _ vmm.Template = (*template)(nil)

// Bytes implements vmm.Template.
func (t *template) Bytes() uint64 { return resident(t.memory) + uint64(len(t.state)) }

// Close implements vmm.Template.
func (t *template) Close() error { return t.memory.Close() }

// capabilities of a migration: the memory does not travel, for it is shared.
func capabilities() any {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	return map[string]any{"capabilities": []capability{{"x-ignore-shared", true}, {"events", true}}}
}

// Copy implements vmm.Driver.
func (d *Driver) Copy(ctx context.Context, v vmm.Machine) (_ vmm.Template, err error) {
	m, ok := v.(*machine)
	if !ok {
		return nil, errors.New("the machine is none of QEMU's")
	}
	defer m.Kill()
	memory := m.takeMemory()
	if memory == nil {
		return nil, errors.New("copying a machine: it has no memory of its own")
	}
	defer func() {
		if err != nil {
			_ = memory.Close() // the first error tells more
		}
	}()
	state, err := m.save(ctx)
	if err != nil {
		if ended(m) {
			err = fmt.Errorf("%w: %s", err, m.ending.Message)
		}
		return nil, fmt.Errorf("copying a machine: %w", err)
	}
	// It cannot be sealed while QEMU maps it.
	m.Kill()
	if err := shrink(memory, m.size); err != nil {
		return nil, err
	}
	if err := seal(memory); err != nil {
		return nil, err
	}
	return &template{driver: d, memory: memory, size: m.size, state: state}, nil
}

func ended(m *machine) bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// save stops the machine and returns its device state.
func (m *machine) save(ctx context.Context) (state []byte, err error) {
	if err := m.monitor.do(ctx, "stop", nil); err != nil {
		return nil, err
	}
	if err := m.monitor.do(ctx, "migrate-set-capabilities", capabilities()); err != nil {
		return nil, err
	}
	if err := m.monitor.do(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(1) << 40}); err != nil {
		return nil, err
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	defer func() { err = errors.Join(err, ours.Close()) }()
	err = m.monitor.do(ctx, "getfd", map[string]any{"fdname": "state"}, theirs)
	if err = errors.Join(err, theirs.Close()); err != nil {
		return nil, err
	}
	type result struct {
		state []byte
		err   error
	}
	read := make(chan result, 1)
	go func() {
		all, err := io.ReadAll(io.LimitReader(ours, maxState+1))
		read <- result{all, err}
	}()
	m.monitor.expectMigration()
	if err := m.monitor.do(ctx, "migrate", map[string]any{"uri": "fd:state"}); err != nil {
		return nil, err
	}
	if err := m.monitor.migrated(ctx); err != nil {
		return nil, err
	}
	select {
	case r := <-read:
		if r.err == nil && len(r.state) > maxState {
			r.err = fmt.Errorf("the device state is larger than %d bytes", maxState)
		}
		return r.state, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Clone implements vmm.Driver.
func (d *Driver) Clone(ctx context.Context, v vmm.Template) (vmm.Machine, error) {
	t, ok := v.(*template)
	if !ok {
		return nil, errors.New("the template is none of QEMU's")
	}
	m, err := d.clone(ctx, t, t.memory, false)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Fork implements vmm.Driver.
func (d *Driver) Fork(ctx context.Context, v vmm.Template) (vmm.Machine, error) {
	t, ok := v.(*template)
	if !ok {
		return nil, errors.New("the template is none of QEMU's")
	}
	memory, err := duplicate(t.memory, t.size)
	if err != nil {
		return nil, err
	}
	m, err := d.clone(ctx, t, memory, true)
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	m.keepMemory(memory)
	return m, nil
}

// clone starts a machine with the template's state and this memory.
func (d *Driver) clone(ctx context.Context, t *template, memory *os.File, shared bool) (*machine, error) {
	state, err := t.pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = state.Close() }() // QEMU has its own copy
	m, err := d.launch(t.size, d.cloneArguments(t.size, shared), state, memory)
	if err != nil {
		return nil, err
	}
	if err := m.load(ctx); err != nil {
		m.Kill()
		return nil, fmt.Errorf("cloning a machine: %w: %s", err, m.ending.Message)
	}
	return m, nil
}

// pipe returns a pipe that yields the device state. Where it takes all of it at
// once, no goroutine has to wait for QEMU.
func (t *template) pipe() (*os.File, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	// An ordinary user may be refused; then the goroutine below waits.
	room, err := unix.FcntlInt(theirs.Fd(), unix.F_SETPIPE_SZ, pipeBytes)
	write := func() error {
		_, err := theirs.Write(t.state)
		return errors.Join(err, theirs.Close())
	}
	if err != nil || len(t.state) > room {
		go func() { _ = write() }() // QEMU tells when something is missing
		return ours, nil
	}
	if err := write(); err != nil {
		return nil, errors.Join(fmt.Errorf("handing over the device state: %w", err), ours.Close())
	}
	return ours, nil
}

// load gives the clone its state. All commands are under way before QEMU is ready
// for the first.
func (m *machine) load(ctx context.Context) error {
	var replies []<-chan message
	commands := []struct {
		name      string
		arguments any
	}{
		{"qmp_capabilities", nil},
		{"migrate-set-capabilities", capabilities()},
		{"migrate-incoming", map[string]any{"uri": fmt.Sprintf("fd:%d", fdState)}},
	}
	for _, c := range commands {
		reply, err := m.monitor.send(c.name, c.arguments)
		if err != nil {
			return err
		}
		replies = append(replies, reply)
	}
	for n, reply := range replies {
		if err := await(ctx, commands[n].name, reply); err != nil {
			return err
		}
	}
	return m.monitor.migrated(ctx)
}
