// Package control is the client API of a control-plane peer: ControlPlaneService.
// It checks what a client asks for, proposes it, reads the answer from the
// replicated state, streams events and logs, and passes calls on to the agents
// of the nodes where instances and providers run.
//
// Writes and linearizable reads need the leader; the server's forwarding
// interceptor brings unary calls there, and UploadModule passes itself on.
// WatchEvents, FollowLogs, Invoke, CallProvider and FetchModule are served by
// any peer from its own state and need no leader.
//
// The package never imports agent, runtime or provider: it speaks to agents over
// NodeAgentService only.
package control
