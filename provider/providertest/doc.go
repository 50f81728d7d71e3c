// Package providertest holds the suites that every driver of a capability must
// pass, whatever keeps its data. Only tests import it.
package providertest
