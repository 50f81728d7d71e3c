// Package rpc holds what every gRPC server and client of wasmatrix has in
// common: who calls, correlation ids, validation of requests, the shape of
// errors, metrics, the access log, keepalive and message limits.
//
// It knows no service and imports nothing of wasmatrix but proto, apierror,
// correlation and identity.
package rpc
