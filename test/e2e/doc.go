// Package e2e tests the built binary: clusters of real processes, used through
// the CLI, the Go client and a generic gRPC client, and broken with signals.
package e2e
