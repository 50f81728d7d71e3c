// Package channel is what an agent and the init of its virtual machine say to
// each other over one byte stream: frames, and the messages in them.
//
// A frame is a length of 4 bytes, a kind of 1 and an id of 8, all little-endian,
// and a payload. The side that opens an exchange chooses the id; host and guest
// count their own. The host believes nothing that a guest sends: every length is
// bounded before memory is taken for it, and a malformed message is an error of
// that machine only.
//
// It imports the contract in package runtime and nothing else of wasmatrix: both
// sides of the stream link it.
package channel
