// Package harness runs whole clusters of real processes for tests, loads them,
// breaks them, and waits: every wait has a deadline and says what it waited for.
package harness
