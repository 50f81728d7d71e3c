// Package corruption shows what peers do when their disks lie, fail, hang or are
// full: files with flipped bits and cut-off ends are noticed, a leader with a
// hanging disk is replaced, and every refusal names a step that works.
package corruption
