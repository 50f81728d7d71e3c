// Package capability tests capability calls on whole clusters of the built binary:
// providers that are stopped, updated, drained and killed under load, permissions
// that are taken away, and messages that must not be lost. A guest that makes any
// call it is asked for (guest/go/internal/relay) stands for all guests.
package capability
