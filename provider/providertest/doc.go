// Package providertest holds the suites that every driver of a capability must
// pass, whatever keeps its data, and finds the servers that they run. Only tests
// import it.
package providertest
