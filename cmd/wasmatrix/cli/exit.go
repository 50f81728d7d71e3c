package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The exit codes.
const (
	exitOK           = 0
	exitInternal     = 1
	exitUsage        = 2
	exitNotFound     = 3
	exitConflict     = 4
	exitDenied       = 5
	exitUnreachable  = 6
	exitDegraded     = 7
	exitFailed       = 8
	exitNotPlaceable = 9
	// ExitDisk is that of a peer whose disk hangs or failed; started again it may go on.
	ExitDisk = 10
	// ExitDamaged is that of a peer whose files are damaged; somebody must take the step that it names.
	ExitDamaged = 11
	// exitInterrupted is what a shell expects after Ctrl-C.
	exitInterrupted = 130
)

// exitError ends the process with a code of its own; with an error of the API
// that is printed, or silently.
type exitError struct {
	code int
	err  *apierror.Error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error {
	if e.err == nil {
		return nil
	}
	return e.err
}

// ExitWith returns an error with which Execute returns code and prints nothing:
// the command has said what there is to say.
func ExitWith(code int) error { return &exitError{code: code} }

// fail returns an error that is printed as e and exits with code.
func fail(code int, e *apierror.Error) error { return &exitError{code: code, err: e} }

// Stopped returns err as the reason of a node to end with an exit code of its own.
func Stopped(code int, err error) error {
	return fail(code, apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "%s", err))
}

// verdict says what a command found when that is no failure of a call, such as
// that of a workload. It has no error code.
func verdict(format string, args ...any) *apierror.Error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_UNSPECIFIED, format, args...)
}

// outcome names what an exit code stands for when there is no error code.
func outcome(code int) string {
	switch code {
	case exitNotFound:
		return "not found"
	case exitDegraded:
		return "degraded"
	case exitFailed:
		return "workload failed"
	case exitNotPlaceable:
		return "not placeable"
	case exitInterrupted:
		return "interrupted"
	default:
		return "failed"
	}
}

// usageError is a command line that cannot be understood.
type usageError struct {
	err  error
	next string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// Usage returns err as a mistake in the command line or in a file it names; it
// exits with 2.
func Usage(err error) error { return &usageError{err: err} }

func usagef(format string, args ...any) error { return &usageError{err: fmt.Errorf(format, args...)} }

// exitCode is the one place where failures become exit codes.
func exitCode(err error) int {
	var own *exitError
	var usage *usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &own):
		return own.code
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	e := apierror.From(err)
	switch e.Code() {
	case pb.ErrorCode_ERROR_CODE_INVALID_REQUEST:
		// The server names the candidates of an ambiguous name or prefix.
		if e.Detail("matches") != "" {
			return exitNotFound
		}
		return exitUsage
	case pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND, pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND,
		pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND:
		return exitNotFound
	case pb.ErrorCode_ERROR_CODE_CONFLICT:
		return exitConflict
	case pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED:
		return exitDenied
	case pb.ErrorCode_ERROR_CODE_NO_LEADER, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE:
		return exitUnreachable
	case pb.ErrorCode_ERROR_CODE_TIMEOUT, pb.ErrorCode_ERROR_CODE_PROVIDER_UNAVAILABLE,
		pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED:
		return exitDegraded
	default:
		return exitInternal
	}
}

// asAPIError gives every failure the shape of the API.
func asAPIError(err error) *apierror.Error {
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		e := apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s", usage.Error())
		if usage.next != "" {
			return e.Next("%s", usage.next)
		}
		return e
	case errors.Is(err, context.Canceled):
		return verdict("interrupted; what was asked for may have been done")
	case errors.Is(err, identity.ErrExpired), errors.Is(err, identity.ErrUntrusted),
		errors.Is(err, identity.ErrWrongCluster), errors.Is(err, identity.ErrNotAllowed):
		return apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "%s", err).
			Next("wasmatrix context show tells which certificate is used")
	default:
		return apierror.From(err)
	}
}

// report prints a failure and returns the exit code.
func report(ctx context.Context, env Env, form string, err error) int {
	var silent *exitError
	if errors.As(err, &silent) && silent.err == nil {
		return silent.code
	}
	shaped := asAPIError(err)
	code := exitCode(err)
	if code == exitInternal {
		code = exitCode(shaped)
	}
	full := shaped.Proto(ctx)
	if _, usage := errors.AsType[*usageError](err); usage {
		// It caused nothing in the cluster that one could look for.
		full.CorrelationId = ""
	}
	if form == formJSON {
		if raw, jsonErr := marshalJSON(full); jsonErr == nil {
			fmt.Fprintf(env.Stderr, "%s\n", raw)
			return code
		}
	}
	printError(env.Stderr, full, code)
	return code
}

// messageLines makes a message fit to be shown: lines after the first are
// indented, so that none passes for a next step or a code.
func messageLines(text string) string {
	lines := strings.Split(clean(strings.TrimRight(text, "\n")), "\n")
	for i, line := range lines {
		if i > 0 && !strings.HasPrefix(line, " ") {
			lines[i] = "  " + line
		}
	}
	return strings.Join(lines, "\n")
}

// printError writes the four parts of a failure.
func printError(w io.Writer, e *pb.Error, code int) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "error: %s\n", messageLines(e.GetMessage()))
	details := e.GetDetails()
	width := 0
	for key := range details {
		width = max(width, len(cleanLine(key)))
	}
	for _, key := range slices.Sorted(maps.Keys(details)) {
		fmt.Fprintf(&b, "  %-*s  %s\n", width, cleanLine(key), cleanLine(details[key]))
	}
	if e.GetNextStep() != "" {
		fmt.Fprintf(&b, "try:  %s\n", cleanLine(e.GetNextStep()))
	}
	label := "code " + shortName(e.GetCode().String(), "ERROR_CODE_")
	if e.GetCode() == pb.ErrorCode_ERROR_CODE_UNSPECIFIED {
		label = outcome(code)
	}
	fmt.Fprintf(&b, "%s · exit %d", label, code)
	if e.GetCorrelationId() != "" {
		fmt.Fprintf(&b, " · %s %s", correlation.Header, cleanLine(e.GetCorrelationId()))
	}
	fmt.Fprintln(&b)
	_, _ = w.Write(b.Bytes())
}

// notExist reports whether err is that of a missing file.
func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
