package wasm

import (
	"context"
	"errors"
	"fmt"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
)

// engineConfig is how every module is compiled, here and in the child process:
// what one leaves in the cache on disk the other finds.
func engineConfig(cache wazero.CompilationCache) wazero.RuntimeConfig {
	c := wazero.NewRuntimeConfig().
		WithCoreFeatures(api.CoreFeaturesV2).
		WithDebugInfoEnabled(false).
		WithMemoryLimitPages(1 << 16)
	if cache != nil {
		c = c.WithCompilationCache(cache)
	}
	return c
}

// unit is one loaded module: a wazero runtime that holds its code and nothing else.
type unit struct {
	shape    shape
	runtime  wazero.Runtime
	compiled wazero.CompiledModule
	cache    wazero.CompilationCache
	spare    spare
}

// newUnit loads a metered module. With dir, it takes the compiled code from there
// or leaves it there.
func newUnit(ctx context.Context, metered []byte, s shape, dir string) (u *unit, err error) {
	u = &unit{shape: s}
	defer func() {
		// wazero must not bring down the process, whatever it makes of a module.
		if r := recover(); r != nil {
			err = fmt.Errorf("compiling the module panicked: %v", r)
		}
		if err != nil {
			err = errors.Join(err, u.close(ctx))
			u = nil
		}
	}()
	if dir != "" {
		if u.cache, err = wazero.NewCompilationCacheWithDir(dir); err != nil {
			return u, fmt.Errorf("opening the compilation cache: %w", err)
		}
	}
	u.runtime = wazero.NewRuntimeWithConfig(ctx, engineConfig(u.cache))
	if err := buildHost(ctx, u.runtime); err != nil {
		return u, err
	}
	if u.compiled, err = u.runtime.CompileModule(ctx, metered); err != nil {
		return u, fmt.Errorf("%w: %w", errRejected, err)
	}
	return u, nil
}

// errRejected marks a module that wazero does not accept.
var errRejected = errors.New("the module does not validate")

func (u *unit) close(ctx context.Context) error {
	var errs []error
	u.spare.close()
	if u.runtime != nil {
		errs = append(errs, u.runtime.Close(ctx))
	}
	if u.cache != nil {
		errs = append(errs, u.cache.Close(ctx))
	}
	return errors.Join(errs...)
}
