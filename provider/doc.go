// Package provider is the contract of a capability provider and everything
// between a guest's capability call and the provider that serves it: the
// directory of what this node knows, the one decision on whether a call may be
// made, the providers this node hosts, and the way to those on other nodes.
//
// A call goes through a Port, which belongs to one instance: Port.Call finds the
// provider, asks Decide, and hands the call to the local Host or to a Remote.
// The serving side of a remote call is Router.Serve; it asks the same Decide
// with its own Directory and trusts nothing but the authenticated caller's node.
//
// The package imports permission and nothing else of wasmatrix. It speaks Go;
// provider/remote speaks proto. It must never import runtime, agent, cluster or fsm.
package provider
