// Package dispatch is the control plane's side of agent sessions: it takes
// registrations, keeps leases, streams to each node what is assigned to it, and
// commits what agents report. Every peer serves AgentSessionService; only the
// leader, inside Dispatcher.Run, does its work, all others answer NO_LEADER with
// the leader's address.
//
// # Leases
//
// A lease lives in the leader's memory. It is renewed by Heartbeat and ends only
// by a committed ExpireNodeCommand, proposed no earlier than TTL·(1+drift)+δ
// after the last renewal was handled. A leader gives every node that is READY in
// the registry a full lease when it begins. The agent counts TTL from when it
// sent the renewal, so its own deadline always comes first.
//
// That holds across leaders because a renewal is answered with what is left of
// TTL since this peer last proved, by a linearizable read, that it leads. The
// next leader cannot have begun before that proof began, hence no agent holds a
// lease for longer than its grace. Proofs are shared by all nodes and made only
// when a renewal finds the last one older than TTL/8, so they cost less than
// eight reads per TTL whatever the number of nodes.
//
// A leader that stood still, or whose disk did, notices it by looking after its
// leases later than it meant to; then none ends before what nodes sent meanwhile
// could be read.
//
// TTL is max(default, ceil(4·READY nodes / renewals per second)): agents renew
// four times per TTL, and the leader handles a bounded number of renewals.
//
// # Sessions
//
// A session computes from a view what its node must know, sends it whole, and
// from then on the differences between what it sent last and what holds now. It
// sleeps on the parts of the registry that it read: the node's instances, their
// assignments, what the node hosts and who may call it (by workload), and single
// records of other nodes and providers. While a message is on its way to a slow
// agent changes gather and go out as one.
//
// A node that uses a provider knows all its replicas; a node that hosts a replica
// knows who may call it, where they run and what they are subscribed to. Nothing
// stands between a commit and the stream but the wake of the session: there is no
// timer on that way.
//
// # Subscriptions
//
// A guest's subscription is committed for the agent that hosts the messaging
// provider, and comes back to all nodes concerned on their streams. An instance may
// change its subscriptions only so often, because each change is an entry of the log.
//
// The package must never import agent, runtime, provider, or another duty.
package dispatch
