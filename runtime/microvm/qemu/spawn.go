//go:build linux && amd64

package qemu

import (
	"errors"
	"os/exec"
	goruntime "runtime"
	"sync"
)

// spawner starts processes from one thread that lives as long as it does: the
// signal at the death of a parent belongs to the thread that forked.
type spawner struct {
	once sync.Once
	jobs chan job
	stop chan struct{}
	done chan struct{}
}

type job struct {
	cmd *exec.Cmd
	err chan error
}

var errClosed = errors.New("the driver is closed")

func newSpawner() *spawner {
	return &spawner{jobs: make(chan job), stop: make(chan struct{}), done: make(chan struct{})}
}

// start starts cmd.
func (s *spawner) start(cmd *exec.Cmd) error {
	s.once.Do(func() { go s.run() })
	j := job{cmd: cmd, err: make(chan error, 1)}
	select {
	case s.jobs <- j:
		return <-j.err
	case <-s.stop:
		return errClosed
	}
}

// run never gives its thread back: it ends with this goroutine.
func (s *spawner) run() {
	defer close(s.done)
	goruntime.LockOSThread()
	for {
		select {
		case j := <-s.jobs:
			j.err <- j.cmd.Start()
		case <-s.stop:
			return
		}
	}
}

// close ends the thread, and with it whatever it started that is still alive.
func (s *spawner) close() {
	s.once.Do(func() { close(s.done) })
	close(s.stop)
	<-s.done
}
