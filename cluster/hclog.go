package cluster

import (
	"fmt"
	"io"
	"log"
	"log/slog"
	"slices"

	"github.com/hashicorp/go-hclog"
)

// hcLog lets hashicorp/raft log through slog.
type hcLog struct {
	log  *slog.Logger
	name string
	args []any
}

var _ hclog.Logger = hcLog{}

func newHCLog(l *slog.Logger) hclog.Logger { return hcLog{log: l} }

// Log writes a record. What raft calls an error is mostly that a peer does not
// answer: a warning for everybody else.
func (l hcLog) Log(level hclog.Level, msg string, args ...any) {
	write := l.log.Debug
	switch level {
	case hclog.Info:
		write = l.log.Info
	case hclog.Warn, hclog.Error:
		write = l.log.Warn
	default:
	}
	for i, arg := range args {
		if f, ok := arg.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	write(msg, args...)
}

// Trace writes a debug record.
func (l hcLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }

// Debug writes a debug record.
func (l hcLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }

// Info writes an info record.
func (l hcLog) Info(msg string, args ...any) { l.Log(hclog.Info, msg, args...) }

// Warn writes a warning.
func (l hcLog) Warn(msg string, args ...any) { l.Log(hclog.Warn, msg, args...) }

// Error writes a warning.
func (l hcLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

// IsTrace is always false.
func (hcLog) IsTrace() bool { return false }

// IsDebug is always true: slog decides.
func (hcLog) IsDebug() bool { return true }

// IsInfo is always true: slog decides.
func (hcLog) IsInfo() bool { return true }

// IsWarn is always true: slog decides.
func (hcLog) IsWarn() bool { return true }

// IsError is always true: slog decides.
func (hcLog) IsError() bool { return true }

// ImpliedArgs returns what With was given.
func (l hcLog) ImpliedArgs() []any { return l.args }

// With adds attributes to every record.
func (l hcLog) With(args ...any) hclog.Logger {
	return hcLog{log: l.log.With(args...), name: l.name, args: append(slices.Clip(l.args), args...)}
}

// Name returns the name given by Named.
func (l hcLog) Name() string { return l.name }

// Named adds a name.
func (l hcLog) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

// ResetNamed replaces the name.
func (l hcLog) ResetNamed(name string) hclog.Logger {
	return hcLog{log: l.log.With("logger", name), name: name, args: l.args}
}

// SetLevel does nothing: slog decides.
func (hcLog) SetLevel(hclog.Level) {}

// GetLevel returns the lowest level that is not dropped here.
func (hcLog) GetLevel() hclog.Level { return hclog.Debug }

// StandardLogger returns a logger of the log package.
func (l hcLog) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(opts), "", 0)
}

// StandardWriter returns a writer whose lines become records.
func (l hcLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return slog.NewLogLogger(l.log.Handler(), slog.LevelInfo).Writer()
}
