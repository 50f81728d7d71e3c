// Package cli is the command line of wasmatrix: what a user does to a running
// cluster. It is a client like any other: it uses package client and the
// messages, and imports neither the control plane nor the data plane.
//
// Data goes to standard output in the form that -o asks for, progress and
// errors go to standard error. Every failure has four parts (what failed, the
// state that was found, what to try next, code and correlation id), and one
// function gives its exit code.
package cli
