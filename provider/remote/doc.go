// Package remote carries provider calls between agents: a client that calls the
// provider of another node, a server that takes such calls, and the one mapping
// in each direction between the errors of package provider and those of the API.
//
// The server believes nothing that a request says about its caller but what the
// caller's certificate says too; every permission is checked by
// provider.Router.Serve against this node's own directory.
//
// It imports proto, apierror, correlation, identity and provider. It must never
// import runtime, agent, cluster or fsm.
package remote
