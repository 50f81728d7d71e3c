// Package wasmatrixv1 holds the messages and services of wasmatrix, generated
// from the .proto files beside it. It is the wall between the control plane and
// the data plane: both import it, neither imports the other.
package wasmatrixv1

//go:generate make -C ../../.. proto
