package plant

// The bugs. Each comment says what it breaks and which invariant shows it.
const (
	// AcknowledgeBeforeCommit answers a write once it is in the leader's hands: a
	// leader that is cut off acknowledges what nobody ever commits. A read that
	// misses an acknowledged write shows it (I9, linearizability).
	AcknowledgeBeforeCommit Bug = "acknowledge-before-commit"
	// LeaseRead answers a linearizable read from the leader's state because it takes
	// itself for the leader: late answers keep it in that belief while another one
	// leads. A stale read shows it (linearizability).
	LeaseRead Bug = "lease-read"
	// NoDedup forgets that a request was answered: what a client repeats is done
	// twice. Too many instances, or a version too high, show it (I9).
	NoDedup Bug = "no-dedup"
	// MapOrder walks a Go map in Apply: each peer computes another state (I10).
	MapOrder Bug = "map-order"
	// LostSnapshotField leaves a field out of a snapshot: a peer that is restored
	// from one goes its own way (I10).
	LostSnapshotField Bug = "lost-snapshot-field"
	// FencingOffByOne lets in the generation before the newest one seen (I2).
	FencingOffByOne Bug = "fencing-off-by-one"
	// ChecksumOff believes what a disk gives back: a flipped bit is applied, or is
	// found where it is too late (I10).
	ChecksumOff Bug = "checksum-off"
	// ExpireEarly has the leader end a lease before its TTL is over, while the node
	// takes it for its own (I3).
	ExpireEarly Bug = "expire-early"
	// NoGrace has a new leader end the leases that it has not seen a renewal of:
	// healthy nodes are lost for a leader change (I8, I3).
	NoGrace Bug = "no-grace"
	// RenewExpired renews a lease whose end is committed (I5).
	RenewExpired Bug = "renew-expired"
	// DeadlineFromAnswer has the agent count its lease from when the answer came, not
	// from when it asked: it works on when its lease has ended (I4).
	DeadlineFromAnswer Bug = "deadline-from-answer"
	// GenerationWithoutStop places the next generation of an instance that is to
	// leave its node before its agent has ended this one (I3).
	GenerationWithoutStop Bug = "generation-without-stop"
	// VoteNotSaved keeps the term and the vote in memory: after a crash a peer votes
	// again in a term of the past (I9).
	VoteNotSaved Bug = "vote-not-saved"
	// UnsyncedAcknowledgement counts entries that are not on disk yet: a power cut
	// takes acknowledged writes away (I9).
	UnsyncedAcknowledgement Bug = "unsynced-acknowledgement"
	// ServesAnyGeneration has the serving side let in every generation (I2).
	ServesAnyGeneration Bug = "serves-any-generation"
	// StopsWhenCutOff ends instances that are to be kept when the control plane
	// cannot be reached (I7).
	StopsWhenCutOff Bug = "stops-when-cut-off"
	// ForgottenVotes lets a peer vote that has lost its disk and, with it, what it
	// had acknowledged (I9).
	ForgottenVotes Bug = "forgotten-votes"
	// LateCalls lets a call have its effect after the time of its caller is up: a
	// message that was on its way for long acts for a node that is lost (I4).
	LateCalls Bug = "late-calls"
)

// Unordered returns all in whatever order a Go map gives: never the same twice.
func Unordered[T any](all []T) []T {
	shuffled := make(map[int]T, len(all))
	for i, v := range all {
		shuffled[i] = v
	}
	out := make([]T, 0, len(all))
	for _, v := range shuffled {
		out = append(out, v)
	}
	return out
}
