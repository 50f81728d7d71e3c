// Package node is the composition root: it turns a configuration into a
// control-plane peer, an agent, or both, and runs them until its context ends.
// It is a package of its own so that tests can build a node and swap a part.
//
// A node with both roles is two processes: guest code never runs in the process
// of a Raft voter, because a guest that spins can hold up the garbage collector
// and with it heartbeats. The peer supervises the agent as a child of the same
// binary; an agent whose peer died goes on, and the next peer adopts it.
package node
