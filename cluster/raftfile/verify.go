package raftfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// lockWait is how long Open waits for another process to let go of the file.
const lockWait = 2 * time.Second

// gap is a range of indexes without entries between the bounds of the log.
type gap struct{ first, last uint64 }

// contents is what a check found.
type contents struct {
	head head
	gaps []gap
}

// verify reads the whole file while no other process has it open. Its error
// wraps ErrInUse or ErrDamaged unless the file could not be opened.
func verify(path string) (_ contents, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return contents{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := lock(f); err != nil {
		return contents{}, fmt.Errorf("%w: %s: %w", ErrInUse, path, err)
	}
	damaged := func(err error) (contents, error) {
		return contents{}, fmt.Errorf("%w: %s: %w", ErrDamaged, path, err)
	}
	// What a process before this one wrote and could not sync is either on the
	// disk afterwards or not read.
	if err := f.Sync(); err != nil {
		return damaged(fmt.Errorf("sync: %w", err))
	}
	dropCache(f)
	info, err := f.Stat()
	if err != nil {
		return contents{}, err
	}
	found, err := inspect(f, info.Size())
	if err != nil {
		return damaged(err)
	}
	return found, nil
}

func lock(f *os.File) error {
	deadline := time.Now().Add(lockWait)
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// inspect compares what is in the file with its head.
func inspect(file io.ReaderAt, size int64) (contents, error) {
	var want, got head
	var out contents
	tx, err := check(file, size, func(bucket string, key, value []byte) error {
		switch bucket {
		case string(bucketHead):
			if string(key) != string(keyHead) {
				return fmt.Errorf("a head named %q", key)
			}
			var err error
			want, err = decodeHead(value)
			return err
		case string(bucketConf):
			if _, err := unseal(key, value); err != nil {
				return fmt.Errorf("the value of %s: %w", key, err)
			}
			got.conf += digest(key, value)
			return nil
		}
		if len(key) != 8 {
			return fmt.Errorf("an index of %d bytes", len(key))
		}
		index := binary.BigEndian.Uint64(key)
		if _, err := unseal(key, value); err != nil {
			return fmt.Errorf("entry %d: %w", index, err)
		}
		if got.count == 0 {
			got.first = index
		} else if index != got.last+1 {
			out.gaps = append(out.gaps, gap{got.last + 1, index - 1})
		}
		got.last, got.count, got.logs = index, got.count+1, got.logs+digest(key, value)
		return nil
	})
	if err != nil {
		return contents{}, err
	}
	got.tx = tx
	switch {
	case want.tx != got.tx:
		return contents{}, fmt.Errorf("it holds what transaction %d left, the last was %d", want.tx, got.tx)
	case want.first != got.first || want.last != got.last || want.count != got.count:
		return contents{}, fmt.Errorf("it has %d entries from %d to %d; there were %d from %d to %d", got.count, got.first, got.last, want.count, want.first, want.last)
	case want.logs != got.logs:
		return contents{}, fmt.Errorf("the entries from %d to %d are not those that were written", got.first, got.last)
	case want.conf != got.conf:
		return contents{}, errors.New("term and votes are not those that were written")
	}
	out.head = want
	return out, nil
}

// syncDir makes names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// exists reports whether there is a file at path, and refuses an empty one.
func exists(path string) (bool, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case info.Size() == 0:
		return false, fmt.Errorf("%w: %s: it is empty", ErrDamaged, path)
	}
	return true, nil
}

func sibling(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
}
