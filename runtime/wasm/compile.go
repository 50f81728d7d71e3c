package wasm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// Exit codes of the child process.
const (
	childOK       = 0
	childUsage    = 2
	childRejected = 3
	childMemory   = 4
)

// errTooExpensive marks a module whose compilation took too much time or memory.
var errTooExpensive = errors.New("too expensive to compile")

// CompileMain is the child process that compiles one module: the program's
// hidden subcommand calls it with the arguments after Config.CompileCommand and
// exits with what it returns. The arguments are the directory of the cache entry
// to complete and the memory in bytes it may take. It gives up when stdin ends,
// that is, when its parent is gone. What it writes to stderr is for the parent.
func CompileMain(args []string, stdin io.Reader, stderr io.Writer) int {
	if len(args) != 2 {
		_, _ = fmt.Fprintln(stderr, "usage: <entry directory> <memory in bytes>; started by the agent, not by hand")
		return childUsage
	}
	memory, err := strconv.ParseUint(args[1], 10, 63)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return childUsage
	}
	debug.SetMemoryLimit(int64(memory / 4 * 3))
	if err := limitMemory(memory); err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return childUsage
	}
	verdict := make(chan int, 3)
	go func() {
		// The parent writes nothing: this ends with the parent.
		_, _ = io.Copy(io.Discard, stdin)
		verdict <- childUsage
	}()
	stop := make(chan struct{})
	defer close(stop)
	go watchMemory(memory, stop, func() { verdict <- childMemory })
	go func() {
		err := compileEntry(context.Background(), args[0]) //nolint:forbidigo // the process ends with main
		if err == nil {
			verdict <- childOK
			return
		}
		_, _ = fmt.Fprintln(stderr, err)
		verdict <- childRejected
	}()
	return <-verdict
}

// compileEntry compiles the metered module of an entry and leaves the code there.
func compileEntry(ctx context.Context, dir string) error {
	metered, err := os.ReadFile(filepath.Join(dir, fileMetered))
	if err != nil {
		return fmt.Errorf("reading the metered module: %w", err)
	}
	u, err := newUnit(ctx, metered, shape{}, dir)
	if err != nil {
		return err
	}
	return u.close(ctx)
}

// watchMemory calls exceeded once when this process holds more memory than it may.
func watchMemory(limit uint64, stop <-chan struct{}, exceeded func()) {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
			if resident() > limit {
				exceeded()
				return
			}
		}
	}
}

// compiler compiles modules into cache entries, in a child process when there is
// a command for it.
type compiler struct {
	command []string
	timeout time.Duration
	memory  uint64
	slots   chan struct{}
}

func (c *compiler) compile(ctx context.Context, dir string) error {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if len(c.command) == 0 {
		return compileEntry(ctx, dir)
	}
	bounded, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err := c.child(bounded, dir)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %w: compiling the module takes more than %s; make it smaller or raise the node's compile timeout", runtime.ErrModuleInvalid, errTooExpensive, c.timeout)
	}
	return err
}

func (c *compiler) child(ctx context.Context, dir string) error {
	args := append(append([]string{}, c.command[1:]...), dir, strconv.FormatUint(c.memory, 10))
	cmd := exec.CommandContext(ctx, c.command[0], args...)
	cmd.Env = []string{} // a child that handles hostile input gets no secrets
	var stderr tail
	cmd.Stderr = &stderr
	// The pipe stays open as long as this process lives.
	life, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("starting the compiler: %w", err)
	}
	err = cmd.Run()
	_ = life.Close() // closed by Wait already unless Start failed
	var exited *exec.ExitError
	if err == nil || ctx.Err() != nil || !errors.As(err, &exited) {
		if err != nil {
			err = fmt.Errorf("running the compiler: %w", err)
		}
		return err
	}
	said := clean(strings.TrimSpace(stderr.String()))
	switch {
	case exited.ExitCode() == childRejected:
		return fmt.Errorf("%w: %s", runtime.ErrModuleInvalid, said)
	case exited.ExitCode() == childMemory, strings.Contains(said, "out of memory"), strings.Contains(said, "cannot allocate memory"):
		return fmt.Errorf("%w: %w: compiling the module takes more than %s of memory; make it smaller or raise the node's compile memory", runtime.ErrModuleInvalid, errTooExpensive, bytesText(c.memory))
	default:
		return fmt.Errorf("the compiler failed: %w: %s", err, said)
	}
}

// tail keeps the first bytes written to it.
type tail struct{ bytes.Buffer }

// Write drops what comes after 4 KiB.
func (t *tail) Write(p []byte) (int, error) {
	if room := 4<<10 - t.Len(); room > 0 {
		t.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
