// Package fsm is the replicated state of wasmatrix: nodes, peers, modules,
// instances, capability providers, capability assignments, recent execution
// facts and the answers to recent requests. Every control-plane peer applies
// the same commands in the same order and so holds the same state.
//
// # What it must never do
//
// Apply is a pure function of the state and the command. The package starts no
// goroutine, reads no clock, draws no random number and opens no connection;
// ids and times travel in the command. It imports proto and go-memdb, and
// hashicorp/raft only in raft.go. It never imports cluster, agent, runtime or
// provider.
//
// # Records
//
// A record in a table is shared by every View and never changed. A transition
// makes a shallow copy, gives the copy new values and puts it back; messages
// inside a record (a spec, a status) are replaced whole. Nothing iterates a Go
// map, so nothing depends on map order.
//
// # Refusals
//
// A command that does not fit the state is answered with a value,
// CommandResult.error, and changes nothing but the memory of the answer.
// Transitions check everything first and change records afterwards. A batch
// command of the scheduler or of an agent (Place, ReportStatus) differs: its
// entries stand alone, and one that is void is skipped without a word, because
// losing a race is normal for it.
//
// # Requests that are repeated
//
// The answer to a request id, a refusal too, is remembered. The same id with the
// same digest gets that answer again, with the index of the first, and has no
// other effect; with another digest it is a CONFLICT.
//
// A request outside of client sessions has its answer kept for DedupAge of command
// time and no longer: its id, used again after that, is a new request. None is
// forgotten early; when DedupKept are kept, further ones are refused.
//
// A request of a session has its answer kept until the client says that it needs
// it no more (CommandSession.first_outstanding) or the session has been idle for
// its time. What is below that number, or of a session that is not known, is
// refused and never carried out, however late it comes: nobody can tell any more
// whether it was carried out before. Only the actor that opened a session can use
// it. The refusals that come before a request is looked at say what became of it
// (the detail outcome), and are not remembered.
//
// # Preconditions
//
// A command may say at which modified_index records must be. It is judged when the
// command is applied, after the memory of answers was asked, so that a repetition
// is not judged by what the first one has changed.
//
// # Time
//
// The state's time is the greatest command time seen. A command whose time is
// older, missing or malformed happens at the state's time.
//
// # Generations
//
// Placement.generation counts the placements of an instance. It grows whenever
// the instance may start in a place, or in an agent process, other than before;
// at one generation node and epoch are fixed, so whoever holds a lower one is
// fenced off. An unplaced instance keeps its number and the next placement is
// one higher. An instance in state LOST still names the node it was lost with,
// and Placed reports false for it: it belongs to no node's set any more.
//
// # Replicas of a provider
//
// A provider has one record a replica, all with the same id and spec, each placed,
// reported and LOST for itself and no two on one node. Commands of users are about
// all of them; the scheduler and the agents name one. A replica whose driver keeps
// state on its node (KeepsState), or that is pinned there, waits for its node; any
// other is unplaced with the loss and placed again.
//
// # What guests decide
//
// A guest decides how often it is refused and to how many subjects it subscribes.
// So an assignment holds at most MaxSubscriptions, and of refused calls at most
// DenialsPerMinute facts a minute of command time are recorded.
//
// # Hash
//
// Each command folds its index and every record it changed, in order and in
// deterministic encoding, into a running SHA-256. Two peers that applied the
// same log have the same hash at the same index; View.Hash makes that
// comparable, and State.HashAt for a while afterwards.
package fsm
