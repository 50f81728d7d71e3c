// Package docs tests what the documentation says against the code: that links
// lead somewhere, that the command lines shown exist with their flags, and that
// every metric is in the table. It holds tests only and runs no cluster.
package docs
