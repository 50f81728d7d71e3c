package modules

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func newStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := NewStore(StoreConfig{Dir: dir, Reserve: -1})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustPut(t *testing.T, s *Store, b []byte) string {
	t.Helper()
	digest, size, err := s.Put(bytes.NewReader(b), "")
	if err != nil || size != uint64(len(b)) || digest != modulestest.Digest(b) {
		t.Fatalf("Put = %s, %d, %v; want %s, %d", digest, size, err, modulestest.Digest(b), len(b))
	}
	return digest
}

func read(s *Store, digest string) ([]byte, error) {
	r, err := s.Open(digest)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestStoreKeepsModulesUnderTheirDigestAcrossARestart(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	a, b := []byte("module a"), bytes.Repeat([]byte("module b"), 100_000)
	da, db := mustPut(t, s, a), mustPut(t, s, b)
	mustPut(t, s, a)

	path := filepath.Join(dir, "modules", "sha256", da[7:9], da[7:])
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the documented place of a module: %v", err)
	}
	s = newStore(t, dir)
	for digest, want := range map[string][]byte{da: a, db: b} {
		got, err := read(s, digest)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want %d bytes", digest, len(got), err, len(want))
		}
		if !s.Has(digest) {
			t.Errorf("Has(%s) is false", digest)
		}
	}
	want := []string{min(da, db), max(da, db)}
	if got, err := s.Digests(); err != nil || !cmp.Equal(got, want) {
		t.Errorf("Digests() = %v, %v; want %v", got, err, want)
	}
}

func TestStoreRefusesAndKeepsNothing(t *testing.T) {
	other := modulestest.Digest([]byte("other"))
	broken := errors.New("connection broke")
	tests := []struct {
		name     string
		r        io.Reader
		expected string
		want     error
	}{
		{"nothing", bytes.NewReader(nil), "", ErrEmpty},
		{"another digest", bytes.NewReader([]byte("module")), other, ErrDigest},
		{"malformed digest", bytes.NewReader([]byte("module")), "sha256:../../../etc/passwd", ErrDigest},
		{"upper-case digest", bytes.NewReader([]byte("module")), "sha256:" + string(bytes.ToUpper([]byte(other[7:]))), ErrDigest},
		{"broken stream", io.MultiReader(bytes.NewReader([]byte("mod")), iotest.ErrReader(broken)), "", broken},
		{"too large", io.LimitReader(zeros{}, MaxSize+1), "", ErrTooLarge},
		{"endless", zeros{}, "", ErrTooLarge},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			s := newStore(t, dir)
			if _, _, err := s.Put(test.r, test.expected); !errors.Is(err, test.want) {
				t.Errorf("error is %v, want %v", err, test.want)
			}
			if left := files(t, dir); len(left) > 0 {
				t.Errorf("left on disk: %v", left)
			}
			if s.Has(other) {
				t.Error("Has reports a module that was refused")
			}
		})
	}
}

func TestStoreTakesAModuleOfTheLargestSize(t *testing.T) {
	s := newStore(t, t.TempDir())
	digest, size, err := s.Put(io.LimitReader(zeros{}, MaxSize), "")
	if err != nil || size != MaxSize || !s.Has(digest) {
		t.Errorf("Put = %s, %d, %v", digest, size, err)
	}
}

func TestStoreFindsAndRemovesADamagedFile(t *testing.T) {
	content := bytes.Repeat([]byte("wasm"), 1000)
	for name, damage := range map[string]func(b []byte) []byte{
		"one bit": func(b []byte) []byte { b[1234] ^= 4; return b },
		"cut off": func(b []byte) []byte { return b[:len(b)-1] },
		"longer":  func(b []byte) []byte { return append(b, 0) },
		"emptied": func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := newStore(t, dir)
			digest := mustPut(t, s, content)
			path := files(t, dir)[0]
			if err := os.WriteFile(path, damage(bytes.Clone(content)), 0o600); err != nil {
				t.Fatal(err)
			}
			if b, err := read(s, digest); !errors.Is(err, ErrDamaged) || b != nil {
				t.Errorf("reading a damaged module = %d bytes, %v; want ErrDamaged", len(b), err)
			}
			if s.Has(digest) {
				t.Error("the damaged file is still there")
			}
			if _, err := read(s, digest); !errors.Is(err, ErrNotFound) {
				t.Errorf("then the error is %v, want ErrNotFound", err)
			}
			mustPut(t, s, content)
			if b, err := read(s, digest); err != nil || !bytes.Equal(b, content) {
				t.Errorf("after storing it again: %d bytes, %v", len(b), err)
			}
		})
	}
}

func TestStoreReplacesADamagedFileByASoundOne(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	digest := mustPut(t, s, []byte("module"))
	if err := os.WriteFile(files(t, dir)[0], []byte("mudole"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, []byte("module"))
	if b, err := read(s, digest); err != nil || string(b) != "module" {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestStoreDoesNotRemoveASoundCopyForADamagedOne(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	digest := mustPut(t, s, []byte("module"))
	path := files(t, dir)[0]
	if err := os.WriteFile(path, []byte("mudole"), 0o600); err != nil {
		t.Fatal(err)
	}
	damaged, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = damaged.Close() }()
	// A sound copy takes its place after the damaged one was read and before it is removed.
	mustPut(t, s, []byte("module"))
	if err := s.discard(path, damaged); err != nil {
		t.Fatal(err)
	}
	if b, err := read(s, digest); err != nil || string(b) != "module" {
		t.Errorf("read %q, %v; want the sound copy", b, err)
	}
}

func TestStoreRemovesWhatInterruptedUploadsLeft(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	digest := mustPut(t, s, []byte("module"))
	leftover := filepath.Join(dir, "modules", "sha256", ".upload-123")
	if err := os.WriteFile(leftover, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, dir)
	if _, err := os.Stat(leftover); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leftover is still there: %v", err)
	}
	if !s.Has(digest) {
		t.Error("a complete module was removed with it")
	}
}

func TestStoreReportsAFullDiskAsExhausted(t *testing.T) {
	for name, full := range map[string]func(*Store){
		"while writing": func(s *Store) { s.create = failingFile(func(f *faultyFile) { f.write = syscall.ENOSPC }) },
		"while syncing": func(s *Store) { s.create = failingFile(func(f *faultyFile) { f.sync = syscall.ENOSPC }) },
		"while closing": func(s *Store) { s.create = failingFile(func(f *faultyFile) { f.close = syscall.EDQUOT }) },
		"while creating": func(s *Store) {
			s.create = func(string) (uploadFile, error) { return nil, &os.PathError{Err: syscall.ENOSPC} }
		},
		"below the reserve": func(s *Store) {
			s.reserve = 1000
			s.free = func(string) (uint64, error) { return 999, nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := newStore(t, dir)
			full(s)
			_, _, err := s.Put(bytes.NewReader([]byte("module")), "")
			if !errors.Is(err, ErrNoSpace) {
				t.Errorf("error is %v, want ErrNoSpace", err)
			}
			if code := apierror.CodeOf(APIError(err)); code != pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED {
				t.Errorf("code is %v, want RESOURCE_EXHAUSTED", code)
			}
			if left := files(t, dir); len(left) > 0 {
				t.Errorf("left on disk: %v", left)
			}
		})
	}
}

func TestStoreDoesNotAcknowledgeWhatTheDiskDidNotTake(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	s.create = failingFile(func(f *faultyFile) { f.sync = syscall.EIO })
	_, _, err := s.Put(bytes.NewReader([]byte("module")), "")
	if !errors.Is(err, syscall.EIO) || len(files(t, dir)) > 0 {
		t.Errorf("error is %v and the disk holds %v; want EIO and nothing", err, files(t, dir))
	}
}

func TestStoreServesManyAtOnce(t *testing.T) {
	s := newStore(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			content := fmt.Appendf(nil, "module %d", i%4)
			digest, _, err := s.Put(bytes.NewReader(content), "")
			if err != nil {
				t.Error(err)
				return
			}
			if b, err := read(s, digest); err != nil || !bytes.Equal(b, content) {
				t.Errorf("read %q, %v; want %q", b, err, content)
			}
		})
	}
	wg.Wait()
	if digests, err := s.Digests(); err != nil || len(digests) != 4 {
		t.Errorf("Digests() = %v, %v; want 4", digests, err)
	}
}

func TestAdmitStoresOnlyGuests(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir)
	guest := modulestest.Reactor("wasmatrix:kv/v1 get")
	for name, test := range map[string]struct {
		r        io.Reader
		expected string
		code     pb.ErrorCode
	}{
		"refused at the start":  {bytes.NewReader([]byte("not wasm at all, and long enough")), "", pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		"refused at the end":    {bytes.NewReader(modulestest.Wasm(nil, "add")), "", pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		"empty":                 {bytes.NewReader(nil), "", pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		"another digest":        {bytes.NewReader(guest), modulestest.Digest(nil), pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
		"larger than the limit": {io.MultiReader(bytes.NewReader([]byte("\x00asm\x01\x00\x00\x00\x00\xff\xff\xff\xff\x0f\x00")), zeros{}), "", pb.ErrorCode_ERROR_CODE_INVALID_REQUEST},
	} {
		m, err := s.Admit(test.r, test.expected)
		if m != nil || apierror.CodeOf(APIError(err)) != test.code {
			t.Errorf("%s: %v, %v; want %v", name, m, err, test.code)
		}
		if left := files(t, dir); len(left) > 0 {
			t.Errorf("%s: left on disk: %v", name, left)
		}
	}
	m, err := s.Admit(iotest.OneByteReader(bytes.NewReader(guest)), modulestest.Digest(guest))
	if err != nil || m.GetDigest() != modulestest.Digest(guest) || m.GetSizeBytes() != uint64(len(guest)) ||
		m.GetKind() != pb.ModuleKind_MODULE_KIND_REACTOR {
		t.Fatalf("Admit = %v, %v", m, err)
	}
	if b, err := read(s, m.GetDigest()); err != nil || !bytes.Equal(b, guest) {
		t.Errorf("stored %d bytes, %v", len(b), err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// faultyFile is an upload on a disk that fails where told.
type faultyFile struct {
	*os.File
	write, sync, close error
}

func failingFile(how func(*faultyFile)) func(string) (uploadFile, error) {
	return func(dir string) (uploadFile, error) {
		f, err := os.CreateTemp(dir, uploadPattern)
		if err != nil {
			return nil, err
		}
		faulty := &faultyFile{File: f}
		how(faulty)
		return faulty, nil
	}
}

func (f *faultyFile) Write(p []byte) (int, error) {
	if f.write != nil {
		return 0, &os.PathError{Op: "write", Path: f.Name(), Err: f.write}
	}
	return f.File.Write(p)
}

func (f *faultyFile) Sync() error { return errors.Join(f.sync, f.File.Sync()) }

func (f *faultyFile) Close() error { return errors.Join(f.close, f.File.Close()) }
