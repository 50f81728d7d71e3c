// Package chaos has histories of registry operations on clusters of real
// processes checked for linearizability while a nemesis breaks things: processes
// are killed and paused, networks cut in namespaces of the test's own, disks made
// slow, failing and full, leaders and members changed.
//
// A history that is not linearizable, or that the checker cannot decide, fails.
// The seed of a round decides its faults and its load; it is printed.
package chaos
