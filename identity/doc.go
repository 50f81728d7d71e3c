// Package identity is the one place where connections get trusted: our own
// certificate authority, the certificates it issues, the TLS configurations made
// from them, and the authenticated caller in the context of a request.
//
// All gRPC, Raft and session traffic is mutual TLS 1.3. A certificate carries
// exactly one name, the URI spiffe://<cluster>/<kind>/<name>/<role>; host names
// and addresses are never looked at, so a node keeps its identity wherever it
// runs. What a connection may be used for is decided from the Subject alone.
//
// identity imports nothing of wasmatrix but apierror.
package identity
