// Package raftfile keeps the log of one peer, its term and its votes in one
// bbolt file, in such a way that damage to the file is noticed.
//
// bbolt has a checksum for its two meta pages and for nothing else, and when the
// newer of the two does not fit it silently takes the older one: the last
// transaction, an entry that was acknowledged or a vote that was given, is then
// gone without a word. Its page walk panics, loops or faults on damaged pages,
// in part on goroutines of its own where nobody can recover. Therefore:
//
//   - Each value carries a CRC32C.
//   - Each transaction writes a head: its own number, the bounds of the log, and
//     sums over all entries and over all other keys. The number must be that of
//     the meta page, so a page of an earlier transaction, however sound, does not pass.
//   - Open reads the whole file first, with reads of its own and every offset
//     checked against its bounds (check.go), before bbolt maps it. It also wants
//     both meta pages sound and one transaction apart: a meta page lies within one
//     sector, so a crash cannot tear it and only damage explains a bad one.
//   - A file is made under another name and renamed, so an empty one is damage too.
//   - After a sync that failed nothing is written any more, and Open drops the
//     page cache before it reads: what the kernel calls clean then may not be on the disk.
//
// What a file cannot notice by itself is that the very last sector written is
// gone as a whole, from a disk that said that it has it.
//
// The package imports nothing of ours. It must never know of Raft configurations,
// the registry, or where its file lies within a data directory.
package raftfile
