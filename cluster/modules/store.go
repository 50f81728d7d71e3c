package modules

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

const (
	digestPrefix  = "sha256:"
	uploadPattern = ".upload-*"
	copyBuffer    = 256 << 10
	// defaultReserve keeps room for the Raft log, which shares the disk.
	defaultReserve = 128 << 20
)

// StoreConfig says where a Store keeps its files.
type StoreConfig struct {
	// Dir is the peer's data directory; the files lie under modules/sha256 in it.
	Dir string
	// Reserve is the number of bytes that stay free on the disk: with less, Put
	// fails with ErrNoSpace. 0 means 128 MiB, on a small disk an eighth of it; a negative number means none.
	Reserve int64
}

// Store is the modules on one peer's disk. It is safe for concurrent use by one process.
type Store struct {
	root    string
	reserve uint64
	free    func(dir string) (uint64, error)
	create  func(dir string) (uploadFile, error)

	// mu orders replacing a file against removing a damaged one, so that a sound
	// copy that has just arrived is not taken for the damaged one.
	mu sync.Mutex
}

// uploadFile is the part of *os.File that an upload needs; tests put failing disks in its place.
type uploadFile interface {
	io.WriteCloser
	Name() string
	Sync() error
}

// NewStore opens the store under cfg.Dir, makes its directories, and removes
// what interrupted uploads left behind.
func NewStore(cfg StoreConfig) (*Store, error) {
	s := &Store{
		root:    filepath.Join(cfg.Dir, "modules", "sha256"),
		reserve: uint64(max(cfg.Reserve, 0)),
		free:    freeBytes,
		create: func(dir string) (uploadFile, error) {
			return os.CreateTemp(dir, uploadPattern)
		},
	}
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return nil, fmt.Errorf("make module directory: %w", err)
	}
	if cfg.Reserve == 0 {
		_, size, err := diskBytes(s.root)
		if err != nil {
			return nil, fmt.Errorf("ask for the size of the disk: %w", err)
		}
		s.reserve = min(defaultReserve, size/8)
	}
	leftovers, err := filepath.Glob(filepath.Join(s.root, uploadPattern))
	if err != nil {
		return nil, fmt.Errorf("look for interrupted uploads: %w", err)
	}
	for _, path := range leftovers {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove interrupted upload: %w", err)
		}
	}
	return s, nil
}

// Put stores the bytes of r under their digest and returns the digest and the
// size in bytes. When expected is not empty the bytes must have that digest.
// After a nil error the module survives a power failure; after any other
// nothing is kept. Put also replaces a damaged file of the same digest. The
// errors wrap ErrEmpty, ErrTooLarge, ErrDigest, ErrNoSpace or what r returned.
func (s *Store) Put(r io.Reader, expected string) (digest string, size uint64, err error) {
	if expected != "" {
		if _, err := hexOf(expected); err != nil {
			return "", 0, err
		}
	}
	if err := s.room(); err != nil {
		return "", 0, err
	}
	f, err := s.create(s.root)
	if err != nil {
		return "", 0, diskError("create upload", err)
	}
	digest, size, err = fill(f, r)
	if err == nil && expected != "" && digest != expected {
		err = fmt.Errorf("%w: the bytes are %s, expected %s", ErrDigest, digest, expected)
	}
	if err == nil {
		err = s.publish(f.Name(), digest)
	}
	if err != nil {
		// The name is gone after a rename; whatever is left of it is an upload that failed.
		_ = os.Remove(f.Name())
		return "", 0, err
	}
	return digest, size, nil
}

// Open returns the bytes of a module, all of them checked against the digest
// beforehand. The caller closes the reader. A damaged file is removed and the
// error wraps ErrDamaged; for a module that is not here it wraps ErrNotFound.
func (s *Store) Open(digest string) (io.ReadCloser, error) {
	path, err := s.path(digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open %s: %w", digest, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open module: %w", err)
	}
	err = verify(f, digest)
	if errors.Is(err, ErrDamaged) {
		err = errors.Join(err, s.discard(path, f))
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Has reports whether a file of this digest is here; only Open tells whether it is sound.
func (s *Store) Has(digest string) bool {
	path, err := s.path(digest)
	if err != nil {
		return false
	}
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular()
}

// Digests returns the digests of all files here, sorted, without reading them.
func (s *Store) Digests() ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(s.root, "??", "*"))
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	digests := make([]string, 0, len(paths))
	for _, path := range paths {
		digest := digestPrefix + filepath.Base(path)
		if own, err := s.path(digest); err == nil && own == path {
			digests = append(digests, digest)
		}
	}
	slices.Sort(digests)
	return digests, nil
}

func (s *Store) path(digest string) (string, error) {
	name, err := hexOf(digest)
	if err != nil {
		return "", err
	}
	return filepath.Join(s.root, name[:2], name), nil
}

func (s *Store) room() error {
	if s.reserve == 0 {
		return nil
	}
	free, err := s.free(s.root)
	if err != nil {
		return fmt.Errorf("ask for free disk space: %w", err)
	}
	if free < s.reserve {
		return fmt.Errorf("%w: %d bytes are free, %d are kept for the cluster's own log", ErrNoSpace, free, s.reserve)
	}
	return nil
}

// publish gives a complete, synced upload its final name.
func (s *Store) publish(upload, digest string) error {
	path, err := s.path(digest)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		if err := syncDir(s.root); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return diskError("make module directory", err)
	}
	s.mu.Lock()
	err = os.Rename(upload, path)
	s.mu.Unlock()
	if err != nil {
		return diskError("name module", err)
	}
	return syncDir(dir)
}

// discard removes the damaged file behind f unless another has taken its place.
func (s *Store) discard(path string, f *os.File) error {
	opened, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at damaged module: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	present, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(opened, present) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at damaged module: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove damaged module: %w", err)
	}
	return nil
}

// fill copies r into f, syncs and closes it.
func fill(f uploadFile, r io.Reader) (digest string, size uint64, err error) {
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = diskError("close upload", cerr)
		}
	}()
	sum := sha256.New()
	// The two sides are kept apart: a full disk is ours, a broken stream the sender's.
	w := &diskWriter{f: f}
	n, err := io.CopyBuffer(io.MultiWriter(w, sum), io.LimitReader(r, MaxSize+1), make([]byte, copyBuffer))
	switch {
	case w.err != nil:
		return "", 0, diskError("write upload", w.err)
	case err != nil:
		return "", 0, fmt.Errorf("receive module: %w", err)
	case n == 0:
		return "", 0, ErrEmpty
	case n > MaxSize:
		return "", 0, ErrTooLarge
	}
	if err := f.Sync(); err != nil {
		return "", 0, diskError("sync upload", err)
	}
	return digestPrefix + hex.EncodeToString(sum.Sum(nil)), uint64(n), nil
}

type diskWriter struct {
	f   io.Writer
	err error
}

func (w *diskWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	if err != nil {
		w.err = err
	}
	return n, err
}

// verify reads all of f, compares it with the digest and goes back to its start.
func verify(f *os.File, digest string) error {
	want, err := hexOf(digest)
	if err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.CopyBuffer(sum, io.LimitReader(f, MaxSize+1), make([]byte, copyBuffer))
	if err != nil {
		// A sector that cannot be read is as lost as one with other bytes in it.
		return fmt.Errorf("read %s: %w: %w", digest, ErrDamaged, err)
	}
	wantSum, err := hex.DecodeString(want)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDigest, err)
	}
	if !bytes.Equal(sum.Sum(nil), wantSum) {
		return fmt.Errorf("read %s: %w: %d bytes have digest sha256:%x", digest, ErrDamaged, n, sum.Sum(nil))
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("rewind module: %w", err)
	}
	return nil
}

// hexOf returns the 64 lower-case hex digits of a digest.
func hexOf(digest string) (string, error) {
	name, ok := strings.CutPrefix(digest, digestPrefix)
	if ok && len(name) == 2*sha256.Size && strings.Trim(name, "0123456789abcdef") == "" {
		return name, nil
	}
	return "", fmt.Errorf("%w: %q is not sha256: and 64 hex digits", ErrDigest, digest)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return diskError("sync directory", err)
	}
	return nil
}

func diskError(doing string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w: %w", doing, ErrNoSpace, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func freeBytes(dir string) (uint64, error) {
	free, _, err := diskBytes(dir)
	return free, err
}

// diskBytes returns how much may still be written below dir, and the size of the disk.
func diskBytes(dir string) (free, size uint64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	//nolint:unconvert // the field types differ between operating systems
	return uint64(st.Bavail) * uint64(st.Bsize), uint64(st.Blocks) * uint64(st.Bsize), nil
}
