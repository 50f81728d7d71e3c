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
// # Fencing
//
// Of any instance at most one generation may have effects. The Directory keeps the
// newest generation it ever saw and Decide refuses older ones; that is early, but
// not the last word, for time passes before the effect. Call.Admit is: the provider
// asks it in the critical section of the effect, and keeps a Mark for each instance
// there. A call to another node carries until when it may have its effect, on that
// node's clock. Port.End and Port.Settle tell when the last call of an instance that
// has ended can have no effect any more.
//
// The package imports permission and nothing else of wasmatrix. It speaks Go;
// provider/remote speaks proto. It must never import runtime, agent, cluster or fsm.
package provider
