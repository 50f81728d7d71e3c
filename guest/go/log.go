package wasmatrix

import (
	"context"
	"log/slog"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// LogHandler is a slog.Handler that writes to the instance's log, where
// `wasmatrix logs` shows it with the correlation id of the present call.
type LogHandler struct {
	// Level is the lightest level written; the zero value is slog.LevelInfo.
	Level slog.Leveler

	prefix string
	attrs  []slog.Attr
}

// Enabled reports whether level is written.
func (h LogHandler) Enabled(_ context.Context, level slog.Level) bool {
	return h.Level == nil && level >= slog.LevelInfo || h.Level != nil && level >= h.Level.Level()
}

// WithAttrs returns a handler that adds attrs to each line.
func (h LogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		a.Key = h.prefix + a.Key
		h.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], a)
	}
	return h
}

// WithGroup returns a handler that puts name and a dot before later keys.
func (h LogHandler) WithGroup(name string) slog.Handler {
	h.prefix += name + "."
	return h
}

// Handle writes one line.
func (h LogHandler) Handle(_ context.Context, r slog.Record) error {
	b := wire.AppendUint(nil, 1, uint64(level(r.Level)))
	b = wire.AppendString(b, 2, r.Message)
	for _, a := range h.attrs {
		b = appendAttr(b, a)
	}
	r.Attrs(func(a slog.Attr) bool {
		a.Key = h.prefix + a.Key
		b = appendAttr(b, a)
		return true
	})
	_, err := call(logWrite, b)
	return err
}

// Logger returns a logger that writes to the instance's log.
func Logger() *slog.Logger { return slog.New(LogHandler{}) }

func appendAttr(b []byte, a slog.Attr) []byte {
	return wire.AppendPair(b, 3, a.Key, a.Value.String())
}

// level maps slog's levels to those of wasmatrix.v1.LogLevel.
func level(l slog.Level) int {
	switch {
	case l < slog.LevelInfo:
		return 1
	case l < slog.LevelWarn:
		return 2
	case l < slog.LevelError:
		return 3
	default:
		return 4
	}
}
