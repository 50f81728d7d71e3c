// Package external is the capability "provider": providers that people write
// themselves, in any language, and run beside wasmatrix. Such a provider is a gRPC
// server of wasmatrix.v1.ProviderService; its replicas here host nothing but the
// connection to it.
//
// Opening never fails because the server is not there: the provider runs, and its
// calls fail with ErrUnavailable, saying why, until the server answers Describe and
// its health service says SERVING. So the order in which the two are started does
// not matter, nor does a restart of the server.
//
// The effect of a call happens in the server, out of reach of Call.Admit. So each
// call is admitted before it is sent, carries a deadline no later than the end of
// its caller's tenure, and names the generation of its instance: a server that
// keeps the highest one in the transaction of the effect is safe for good.
//
// It imports proto, correlation, permission, provider and provider/remote, for its
// mapping of errors. It must never import runtime, agent, cluster or fsm.
package external
