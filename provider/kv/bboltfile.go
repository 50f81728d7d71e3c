package kv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/wasmatrix/wasmatrix/provider"
)

// fileName is the name of the file in the provider's directory.
const fileName = "kv.db"

// lockTimeout is how long to wait for another process to let go of the file,
// such as one that is just being replaced.
const lockTimeout = 2 * time.Second

// verifyUpTo is the largest file in bytes that is read in full at start unless
// told otherwise; that takes well under a second.
const verifyUpTo = 256 << 20

// boltOptions are the settings of the bbolt driver.
type boltOptions struct {
	dir    string
	sync   bool
	verify string
	limit  int64
}

// errPanic marks what bbolt panicked about.
var errPanic = errors.New("panic in bbolt")

// openBolt opens or makes the file.
func openBolt(o boltOptions) (*boltStore, error) {
	s := &boltStore{path: filepath.Join(o.dir, fileName)}
	if err := s.open(o); err != nil {
		return nil, err
	}
	if err := s.prepare(o); err != nil {
		_ = s.guard(s.db.Close) // the first error says more
		return nil, err
	}
	s.commits = newCommitter(s.commit)
	go s.commits.run()
	return s, nil
}

func (s *boltStore) open(o boltOptions) error {
	err := s.guard(func() (err error) {
		s.db, err = bolt.Open(s.path, 0o600, &bolt.Options{
			Timeout:      lockTimeout,
			FreelistType: bolt.FreelistMapType,
			NoStatistics: true,
			NoSync:       !o.sync,
			NoGrowSync:   !o.sync,
			MaxSize:      int(o.limit),
			OpenFile: func(name string, flag int, mode fs.FileMode) (*os.File, error) {
				var err error
				s.file, err = os.OpenFile(name, flag, mode)
				return s.file, err
			},
		})
		return err
	})
	if err == nil {
		return nil
	}
	if s.file != nil {
		_ = s.file.Close() // lets go of the lock when bbolt panicked; else it is closed already
	}
	if errors.Is(err, berrors.ErrTimeout) {
		return provider.Errorf(provider.ErrUnavailable, "%s is in use by another process", s.path).
			With("file", s.path).NextStep("stop the other process; fuser %s shows it", s.path).Because(err)
	}
	return fileError(s.path, err)
}

// prepare checks the file and makes its buckets.
func (s *boltStore) prepare(o boltOptions) error {
	info, err := s.file.Stat()
	if err != nil {
		return fileError(s.path, err)
	}
	if o.verify == "always" || o.verify == "auto" && info.Size() <= verifyUpTo {
		if err := checkError(s.path, checkFile(s.file, info.Size())); err != nil {
			return err
		}
	}
	err = s.guard(func() error { return s.db.Update(s.makeBuckets) })
	if err == nil {
		err = s.guard(func() error { return s.db.Update(s.loadMarks) })
	}
	return fileError(s.path, err)
}

func (s *boltStore) makeBuckets(tx *bolt.Tx) error {
	had := 0
	for _, name := range [][]byte{dataBucket(), expiryBucket(), totalsBucket()} {
		if tx.Bucket(name) != nil {
			had++
		} else if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	if _, err := tx.CreateBucketIfNotExists(fencesBucket()); err != nil { // files of an earlier version have none
		return err
	}
	switch had {
	case 0:
		return tx.Bucket(totalsBucket()).Put(totalsKey(), (&totals{}).encode())
	case 3:
		return nil
	default:
		return damaged(s.path, fmt.Sprintf("it has %d of its 3 parts", had))
	}
}

// guard turns what bbolt does about a damaged file, a panic or a fault in the
// mapped memory, into an error.
func (s *boltStore) guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		why := fmt.Sprint(p)
		if _, fault := p.(interface{ Addr() uintptr }); fault {
			why = "a part of it is missing or cannot be read"
		}
		err = damaged(s.path, why).Because(errPanic)
	}()
	return f()
}

// full reports whether err says that there was no room, and that nothing was
// written: a failed sync, unlike a failed write, is no *fs.PathError. bbolt
// keeps only the text of a failure to make the file longer.
func full(err error) bool {
	if errors.Is(err, berrors.ErrMaxSizeReached) {
		return true
	}
	var path *fs.PathError
	for _, noRoom := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, noRoom) && errors.As(err, &path) ||
			err != nil && strings.HasPrefix(err.Error(), "file resize error") && strings.HasSuffix(err.Error(), noRoom.Error()) {
			return true
		}
	}
	return false
}

// fileError gives an error of the file one of our sentinels and a next step.
func fileError(path string, err error) error {
	var own *provider.Error
	switch {
	case err == nil || errors.As(err, &own):
		return err
	case errors.Is(err, berrors.ErrMaxSizeReached):
		return provider.Errorf(provider.ErrExhausted, "%s has reached its max_bytes", path).With("file", path).
			NextStep("delete keys, or raise the provider's max_bytes setting").Because(err)
	case full(err):
		return provider.Errorf(provider.ErrExhausted, "the disk of %s is full", path).With("file", path).
			NextStep("free space: df -h %s", filepath.Dir(path)).Because(err)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return damaged(path, err.Error()).Because(err)
	default:
		return provider.Errorf(provider.ErrInternal, "%s cannot be used: %s", path, err).With("file", path).Because(err)
	}
}

func damaged(path, why string) *provider.Error {
	return provider.Errorf(provider.ErrInternal, "%s is damaged: %s", path, why).With("file", path).
		NextStep("put a copy of it back, or start empty: mv %s %s.damaged", path, path)
}

func damagedRecord(path, bucket string, key []byte) *provider.Error {
	return provider.Errorf(provider.ErrInternal, "a record of %s does not match its checksum", path).
		With("file", path).With("bucket", bucket).With("key", strconv.Quote(string(key))).
		NextStep("delete or overwrite the key, or put a copy of the file back")
}
