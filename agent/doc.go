// Package agent is one node's data plane: it runs the instances that are
// assigned to its node, hosts the capability providers that are placed there,
// and tells the control plane what it observes.
//
// The agent is a process of its own: guest code never runs in the process of a
// Raft voter. It holds a session with the leader (register, heartbeats,
// assignments in, status out) and goes on without one: what runs keeps running
// when the control plane is away, and an agent that starts without a control
// plane runs what its journal says. In standalone mode there is no session at
// all, and NodeAgentService accepts workloads itself.
//
// Each instance has one supervisor, a goroutine around the pure function step,
// which compares what is wanted with what is. Everything that decides (step,
// restart policies, the translation of a workload into a runtime.Spec) is pure
// and stands apart from everything that acts.
//
// The package joins the contracts of runtime and provider with the messages of
// proto. It never imports cluster, fsm, or an executor or provider
// implementation: those come in through Config.
package agent
