// Package outbound is the capability "http": requests of guests to the outside.
//
// # One way out
//
// A URL is brought into one spelling (parseTarget) and that spelling is all that
// anything after it sees: the permission is asked for it, it is what the resolver
// gets, and it stands in the Host header and in the TLS handshake. A name is
// resolved once for a connection; each address is checked against the address
// policy and the caller's rules, and exactly the address that was checked is
// dialled, by number. Every redirect starts again at the URL.
//
// # Connections
//
// Connections are kept for reuse by one instance (or user) only, and each reuse
// checks the connection's address against the rules that hold now. There is no
// proxy, no cookie jar and no cache. A request is written once: one that may have
// an effect is repeated only when no byte of it left this node.
//
// # Fencing
//
// Call.Admit and the fence are asked when a connection is at hand, right before
// the request is written, again at each redirect.
//
// The package never imports agent, runtime, cluster or fsm.
package outbound
