// Package permission is the grammar of what an instance may do: it parses
// permissions, decides whether one covers what a capability call needs, and
// explains the decision. Deny is the default; nothing is ever implied.
//
//	kv:read[:<prefix>]          get and list keys that start with prefix
//	kv:write[:<prefix>]         set and compare-and-set them
//	kv:delete[:<prefix>]        delete them
//	http:request                make HTTP requests to the outside
//	http:domain:<host>[:<port>] makes http:request hold only for the hosts so
//	                            named: example.com, *.example.com (every
//	                            subdomain at any depth, not example.com itself),
//	                            192.0.2.1, [2001:db8::1], 10.0.0.0/8, fd00::/8
//	msg:publish[:<subject>]     publish to subjects; NATS wildcards * and >
//	msg:subscribe[:<subject>]   subscribe to them
//	provider:<id>:<operation>   call an external provider; operation may be *
//
// Everything after the second colon of a kv permission is the prefix, byte for
// byte, colons included. A permission has one spelling only, so that
// Parse(s).String() == s and what was granted can be revoked by the same text.
//
// The package is pure: it has no clock, no network and no state, and it imports
// nothing of wasmatrix. Covers and Allows do not allocate.
package permission
