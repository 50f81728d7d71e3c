package wasmatrix

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// KV is a key-value provider as this instance may use it. The zero value is the
// only key-value provider that the instance was granted.
type KV struct {
	// Provider is the provider's id; empty means the only one granted.
	Provider string
}

// Entry is one key of a listing.
type Entry struct {
	// Key is 1 to 1024 bytes, any bytes.
	Key string
	// Value is nil in a listing of keys only.
	Value []byte
	// Version grows with each change of the key.
	Version uint64
}

// Page is one page of a listing.
type Page struct {
	// Entries are in byte order of their keys.
	Entries []Entry
	// Cursor goes into the next List; nil at the end.
	Cursor []byte
}

// ListOptions choose what List returns.
type ListOptions struct {
	// Limit is the most entries of a page; 0 means 100, at most 1000.
	Limit uint32
	// Cursor goes on where a page ended.
	Cursor []byte
	// KeysOnly leaves the values out.
	KeysOnly bool
}

// Get returns the value of key and its version, or ErrNotFound. It needs kv:read.
func (kv KV) Get(key string) (val []byte, version uint64, err error) {
	out, err := call(kvGet, wire.AppendString(kv.request(), 2, key))
	if err != nil {
		return nil, 0, err
	}
	found := false
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			found = v.Number != 0
		case 2:
			val = v.Bytes
		case 3:
			version = v.Number
		}
	})
	if err == nil && !found {
		err = ErrNotFound
	}
	return val, version, err
}

// Set stores a value of at most 1 MiB and returns the key's new version. The key
// vanishes after ttl, in whole milliseconds; 0 means never. It needs kv:write.
func (kv KV) Set(key string, val []byte, ttl time.Duration) (version uint64, err error) {
	b := wire.AppendString(kv.request(), 2, key)
	b = wire.AppendUint(wire.AppendBytes(b, 3, val), 4, wire.Milliseconds(ttl))
	out, err := call(kvSet, b)
	if err != nil {
		return 0, err
	}
	err = wire.Fields(out, func(_ protowire.Number, v wire.Value) { version = v.Number })
	return version, err
}

// Delete removes key and reports whether it existed. It needs kv:delete.
func (kv KV) Delete(key string) (existed bool, err error) {
	out, err := call(kvDelete, wire.AppendString(kv.request(), 2, key))
	if err != nil {
		return false, err
	}
	err = wire.Fields(out, func(_ protowire.Number, v wire.Value) { existed = v.Number != 0 })
	return existed, err
}

// CompareAndSet stores a value if the key's version is still expected; 0 means
// that the key must not exist. It returns whether it was stored and the key's
// version now. It needs kv:write.
func (kv KV) CompareAndSet(key string, expected uint64, val []byte, ttl time.Duration) (swapped bool, version uint64, err error) {
	b := wire.AppendUint(wire.AppendString(kv.request(), 2, key), 3, expected)
	b = wire.AppendUint(wire.AppendBytes(b, 4, val), 5, wire.Milliseconds(ttl))
	out, err := call(kvCas, b)
	if err != nil {
		return false, 0, err
	}
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			swapped = v.Number != 0
		case 2:
			version = v.Number
		}
	})
	return swapped, version, err
}

// List returns the keys that start with prefix, page by page. It needs kv:read.
func (kv KV) List(prefix string, opt ListOptions) (Page, error) {
	b := wire.AppendUint(wire.AppendString(kv.request(), 2, prefix), 3, uint64(opt.Limit))
	b = wire.AppendBytes(b, 4, opt.Cursor)
	out, err := call(kvList, wire.AppendBool(b, 5, opt.KeysOnly))
	if err != nil {
		return Page{}, err
	}
	var page Page
	var bad error
	err = wire.Fields(out, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			e, err := decodeEntry(v.Bytes)
			if err != nil {
				bad = err
			}
			page.Entries = append(page.Entries, e)
		case 2:
			page.Cursor = v.Bytes
		}
	})
	if bad != nil {
		err = bad
	}
	return page, err
}

func (kv KV) request() []byte { return wire.AppendString(nil, 1, kv.Provider) }

func decodeEntry(b []byte) (e Entry, err error) {
	err = wire.Fields(b, func(n protowire.Number, v wire.Value) {
		switch n {
		case 1:
			e.Key = string(v.Bytes)
		case 2:
			e.Value = v.Bytes
		case 3:
			e.Version = v.Number
		}
	})
	return e, err
}
