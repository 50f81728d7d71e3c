package wasm

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"

	"github.com/tetratelabs/wazero/sys"

	"github.com/wasmatrix/wasmatrix/runtime"
)

var (
	// errInstantiate marks a failure before any code of the guest ran, unless a
	// trap is told as well.
	errInstantiate = errors.New("the module could not be instantiated")
	// errMisbehaved marks a guest that broke the rules of the guest interface.
	errMisbehaved = errors.New("the guest broke its interface")
	// errInternal marks a failure of ours.
	errInternal = errors.New("internal failure")
)

// exitOf tells how an instance ended whose guest returned err from a call; nil
// means that it ran to its end.
func (s *slot) exitOf(err error) runtime.Exit {
	var exited *sys.ExitError
	switch {
	case err == nil:
		return runtime.Exit{Reason: runtime.Completed, Message: "completed"}
	case s.cause != nil:
		return s.interruptedExit(err)
	case errors.As(err, &exited):
		return s.exitCode(int32(exited.ExitCode()))
	case errors.Is(err, errInternal):
		return runtime.Exit{Reason: runtime.Internal, Message: clean(err.Error())}
	case errors.Is(err, errMisbehaved):
		return runtime.Exit{Reason: runtime.InvalidGuest, Message: clean(err.Error())}
	}
	name, where, trapped := describeTrap(err)
	switch {
	case s.memory.refused && trapped:
		return runtime.Exit{Reason: runtime.MemoryLimit, Message: fmt.Sprintf("memory limit of %s reached, then %s%s", bytesText(s.memory.limit), name, where)}
	case trapped:
		return runtime.Exit{Reason: runtime.Trap, Message: name + where}
	case errors.Is(err, errInstantiate):
		return runtime.Exit{Reason: runtime.InvalidGuest, Message: clean(err.Error())}
	default:
		return runtime.Exit{Reason: runtime.Internal, Message: clean(err.Error())}
	}
}

func (s *slot) exitCode(code int32) runtime.Exit {
	switch {
	case code == 0:
		return runtime.Exit{Reason: runtime.Completed, Message: "completed"}
	case s.memory.refused:
		return runtime.Exit{Reason: runtime.MemoryLimit, Code: code, Message: fmt.Sprintf("memory limit of %s reached, then exit with code %d", bytesText(s.memory.limit), code)}
	default:
		return runtime.Exit{Reason: runtime.ExitCode, Code: code, Message: fmt.Sprintf("exit with code %d", code)}
	}
}

// interruptedExit tells how an instance ended whose guest was interrupted. An
// instance that had ended already keeps the exit it has.
func (s *slot) interruptedExit(err error) runtime.Exit {
	_, where, _ := describeTrap(err)
	if errors.Is(s.cause, errEnded) {
		return runtime.Exit{Reason: runtime.Stopped, Message: "stopped" + where}
	}
	message := fmt.Sprintf("time limit of %s reached", s.instance.spec.Timeout.Round(time.Microsecond))
	return runtime.Exit{Reason: runtime.TimeLimit, Message: message + where}
}

// frame matches a line of wazero's stack trace of a guest's own function:
// a point, the name, and the types of parameters and results.
var frame = regexp.MustCompile(`(?m)^\s*\.(.+?)\((?:(?:i32|i64|f32|f64|v128|funcref|externref),?)*\)(?: .*)?$`)

// describeTrap takes the name of the trap and " in <function>" out of an error
// of wazero; trapped is false when the error is none.
func describeTrap(err error) (name, where string, trapped bool) {
	text := err.Error()
	head, trace, traced := strings.Cut(text, "\nwasm stack trace:\n")
	_, name, trapped = strings.Cut(head, "wasm error: ")
	if !trapped {
		name = strings.TrimSuffix(head, " (recovered by wazero)")
		trapped = traced || errors.Is(err, errInterrupted)
		if strings.HasSuffix(text, "stack overflow") {
			name, trapped = "stack overflow", true
		}
	}
	if match := frame.FindStringSubmatch(trace); match != nil {
		where = " in " + clean(match[1])
	}
	return clean(name), where, trapped
}

// clean makes one line of at most 300 characters of what may come from a guest.
func clean(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	const most = 300
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "…"
	}
	return text
}

func bytesText(n uint64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	default:
		return fmt.Sprintf("%d bytes", n)
	}
}
