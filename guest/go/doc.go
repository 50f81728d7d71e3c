// Package wasmatrix is the Go SDK for guests of wasmatrix: the capabilities that
// a guest may call. A guest has no other way out than these calls: no files, no
// sockets. Every call is checked against the permissions that its instance was
// granted; a refused call returns an *Error with code PermissionDenied.
//
// A command is an ordinary program:
//
//	GOOS=wasip1 GOARCH=wasm go build -o wordcount.wasm
//
// A reactor registers handlers in an init function, and is built with
//
//	GOOS=wasip1 GOARCH=wasm go build -buildmode=c-shared -o hello.wasm
//
// Each handler has a package of its own, [invoke], [message] and [drain],
// because what a module exports says what it can do: import only those that the
// guest handles, and none in a command.
//
// The package speaks the protobuf messages of wasmatrix.v1 through protowire
// and needs nothing else, so that guests stay small.
//
// [invoke]: https://pkg.go.dev/github.com/wasmatrix/wasmatrix/guest/go/invoke
// [message]: https://pkg.go.dev/github.com/wasmatrix/wasmatrix/guest/go/message
// [drain]: https://pkg.go.dev/github.com/wasmatrix/wasmatrix/guest/go/drain
package wasmatrix
