// Package kv is the key-value capability: get, set, delete, list by prefix,
// compare-and-set and expiry. Two drivers keep the data on one node, memory and
// bbolt; two on a server, redis and nats, where several providers can share it.
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
// redis keeps everything on a Redis server or cluster; each call is one script
// there. nats keeps everything in a JetStream stream, which all its writers append
// to only where they know all of it. Both take url, username, password_file,
// tls_ca_file, tls_cert_file, tls_key_file, tls_server_name, namespace, timeout and
// dial_timeout; redis also cluster and pool_size, nats also creds_file, replicas
// and storage.
//
// # Semantics
//
// A bucket is the world of whoever is assigned to it: keys of two buckets never
// meet. Keys have 1 to 1024 bytes, values up to 1 MiB, of any content. Versions
// come from one counter of at least the bucket, so that a key's versions grow and
// never repeat, not even after it was deleted and made again. An expired key is
// gone for every operation at once and is removed from the store later.
//
// A page of a listing ends at its limit, at about 1 MiB, or after many expired
// keys; so it may be short, even empty, and is the last only if it has no cursor.
//
// # Fencing
//
// The check of the caller's mark and the effect are one step: under the lock, in
// the transaction, in the script, or in the condition of the append. What differs:
//
//   - memory forgets the marks with the data.
//   - redis has the marks of each bucket beside it on a cluster, and there an older
//     generation could write to another bucket than the newer one did, if its
//     bucket was changed in between. A server that loses acknowledged writes loses
//     marks too.
//   - nats checks a read against the marks that this provider has heard of, which
//     with several replicas may be some milliseconds ago. A write is checked
//     against all.
//   - A call is admitted here and has its effect at the server, so a write in doubt
//     may happen after its deadline, though never after one of a newer generation.
//
// The package never imports agent, runtime, cluster or fsm.
package kv
