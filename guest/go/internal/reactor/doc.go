// Package reactor is what all handlers share: the room for their input and the
// life of their answer. Importing it makes a module a reactor in part: it
// exports wasmatrix_alloc.
package reactor
