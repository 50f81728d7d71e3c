// Package schedule decides which node runs an instance or hosts a replica of a
// provider. No node ever hosts two replicas of one provider.
//
// Place, PlaceProvider and Explain are pure: the same view gives the same
// answer. Scheduler is the leader's duty around them: it wakes when something is
// unplaced, or when a node that could take it changes, and proposes its
// decisions in batches. A decision names the generation and the node epoch it
// was made for, so one that comes too late has no effect.
//
// The package reads the registry and proposes commands; it never speaks to a
// node. It must never import agent, runtime, provider, or another duty.
package schedule
