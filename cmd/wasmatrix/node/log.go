package node

import (
	"io"
	"log/slog"
	"os"

	"github.com/lmittmann/tint"
	"golang.org/x/term"
)

// NewLogger makes the logger of a process: coloured text on a terminal, plain
// text or JSON elsewhere.
func NewLogger(w io.Writer, cfg LogConfig) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		level = slog.LevelInfo
	}
	f, isFile := w.(*os.File)
	switch {
	case cfg.Format == "json":
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	case isFile && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "":
		return slog.New(tint.NewTextHandler(w, &tint.Options{Level: level}))
	default:
		return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
	}
}
