// Package dev runs a whole cluster on this machine: real processes of the same
// binary, on loopback, under a throw-away CA. `wasmatrix dev` is a thin layer
// over it; the end-to-end tests and the demo use it too.
package dev
