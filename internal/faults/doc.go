// Package faults lets a development cluster be broken on purpose: it cuts and
// delays what its nodes send to each other over loopback.
//
// The process that runs the cluster writes a Rules file; each node's processes
// watch it through an Injector. A node tells who is at the other end by the port
// that it dials and by the source address of what it accepts, because each node
// dials from a loopback address of its own. What passes is decided where it is
// sent, so that one direction can be cut alone; a client's connections, which come
// from no node, are never touched.
//
// It imports nothing of ours. Only the processes of `wasmatrix dev` open it.
package faults
