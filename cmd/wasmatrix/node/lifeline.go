package node

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// lifelineVariable names the environment variable that holds the number of an
// inherited descriptor: the reading end of a pipe whose writing end only the
// starter of a development cluster holds. When the starter is gone, however it
// ended, the pipe closes and the node shuts down in order.
const lifelineVariable = "WASMATRIX_LIFELINE_FD"

// Lifeline returns a context that also ends when the lifeline of this process
// breaks, and the descriptor to hand to a child; nil when there is none.
func Lifeline(ctx context.Context) (context.Context, *os.File, error) {
	text := os.Getenv(lifelineVariable)
	if text == "" {
		return ctx, nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return ctx, nil, fmt.Errorf("environment variable %s=%q: want the number of an open descriptor", lifelineVariable, text)
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "lifeline")
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		var b [1]byte
		_, err := f.Read(b[:])
		cancel(fmt.Errorf("the process that started this node is gone: %w", err))
	}()
	return ctx, f, nil
}

// LifelineEnv returns the environment entry that tells a child its lifeline's descriptor.
func LifelineEnv(fd int) string { return lifelineVariable + "=" + strconv.Itoa(fd) }
