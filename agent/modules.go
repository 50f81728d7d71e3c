package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Sentinels of the module store.
var (
	// errModuleMissing: no peer that answered has the module.
	errModuleMissing = errors.New("no peer has the module")
	// errModuleUnreachable: no peer could be asked, or the transfer broke.
	errModuleUnreachable = errors.New("the module could not be fetched")
	// errModuleDamaged: the bytes do not have the digest.
	errModuleDamaged = errors.New("the module does not match its digest")
)

const (
	// maxModuleBytes is the largest binary: that of UploadModuleHeader.size_bytes.
	maxModuleBytes = 64 << 20
	// fetchTimeout bounds the transfer from one peer.
	fetchTimeout = time.Minute
)

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// moduleFile is a verified module on this node's disk.
type moduleFile struct {
	path    string
	command bool
}

// moduleStore keeps modules under their digests in a directory. A file is
// verified each time it is handed out; a damaged one is fetched again.
type moduleStore struct {
	dir string
	log *slog.Logger
	// peers are asked in turn for a module that is not here; none in standalone mode.
	peers   func() []string
	conn    Dial
	fetched func(err error)

	flights singleflight.Group
	mu      sync.Mutex
	command map[string]bool // by digest; content never changes
}

// prepare makes the directory and removes what an interrupted transfer left.
func (s *moduleStore) prepare() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("creating the module directory: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(s.dir, "*.tmp-*"))
	if err != nil {
		return fmt.Errorf("looking for unfinished modules: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("removing an unfinished module: %w", err)
		}
	}
	return nil
}

func (s *moduleStore) path(digest string) string {
	return filepath.Join(s.dir, digest[len("sha256:"):]+".wasm")
}

// get returns the module, fetching it when it is not here or is damaged. Callers
// that ask for the same digest at once share one transfer, which goes on when
// one of them gives up.
func (s *moduleStore) get(ctx context.Context, digest string) (moduleFile, error) {
	if !digestPattern.MatchString(digest) {
		return moduleFile{}, fmt.Errorf("%w: %q is not a digest", errModuleMissing, digest)
	}
	flight := s.flights.DoChan(digest, func() (any, error) {
		return s.load(context.WithoutCancel(ctx), digest)
	})
	select {
	case <-ctx.Done():
		return moduleFile{}, ctx.Err()
	case res := <-flight:
		if res.Err != nil {
			return moduleFile{}, res.Err
		}
		return moduleFile{path: s.path(digest), command: res.Val == true}, nil
	}
}

// load makes sure that the module is on the disk and reports whether it is a command.
func (s *moduleStore) load(ctx context.Context, digest string) (bool, error) {
	switch err := s.verify(digest); {
	case err == nil:
		return s.isCommand(digest)
	case errors.Is(err, os.ErrNotExist):
	case errors.Is(err, errModuleDamaged):
		s.log.WarnContext(ctx, "a cached module is damaged and will be fetched again", "module", digest)
		if err := os.Remove(s.path(digest)); err != nil {
			return false, fmt.Errorf("removing a damaged module: %w", err)
		}
	default:
		return false, err
	}
	err := s.fetch(ctx, digest)
	s.fetched(err)
	if err != nil {
		return false, err
	}
	return s.isCommand(digest)
}

// fetch stores the module from the first peer that delivers it whole.
func (s *moduleStore) fetch(ctx context.Context, digest string) error {
	failure := errModuleMissing
	for _, address := range s.peers() {
		_, err := s.store(digest, func(to io.Writer) error { return s.fetchFrom(ctx, address, digest, to) })
		if err == nil {
			return nil
		}
		if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND {
			failure = fmt.Errorf("%w from %s: %w", errModuleUnreachable, address, err)
		}
	}
	return failure
}

func (s *moduleStore) fetchFrom(ctx context.Context, address, digest string, to io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	conn, err := s.conn(address)
	if err != nil {
		return err
	}
	stream, err := pb.NewControlPlaneServiceClient(conn).FetchModule(ctx, &pb.FetchModuleRequest{Digest: digest})
	if err != nil {
		return err
	}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := to.Write(msg.GetChunk()); err != nil {
			return err
		}
	}
}

// verify compares the file's content with its digest.
func (s *moduleStore) verify(digest string) error {
	f, err := os.Open(s.path(digest))
	if err != nil {
		return fmt.Errorf("opening a module: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("reading module %s: %w", digest, err)
	}
	if sumDigest(h) != digest {
		return errModuleDamaged
	}
	return nil
}

// isCommand looks into a verified module. One whose sections cannot be read
// counts as a reactor; the executor says what is wrong with it.
func (s *moduleStore) isCommand(digest string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known, ok := s.command[digest]; ok {
		return known, nil
	}
	f, err := os.Open(s.path(digest))
	if err != nil {
		return false, fmt.Errorf("opening a module: %w", err)
	}
	defer f.Close()
	info, err := guestabi.Inspect(f)
	if refused := (*apierror.Error)(nil); err != nil && !errors.As(err, &refused) {
		return false, fmt.Errorf("reading a module: %w", err)
	}
	s.command[digest] = info.GetKind() == pb.ModuleKind_MODULE_KIND_COMMAND
	return s.command[digest], nil
}

// store writes what from delivers, atomically and durably, and returns its
// digest. The content must have the given digest unless that is empty.
func (s *moduleStore) store(digest string, from func(io.Writer) error) (string, error) {
	f, err := os.CreateTemp(s.dir, "module.tmp-*")
	if err != nil {
		return "", fmt.Errorf("creating a module: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	h := sha256.New()
	if err := from(&boundedWriter{to: io.MultiWriter(f, h), left: maxModuleBytes}); err != nil {
		return "", err
	}
	got := sumDigest(h)
	if digest != "" && got != digest {
		return "", fmt.Errorf("%w: got %s, want %s", errModuleDamaged, got, digest)
	}
	if err := f.Sync(); err != nil {
		return "", fmt.Errorf("writing a module: %w", err)
	}
	if err := os.Rename(f.Name(), s.path(got)); err != nil {
		return "", fmt.Errorf("writing a module: %w", err)
	}
	return got, syncDir(s.dir)
}

func sumDigest(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// boundedWriter refuses more than left bytes.
type boundedWriter struct {
	to   io.Writer
	left int
}

func (w *boundedWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return 0, fmt.Errorf("%w: more than %d bytes", errModuleDamaged, maxModuleBytes)
	}
	w.left -= len(p)
	return w.to.Write(p)
}
