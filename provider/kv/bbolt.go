package kv

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"

	bolt "go.etcd.io/bbolt"

	"github.com/wasmatrix/wasmatrix/provider"
)

// boltStore is the driver that keeps everything in one bbolt file.
type boltStore struct {
	db      *bolt.DB
	file    *os.File // of db
	path    string
	marks   marks
	commits *committer
	// broken is set when a commit failed in a way that leaves open what is on
	// the disk. Nothing that this process reads can be trusted then, so every
	// call fails until the file was opened anew.
	broken atomic.Pointer[provider.Error]
}

// txn is one write transaction.
type txn struct {
	data, expiry, fences *bolt.Bucket
	totals               *totals
	raised               map[string]provider.Mark // by this transaction
}

// The buckets of the file. The data bucket's sequence is the version counter.
func dataBucket() []byte   { return []byte("data") }
func expiryBucket() []byte { return []byte("expiry") }
func fencesBucket() []byte { return []byte("fences") }
func totalsBucket() []byte { return []byte("totals") }

// totalsKey is the only key of the totals bucket.
func totalsKey() []byte { return []byte("totals") }

// replace puts a record in the place of another, nil for none, and deletes with
// a new one of nil.
func (t txn) replace(key, before, after []byte) error {
	_, intact := decodeRecord(key, before)
	if before != nil {
		t.totals.remove(before)
	}
	var err error
	if after == nil {
		err = t.data.Delete(key)
	} else {
		t.totals.add(after)
		err = t.data.Put(key, after)
	}
	if err == nil && before != nil && !intact {
		return t.recount() // who knows what it had added
	}
	return err
}

func (t txn) recount() error {
	*t.totals = totals{}
	add := func(_, v []byte) error {
		t.totals.add(v)
		return nil
	}
	if err := t.data.ForEach(add); err != nil {
		return err
	}
	return t.fences.ForEach(add)
}

func (s *boltStore) usable() error {
	if broken := s.broken.Load(); broken != nil {
		return broken
	}
	return nil
}

func (s *boltStore) get(ctx context.Context, call provider.Call, key []byte, now int64, encode func([]byte, uint64) []byte) (answer []byte, err error) {
	bucket := call.Bucket
	if err := s.enter(ctx, &call); err != nil {
		return nil, err
	}
	err = s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			if err := s.marks.admit(&call); err != nil {
				return err
			}
			k := encodeKey(bucket, key)
			v := tx.Bucket(dataBucket()).Get(k)
			if v == nil {
				return nil
			}
			r, ok := decodeRecord(k, v)
			if !ok {
				return damagedRecord(s.path, bucket, key)
			}
			if r.alive(now) {
				answer = encode(r.value, r.version)
			}
			return nil
		})
	})
	return answer, fileError(s.path, err)
}

func (s *boltStore) list(ctx context.Context, call provider.Call, now int64, p *page) error {
	bucket := call.Bucket
	if err := s.enter(ctx, &call); err != nil {
		return err
	}
	err := s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			if err := s.marks.admit(&call); err != nil {
				return err
			}
			head := encodeKey(bucket, nil)
			cursor := tx.Bucket(dataBucket()).Cursor()
			for k, v := cursor.Seek(encodeKey(bucket, p.seek())); bytes.HasPrefix(k, head); k, v = cursor.Next() {
				r, ok := decodeRecord(k, v)
				if !ok {
					return damagedRecord(s.path, bucket, k[len(head):])
				}
				if !p.visit(k[len(head):], r.value, r.version, r.alive(now)) {
					return nil
				}
			}
			return nil
		})
	})
	return fileError(s.path, err)
}

func (s *boltStore) write(ctx context.Context, w *write) error {
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.marks.admit(&w.call); err != nil {
		return err
	}
	if err := s.commits.do(ctx, len(w.key)+len(w.value), func(tx txn) error { return s.apply(tx, w) }); err != nil {
		return err
	}
	return w.refused
}

// apply carries one write out inside a transaction. It may be run again in
// another one when the first was rolled back.
func (s *boltStore) apply(tx txn, w *write) error {
	w.done, w.version = false, 0
	var err error
	if w.refused, err = s.admit(tx, &w.call); err != nil || w.refused != nil {
		return err
	}
	k := encodeKey(w.bucket, w.key)
	var old record
	current := uint64(0)
	before := tx.data.Get(k)
	if before != nil {
		var ok bool
		// A damaged record can be overwritten or deleted, but not compared.
		if old, ok = decodeRecord(k, before); !ok && w.operation == opCas {
			return damagedRecord(s.path, w.bucket, w.key)
		}
		if !ok {
			old = record{version: 1}
		}
		if old.alive(w.now) {
			current = old.version
		}
	}
	if w.operation == opDelete {
		w.done = current != 0
		if before == nil {
			return nil
		}
	} else if !w.put(current) {
		return nil
	}
	if old.expires != 0 {
		if err := tx.expiry.Delete(encodeExpiry(old.expires, k)); err != nil {
			return err
		}
	}
	if w.operation == opDelete {
		return tx.replace(k, before, nil)
	}
	version, err := tx.data.NextSequence()
	if err != nil {
		return err
	}
	w.version = version
	if w.expires != 0 {
		if err := tx.expiry.Put(encodeExpiry(w.expires, k), nil); err != nil {
			return err
		}
	}
	return tx.replace(k, before, encodeRecord(k, &record{version: version, expires: w.expires, value: w.value}))
}

func (s *boltStore) sweep(ctx context.Context, now int64, limit int) (removed int, err error) {
	if err := s.usable(); err != nil {
		return 0, err
	}
	due := false
	err = s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			first, _ := tx.Bucket(expiryBucket()).Cursor().First()
			expires, _, ok := splitExpiry(first)
			due = ok && expires <= now
			return nil
		})
	})
	if err != nil || !due {
		return 0, fileError(s.path, err)
	}
	err = s.commits.do(ctx, 0, func(tx txn) error {
		removed = 0
		return sweepBefore(tx, now, limit, &removed)
	})
	return removed, err
}

func sweepBefore(tx txn, now int64, limit int, removed *int) error {
	var due [][]byte
	cursor := tx.expiry.Cursor()
	for k, _ := cursor.First(); k != nil && len(due) < limit; k, _ = cursor.Next() {
		if expires, _, ok := splitExpiry(k); !ok || expires > now {
			break
		}
		due = append(due, bytes.Clone(k))
	}
	for _, k := range due {
		expires, key, _ := splitExpiry(k)
		// A damaged record that was overwritten leaves its entry behind.
		before := tx.data.Get(key)
		if r, ok := decodeRecord(key, before); ok && r.expires == expires {
			if err := tx.replace(key, before, nil); err != nil {
				return err
			}
		}
		if err := tx.expiry.Delete(k); err != nil {
			return err
		}
		*removed++
	}
	return nil
}

// commit carries a batch out in one transaction. When it does not fit on the
// disk, each job gets a transaction of its own, so that a delete can go through
// beside a write that cannot.
func (s *boltStore) commit(batch []*job) {
	err := s.update(batch)
	if err != nil && len(batch) > 1 && !errors.Is(err, provider.ErrUnavailable) {
		for _, j := range batch {
			j.err = s.update([]*job{j})
		}
		return
	}
	for _, j := range batch {
		j.err = err
	}
}

func (s *boltStore) update(batch []*job) error {
	if err := s.usable(); err != nil {
		return err
	}
	committing := false
	raised := map[string]provider.Mark{}
	err := s.guard(func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			stored := tx.Bucket(totalsBucket())
			sum, ok := decodeTotals(stored.Get(totalsKey()))
			if !ok {
				return damaged(s.path, "its totals do not match their checksum")
			}
			t := txn{
				data: tx.Bucket(dataBucket()), expiry: tx.Bucket(expiryBucket()), fences: tx.Bucket(fencesBucket()),
				totals: &sum, raised: raised,
			}
			for _, j := range batch {
				if err := j.run(t); err != nil {
					return err
				}
			}
			if err := stored.Put(totalsKey(), sum.encode()); err != nil {
				return err
			}
			committing = true
			return nil
		})
	})
	if err == nil {
		s.marks.raise(raised)
		return nil
	}
	if errors.Is(err, errPanic) || committing && !full(err) {
		// A failed sync says nothing about what reached the disk, and the next
		// one may succeed without it (https://lwn.net/Articles/752063/); after a
		// panic bbolt may hold its locks.
		s.broken.CompareAndSwap(nil, provider.Errorf(provider.ErrUnavailable,
			"a write to %s failed: %s", s.path, err).With("file", s.path).With("outcome", "unknown").
			NextStep("check the disk, then restart the provider").Because(err))
		return s.usable()
	}
	return fileError(s.path, err)
}

func (s *boltStore) close() error {
	s.commits.close()
	return fileError(s.path, s.guard(s.db.Close))
}
