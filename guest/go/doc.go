// Package wasmatrix is the Go SDK for guests of wasmatrix.
//
// A reactor registers its handlers in an init function and is built with
//
//	GOOS=wasip1 GOARCH=wasm go build -buildmode=c-shared -o hello.wasm
//
// A command is an ordinary program built without -buildmode; it may use the
// capabilities of this package too.
//
// A guest has no other way out than these calls: no files, no sockets. Every
// call is checked against the permissions that its instance was granted; a
// refused call returns an *Error with code PermissionDenied.
//
// The package speaks the protobuf messages of wasmatrix.v1 through protowire
// and needs nothing else, so that guests stay small.
package wasmatrix
