// Package plant holds known bugs that the simulation must find. A test harness
// is worth believing only when it catches what it claims to catch, so each bug
// stands where a developer might really have made it:
//
//	if !plant.On(plant.AcknowledgeBeforeCommit) { wait for the commit }
//
// In a normal build On is a constant false and the compiler removes the branch.
// With the build tag planted, a test turns on one bug at a time for the whole
// process. The package imports nothing of ours, so that every package may hold one.
package plant

// Bug names one planted bug.
type Bug string
