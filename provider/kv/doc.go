// Package kv is the key-value capability: get, set, delete, list by prefix,
// compare-and-set and expiry, with two drivers that keep the data on one node.
//
// # Drivers
//
// bbolt, the default, keeps everything in one file (kv.db in the provider's
// directory). A write is acknowledged after it was synced to disk; writes that
// arrive while a sync is under way share the next one. Each record carries a
// CRC32C. memory keeps everything in memory and forgets it when it stops.
//
//	bbolt   fsync=true|false      false acknowledges before the sync: much faster,
//	                              but a power failure can lose or damage the file
//	bbolt   verify=auto|always|never
//	                              check the whole file at start; auto does for files
//	                              of up to 256 MiB
//	both    max_bytes=N           the most data, for example 512MiB; more gives
//	                              RESOURCE_EXHAUSTED. bbolt counts the file and
//	                              defaults to no limit, memory to 256MiB
//
// # Semantics
//
// A bucket is the world of whoever is assigned to it: keys of two buckets never
// meet. Keys have 1 to 1024 bytes, values up to 1 MiB, of any content. Versions
// come from one counter of the whole store, so that a key's versions grow and
// never repeat, not even after it was deleted and made again. An expired key is
// gone for every operation at once and is removed from the store later.
//
// A page of a listing ends at its limit, at about 1 MiB, or after many expired
// keys; so it may be short, even empty, and is the last only if it has no cursor.
//
// The package never imports agent, runtime, cluster or fsm.
package kv
