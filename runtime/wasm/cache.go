package wasm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wasmatrix/wasmatrix/runtime/wasm/module"
)

const (
	fileMetered = "metered.wasm"
	fileSeal    = "seal"
	tempPrefix  = ".tmp-"
)

// errCorrupt marks an entry of the cache whose files are not what was written.
var errCorrupt = errors.New("damaged cache entry")

// diskCache keeps one directory per module: the metered module, what wazero
// compiled from it, and a seal with the checksum of every file. wazero's own
// checksum leaves out its header and the offsets of functions. An entry appears
// by a rename, so it is complete or not there.
type diskCache struct {
	root  string
	bytes int64
	mu    sync.Mutex // one prune at a time
}

// openDiskCache makes the directory and clears away what was left half done. The
// name of the directory stands for all that the entries depend on besides the
// module: a lookup that succeeds must find code that the engine can load, because
// it would compile by itself, without bounds, what it cannot.
func openDiskCache(dir string, size int64, limits module.Limits) (*diskCache, error) {
	variant := sha256.Sum256(fmt.Appendf(nil, "%+v %s %s %s", limits, engineVersion(), goruntime.GOOS, goruntime.GOARCH))
	c := &diskCache{root: filepath.Join(dir, "metered-"+module.Version+"-"+hex.EncodeToString(variant[:4])), bytes: size}
	if err := os.MkdirAll(c.root, 0o700); err != nil {
		return nil, fmt.Errorf("making the module cache: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(c.root, tempPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("looking through the module cache: %w", err)
	}
	for _, path := range left {
		if err := os.RemoveAll(path); err != nil {
			return nil, fmt.Errorf("clearing the module cache: %w", err)
		}
	}
	return c, nil
}

// engineVersion returns the version of wazero that this program was built with.
func engineVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == "github.com/tetratelabs/wazero" {
			return dep.Version
		}
	}
	return "unknown"
}

// entry returns the directory of a module. Only the letters of a digest get into
// a path.
func (c *diskCache) entry(digest string) (string, error) {
	_, sum, ok := strings.Cut(digest, ":")
	if !ok || len(sum) < 32 || strings.Trim(sum, "0123456789abcdef") != "" {
		return "", fmt.Errorf("malformed module digest %q", clean(digest))
	}
	return filepath.Join(c.root, sum), nil
}

// load returns an entry's directory and its metered module after checking the
// seal; fs.ErrNotExist when there is none, errCorrupt when it is damaged, in
// which case it has been removed.
func (c *diskCache) load(digest string) (dir string, metered []byte, err error) {
	dir, err = c.entry(digest)
	if err != nil {
		return "", nil, err
	}
	want, err := os.ReadFile(filepath.Join(dir, fileSeal))
	if errors.Is(err, fs.ErrNotExist) {
		if _, gone := os.Stat(dir); errors.Is(gone, fs.ErrNotExist) {
			return "", nil, fs.ErrNotExist
		}
	}
	have, metered, sealErr := seal(dir)
	if err = errors.Join(err, sealErr); err != nil || !bytes.Equal(want, have) {
		return "", nil, errors.Join(errCorrupt, err, os.RemoveAll(dir))
	}
	now := time.Now()
	// The time of last use is for pruning only.
	_ = os.Chtimes(filepath.Join(dir, fileSeal), now, now)
	return dir, metered, nil
}

// seal returns one line per file of an entry with its checksum, and the content
// of the metered module.
func seal(dir string) (lines, metered []byte, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, relErr := filepath.Rel(dir, path)
		if err != nil || relErr != nil || d.IsDir() || name == fileSeal {
			return errors.Join(err, relErr)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if name == fileMetered {
			metered = content
		}
		lines = fmt.Appendf(lines, "%x %s\n", sha256.Sum256(content), name)
		return nil
	})
	if err == nil && metered == nil {
		err = fmt.Errorf("%s is missing", fileMetered)
	}
	return lines, metered, err
}

// build makes an entry: compile gets a directory that holds the metered module
// and leaves the compiled code there.
func (c *diskCache) build(ctx context.Context, digest string, metered []byte, compile func(ctx context.Context, dir string) error) (err error) {
	dir, err := c.entry(digest)
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp(c.root, tempPrefix)
	if err != nil {
		return fmt.Errorf("making a cache entry: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	if err := os.WriteFile(filepath.Join(temp, fileMetered), metered, 0o600); err != nil {
		return fmt.Errorf("writing the metered module: %w", err)
	}
	if err := compile(ctx, temp); err != nil {
		return err
	}
	lines, _, err := seal(temp)
	if err != nil {
		return fmt.Errorf("sealing a cache entry: %w", err)
	}
	if err := os.WriteFile(filepath.Join(temp, fileSeal), lines, 0o600); err != nil {
		return fmt.Errorf("sealing a cache entry: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("replacing a cache entry: %w", err)
	}
	if err := os.Rename(temp, dir); err != nil {
		return fmt.Errorf("placing a cache entry: %w", err)
	}
	return c.prune(dir)
}

// prune removes the entries used longest ago, but not keep, until the cache is
// within its size. Code that is loaded does not need its entry.
func (c *diskCache) prune(keep string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	dirs, err := os.ReadDir(c.root)
	if err != nil {
		return fmt.Errorf("looking through the module cache: %w", err)
	}
	type entry struct {
		path string
		size int64
		used time.Time
	}
	var entries []entry
	var total int64
	for _, d := range dirs {
		if strings.HasPrefix(d.Name(), tempPrefix) {
			continue
		}
		e := entry{path: filepath.Join(c.root, d.Name())}
		// An entry that goes away or is damaged counts for what is found of it.
		_ = filepath.WalkDir(e.path, func(_ string, f fs.DirEntry, err error) error {
			if err != nil {
				return fs.SkipAll
			}
			if info, err := f.Info(); err == nil && !f.IsDir() {
				e.size += info.Size()
				if f.Name() == fileSeal {
					e.used = info.ModTime()
				}
			}
			return nil
		})
		total += e.size
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.path, b.path)) })
	for _, e := range entries {
		if total <= c.bytes {
			break
		}
		if e.path == keep {
			continue
		}
		if err := os.RemoveAll(e.path); err != nil {
			return fmt.Errorf("pruning the module cache: %w", err)
		}
		total -= e.size
	}
	return nil
}
