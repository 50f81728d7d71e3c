//go:build !race

package wasm_test

// raceEnabled tells that the race detector makes everything ten times as slow.
const raceEnabled = false
