// Package client is the Go client of wasmatrix, for programs and for the CLI. It
// finds a peer that answers, rides through a change of leader, repeats only what
// is safe to repeat, and carries correlation ids.
//
// A Client has the methods of ControlPlaneService and ClusterService with their
// own messages. The streaming ones are wrapped: module uploads take a reader,
// events and logs are iterators that go on after a broken connection.
//
// Every error of a call is an *apierror.Error, except for a context that the
// caller cancelled. The package knows only the API: it imports nothing of wasmatrix but
// proto, apierror, correlation, identity and rpc.
package client
