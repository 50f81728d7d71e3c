package wasm

import (
	"errors"
	"log/slog"
	goruntime "runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

// Config configures a Runtime. Only Logger is required.
type Config struct {
	// CacheDir holds compiled modules; it is created when missing and belongs to
	// this Runtime alone. Empty means that nothing is kept on disk, and then
	// modules are compiled in this process.
	CacheDir string
	// CacheBytes bounds the size of CacheDir; what was used longest ago goes
	// first. 0 means 4 GiB.
	CacheBytes int64
	// CompileCommand is the program and the first arguments of the child process
	// that compiles; it must end in a call of CompileMain with the arguments that
	// follow. Empty means to compile in this process, without bounds.
	CompileCommand []string
	// CompileTimeout bounds the compilation of one module; 0 means one minute.
	CompileTimeout time.Duration
	// CompileMemoryBytes bounds the memory of the child process; 0 means 2 GiB.
	CompileMemoryBytes uint64
	// CompileConcurrency is how many modules are compiled at once; 0 means half of
	// the processors, at least 1.
	CompileConcurrency int
	// IdleModules is how many loaded modules are kept in memory while no instance
	// uses them; 0 means 16, negative none.
	IdleModules int
	// SingleUse is for a process that runs one instance: nothing is made ready for
	// the next start of its module.
	SingleUse bool
	// Limits bound modules; zeros mean the defaults.
	Limits module.Limits
	// Logger takes what operators should know; guests' output never goes there.
	Logger *slog.Logger
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() (Config, error) {
	if c.Logger == nil {
		return c, errors.New("wasm runtime needs a logger")
	}
	if c.CacheDir == "" && len(c.CompileCommand) > 0 {
		return c, errors.New("compiling in a child process needs a cache directory")
	}
	if c.CacheBytes == 0 {
		c.CacheBytes = 4 << 30
	}
	if c.CompileTimeout == 0 {
		c.CompileTimeout = time.Minute
	}
	if c.CompileMemoryBytes == 0 {
		c.CompileMemoryBytes = 2 << 30
	}
	if c.CompileConcurrency == 0 {
		c.CompileConcurrency = max(1, goruntime.NumCPU()/2)
	}
	if c.IdleModules == 0 {
		c.IdleModules = 16
	}
	return c, nil
}
