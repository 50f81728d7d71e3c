package agent

import "time"

// want is what the assignments, the lease and the process say of one instance.
type want struct {
	// gone: the instance is no longer assigned to this node.
	gone bool
	// shutdown: the agent ends.
	shutdown bool
	// run: the instance is to run on this node.
	run bool
	// leaving: the instance is to run on another node, once it has ended on this one.
	leaving bool
	// held: the instance may not run now, because its policy ties it to the
	// node's lease and the lease has ended.
	held bool
	// generation and restartEpoch name the run that is wanted.
	generation   uint64
	restartEpoch uint64
}

// phase is where an instance stands on this node.
type phase int

// The phases. Only phaseLive and phaseEnding have a guest.
const (
	// phaseIdle: nothing has happened in this run yet.
	phaseIdle phase = iota
	// phaseLive: an attempt prepares, starts or runs.
	phaseLive
	// phaseEnding: an attempt was told to stop.
	phaseEnding
	// phaseWaiting: an attempt ended and the next one begins at due.
	phaseWaiting
	// phaseStopped: stopped as asked; runs again when that is wanted.
	phaseStopped
	// phaseDone: completed or failed; only a new run starts it again.
	phaseDone
)

// have is what this node observed of one instance.
type have struct {
	phase phase
	// generation and restartEpoch name the run that phase belongs to.
	generation   uint64
	restartEpoch uint64
	// due is when the next attempt begins in phaseWaiting.
	due time.Time
	// left: it was reported that this generation has ended and will not run again.
	left bool
}

// verb is what the supervisor does next.
type verb int

// The verbs.
const (
	// verbNone: wait for news.
	verbNone verb = iota
	// verbStart: begin an attempt of the wanted run.
	verbStart
	// verbStop: end the attempt.
	verbStop
	// verbSettle: record that the wanted run is stopped without having a guest.
	verbSettle
	// verbWait: wait for news, and until action.until.
	verbWait
	// verbForget: the supervisor has nothing left to do.
	verbForget
)

// cause says why an attempt is ended.
type cause int

// The causes.
const (
	causeNone cause = iota
	// causeAsked: a stop was asked for.
	causeAsked
	// causeRemoved: the instance is no longer assigned to this node.
	causeRemoved
	// causeSuperseded: a newer generation of the placement exists.
	causeSuperseded
	// causeLeaving: the instance moves to another node.
	causeLeaving
	// causeRestart: a user asked for a new start.
	causeRestart
	// causeLease: the node's lease ended and the instance is tied to it.
	causeLease
	// causeShutdown: the agent ends.
	causeShutdown
)

// action is the outcome of step.
type action struct {
	verb  verb
	cause cause     // with verbStop
	until time.Time // with verbWait
}

// step decides what the supervisor of one instance does next. It is pure: the
// same want, have and now give the same action.
func step(w want, h have, now time.Time) action {
	switch h.phase {
	case phaseEnding:
		return action{verb: verbNone}
	case phaseLive:
		if c := endFor(w, h); c != causeNone {
			return action{verb: verbStop, cause: c}
		}
		return action{verb: verbNone}
	default:
	}
	if w.gone || w.shutdown {
		return action{verb: verbForget}
	}
	fresh := w.generation != h.generation || w.restartEpoch != h.restartEpoch
	if h.left && w.generation == h.generation && (w.run || !fresh) {
		// The next generation may run elsewhere already. But where a restart was asked
		// for meanwhile, the registry waits for an end that knows of it.
		return action{verb: verbNone}
	}
	if !w.run {
		if fresh || h.phase == phaseIdle || h.phase == phaseWaiting || h.phase == phaseStopped && w.leaving {
			return action{verb: verbSettle}
		}
		return action{verb: verbNone}
	}
	if h.phase == phaseDone && !fresh || w.held {
		return action{verb: verbNone}
	}
	if h.phase == phaseWaiting && !fresh && now.Before(h.due) {
		return action{verb: verbWait, until: h.due}
	}
	return action{verb: verbStart}
}

// endFor returns why a live attempt must end, or causeNone.
func endFor(w want, h have) cause {
	switch {
	case w.shutdown:
		return causeShutdown
	case w.gone:
		return causeRemoved
	case w.generation != h.generation:
		return causeSuperseded
	case w.leaving:
		return causeLeaving
	case !w.run:
		return causeAsked
	case w.restartEpoch != h.restartEpoch:
		return causeRestart
	case w.held:
		return causeLease
	}
	return causeNone
}
