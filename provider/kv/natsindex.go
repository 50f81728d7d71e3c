package kv

import (
	"cmp"
	"context"
	"strings"
	"sync"

	"github.com/google/btree"

	"github.com/wasmatrix/wasmatrix/provider"
)

// natsIndex is what the stream holds up to some sequence number, without the
// values: what a stream cannot tell itself, which is the order of the keys, and
// what is decided upon, which are versions and marks.
type natsIndex struct {
	mu      sync.RWMutex
	applied uint64 // up to where the stream was taken up
	id      string // of that message, "" if it is not known
	buckets map[string]*btree.BTreeG[*natsEntry]
	expiry  *btree.BTreeG[*natsEntry] // alive ones that expire, the first first
	dead    map[uint64]*natsEntry     // deleted ones, by sequence
	marks   map[string]natsMark
	tails   map[string]*natsTail
	grown   chan struct{} // closed when applied grows
}

type natsMark struct {
	provider.Mark
	sequence uint64
}

// natsTail is the rest of a value.
type natsTail struct {
	sequence uint64
	used     bool // by the key's present value
}

func newNatsIndex() *natsIndex {
	return &natsIndex{
		buckets: map[string]*btree.BTreeG[*natsEntry]{},
		expiry: btree.NewG(treeDegree, func(a, b *natsEntry) bool {
			return cmp.Or(cmp.Compare(a.expires, b.expires), strings.Compare(a.bucket, b.bucket), strings.Compare(a.key, b.key)) < 0
		}),
		dead:  map[uint64]*natsEntry{},
		marks: map[string]natsMark{},
		tails: map[string]*natsTail{},
		grown: make(chan struct{}),
	}
}

// find returns what is known of a key. The caller holds the lock.
func (x *natsIndex) find(bucket, key string) *natsEntry {
	b, ok := x.buckets[bucket]
	if !ok {
		return nil
	}
	e, _ := b.Get(&natsEntry{key: key})
	return e
}

func (x *natsIndex) seen(instance string) provider.Mark {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.marks[instance].Mark
}

// position returns up to where the stream was taken up.
func (x *natsIndex) position() (sequence uint64, id string) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.applied, x.id
}

// apply takes up the message at a sequence number. One that was taken up already
// is passed over: those we wrote ourselves come twice.
func (x *natsIndex) apply(sequence uint64, id string, stored int64, c natsChange) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if sequence <= x.applied {
		return
	}
	switch {
	case c.entry != nil:
		e := *c.entry
		e.sequence, e.stored = sequence, stored
		x.put(&e)
	case c.instance != "":
		x.marks[c.instance] = natsMark{Mark: c.mark, sequence: sequence}
	case c.tail != "":
		x.tails[c.tail] = &natsTail{sequence: sequence}
	}
	x.advance(sequence, id)
}

// reach says that there is nothing up to a sequence number that was not taken up.
func (x *natsIndex) reach(sequence uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if sequence > x.applied {
		x.advance(sequence, "")
	}
}

func (x *natsIndex) advance(sequence uint64, id string) {
	x.applied, x.id = sequence, id
	close(x.grown)
	x.grown = make(chan struct{})
}

func (x *natsIndex) put(e *natsEntry) {
	b, ok := x.buckets[e.bucket]
	if !ok {
		b = btree.NewG(treeDegree, func(a, b *natsEntry) bool { return a.key < b.key })
		x.buckets[e.bucket] = b
	}
	if old, replaced := b.ReplaceOrInsert(e); replaced {
		x.unlink(old)
	}
	if e.deleted {
		x.dead[e.sequence] = e
	} else if e.expires != 0 {
		x.expiry.ReplaceOrInsert(e)
	}
	if t := x.tails[e.tail]; t != nil {
		t.used = true
	}
}

// unlink removes what refers to an entry that is no longer in its bucket.
func (x *natsIndex) unlink(old *natsEntry) {
	if old.deleted {
		delete(x.dead, old.sequence)
	} else if old.expires != 0 {
		x.expiry.Delete(old)
	}
	if t := x.tails[old.tail]; t != nil {
		t.used = false
	}
}

// forget removes an entry whose message is gone from the stream.
func (x *natsIndex) forget(e *natsEntry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	b, ok := x.buckets[e.bucket]
	if !ok {
		return
	}
	if now, found := b.Get(e); !found || now.sequence != e.sequence {
		return
	}
	b.Delete(e)
	x.unlink(e)
	if b.Len() == 0 {
		delete(x.buckets, e.bucket)
	}
}

// wait waits until the stream was taken up to a sequence number.
func (x *natsIndex) wait(ctx context.Context, sequence uint64) error {
	for {
		x.mu.RLock()
		applied, grown := x.applied, x.grown
		x.mu.RUnlock()
		if applied >= sequence {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// next returns the first keys of a bucket that are alive, or that expired, from
// seek on: up to a number of them, or to where their values have so many bytes.
func (x *natsIndex) next(bucket string, seek []byte, number, bytes int) []*natsEntry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	b, ok := x.buckets[bucket]
	if !ok {
		return nil
	}
	var found []*natsEntry
	size := 0
	b.AscendGreaterOrEqual(&natsEntry{key: string(seek)}, func(e *natsEntry) bool {
		if e.deleted {
			return true
		}
		found = append(found, e)
		if size += e.size; e.tail != "" {
			size = bytes
		}
		return len(found) < number && size < bytes
	})
	return found
}

// natsGarbage is a message that the stream need not hold any more.
type natsGarbage struct {
	sequence uint64
	entry    *natsEntry // nil for a tail or a mark
	forget   func()
}

// garbage returns up to limit messages that can go: of expired and deleted keys
// that were written before some moment, and tails that belong to no value. The
// stream's last message always stays, for others wait until they have come to it.
func (x *natsIndex) garbage(now, before int64, limit int) []natsGarbage {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var out []natsGarbage
	take := func(e *natsEntry) {
		if e.sequence < x.applied && e.stored < before {
			out = append(out, natsGarbage{sequence: e.sequence, entry: e, forget: func() { x.forget(e) }})
		}
	}
	x.expiry.Ascend(func(e *natsEntry) bool {
		if !e.alive(now) {
			take(e)
		}
		return !e.alive(now) && len(out) < limit
	})
	for _, e := range x.dead {
		if len(out) >= limit {
			return out
		}
		take(e)
	}
	for id, t := range x.tails {
		if len(out) >= limit {
			return out
		}
		if !t.used && t.sequence < x.applied {
			out = append(out, natsGarbage{sequence: t.sequence, forget: func() { x.forgetTail(id, t) }})
		}
	}
	return out
}

func (x *natsIndex) forgetTail(id string, t *natsTail) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.tails[id] == t && !t.used {
		delete(x.tails, id)
	}
}

// oldMarks returns the marks of the instances that are longest in the cluster,
// once there are more than most: all but half of that.
func (x *natsIndex) oldMarks(most int) []natsGarbage {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if len(x.marks) <= most {
		return nil
	}
	var out []natsGarbage
	for _, instance := range oldest(x.marks, len(x.marks)-most/2) {
		sequence := x.marks[instance].sequence
		if sequence < x.applied {
			out = append(out, natsGarbage{sequence: sequence, forget: func() {
				x.mu.Lock()
				defer x.mu.Unlock()
				if x.marks[instance].sequence == sequence {
					delete(x.marks, instance)
				}
			}})
		}
	}
	return out
}
