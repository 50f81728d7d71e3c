package agent

import (
	"fmt"
	"testing"
	"time"
)

var stepNow = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestStep(t *testing.T) {
	running := want{run: true, generation: 3, restartEpoch: 1}
	with := func(change func(*want)) want {
		w := running
		change(&w)
		return w
	}
	at := func(p phase) have { return have{phase: p, generation: 3, restartEpoch: 1} }
	stopped := with(func(w *want) { w.run = false })
	gone := with(func(w *want) { w.gone = true })
	shutdown := with(func(w *want) { w.shutdown = true })
	held := with(func(w *want) { w.held = true })
	newer := with(func(w *want) { w.generation = 4 })
	restarted := with(func(w *want) { w.restartEpoch = 2 })
	newerStopped := with(func(w *want) { w.generation, w.run = 4, false })
	newerHeld := with(func(w *want) { w.generation, w.held = 4, true })
	leaving := with(func(w *want) { w.run, w.leaving = false, true })
	restartedLeaving := with(func(w *want) { w.run, w.leaving, w.restartEpoch = false, true, 2 })
	hasLeft := at(phaseStopped)
	hasLeft.left = true
	soon, past := at(phaseWaiting), at(phaseWaiting)
	soon.due, past.due = stepNow.Add(time.Second), stepNow.Add(-time.Second)

	start, none, settle, forget := action{verb: verbStart}, action{}, action{verb: verbSettle}, action{verb: verbForget}
	stop := func(c cause) action { return action{verb: verbStop, cause: c} }
	for _, c := range []struct {
		name string
		want want
		have have
		do   action
	}{
		{"an assigned instance starts", running, at(phaseIdle), start},
		{"one to be stopped never starts", stopped, at(phaseIdle), settle},
		{"one tied to a lost lease does not start", held, at(phaseIdle), none},
		{"one that is gone before it started is forgotten", gone, at(phaseIdle), forget},
		{"at shutdown nothing starts", shutdown, at(phaseIdle), forget},

		{"a live one goes on", running, at(phaseLive), none},
		{"a stop ends it", stopped, at(phaseLive), stop(causeAsked)},
		{"removal ends it", gone, at(phaseLive), stop(causeRemoved)},
		{"shutdown ends it", shutdown, at(phaseLive), stop(causeShutdown)},
		{"a newer generation ends it", newer, at(phaseLive), stop(causeSuperseded)},
		{"a newer generation that is to be stopped ends it too", newerStopped, at(phaseLive), stop(causeSuperseded)},
		{"a move ends it", leaving, at(phaseLive), stop(causeLeaving)},
		{"a restart ends it", restarted, at(phaseLive), stop(causeRestart)},
		{"a lost lease ends one tied to it", held, at(phaseLive), stop(causeLease)},

		{"an ending one is waited for", running, at(phaseEnding), none},
		{"an ending one is waited for even when it is gone", gone, at(phaseEnding), none},
		{"an ending one is waited for before the newer generation", newer, at(phaseEnding), none},
		{"an ending one is waited for at shutdown", shutdown, at(phaseEnding), none},

		{"a crashed one waits for its time", running, soon, action{verb: verbWait, until: soon.due}},
		{"and starts when that has come", running, past, start},
		{"a stop while it waits settles it", stopped, soon, settle},
		{"removal while it waits forgets it", gone, soon, forget},
		{"a newer generation does not wait", newer, soon, start},
		{"a restart does not wait", restarted, soon, start},
		{"tied to a lost lease it goes on waiting", held, past, none},

		{"a stopped one stays so", stopped, at(phaseStopped), none},
		{"a stopped one that is wanted starts", running, at(phaseStopped), start},
		{"stopped by the lease it waits for that", held, at(phaseStopped), none},
		{"a stopped one that is to leave is settled anew", leaving, at(phaseStopped), settle},
		{"one that waits leaves", leaving, soon, settle},
		{"one that has not begun leaves", leaving, at(phaseIdle), settle},
		{"what has left stays away", leaving, hasLeft, none},
		{"what has left and was restarted meanwhile tells its end again", restartedLeaving, hasLeft, settle},
		{"what has left does not start again, restarted or not", restarted, hasLeft, none},
		{"even if it is wanted again", running, hasLeft, none},
		{"and if it is to start anew", restarted, hasLeft, none},
		{"its next generation starts", newer, hasLeft, start},
		{"what has left and is gone is forgotten", gone, hasLeft, forget},
		{"a newer generation of it starts", newer, at(phaseStopped), start},
		{"a newer generation to be stopped is settled anew", newerStopped, at(phaseStopped), settle},
		{"a stopped one that is gone is forgotten", gone, at(phaseStopped), forget},

		{"a completed or failed one stays so", running, at(phaseDone), none},
		{"and so when it is to be stopped", stopped, at(phaseDone), none},
		{"a restart starts it", restarted, at(phaseDone), start},
		{"a newer generation starts it", newer, at(phaseDone), start},
		{"unless that is tied to a lost lease", newerHeld, at(phaseDone), none},
		{"a newer generation to be stopped settles it", newerStopped, at(phaseDone), settle},
		{"done and gone is forgotten", gone, at(phaseDone), forget},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := step(c.want, c.have, stepNow); got != c.do {
				t.Fatalf("step(%+v, %+v) = %+v, want %+v", c.want, c.have, got, c.do)
			}
		})
	}
}

// TestStepInvariants looks at every combination of inputs.
func TestStepInvariants(t *testing.T) {
	flags := []bool{false, true}
	seen := 0
	for p := phaseIdle; p <= phaseDone; p++ {
		for bits := range 1 << 8 {
			flag := func(n int) bool { return flags[bits>>n&1] }
			w := want{gone: flag(0), shutdown: flag(1), run: flag(2), held: flag(3), generation: 2, restartEpoch: 1}
			h := have{phase: p, generation: 2, restartEpoch: 1, due: stepNow.Add(time.Minute)}
			if flag(4) {
				h.generation = 1
			}
			if flag(5) {
				h.restartEpoch = 0
			}
			w.leaving, h.left = flag(6), flag(7)
			w.run = w.run && !w.leaving
			seen++
			checkStep(t, w, h, step(w, h, stepNow))
		}
	}
	if seen != 6*256 {
		t.Fatalf("looked at %d combinations", seen)
	}
}

func checkStep(t *testing.T, w want, h have, a action) {
	t.Helper()
	guest := h.phase == phaseLive || h.phase == phaseEnding
	fresh := w.generation != h.generation || w.restartEpoch != h.restartEpoch
	allowed := w.run && !w.gone && !w.shutdown && !w.held
	bad := ""
	switch {
	case a.verb == verbStart && guest:
		bad = "a second guest is started"
	case a.verb == verbStart && !allowed:
		bad = "a guest is started that may not run"
	case a.verb == verbStart && h.left && w.generation == h.generation:
		bad = "a generation that has left is started again"
	case a.verb == verbStart && h.phase == phaseDone && !fresh:
		bad = "what has ended for good is started again"
	case a.verb == verbStop && h.phase != phaseLive:
		bad = "something is stopped that does not run"
	case (a.verb == verbStop) != (a.cause != causeNone):
		bad = "a stop without a cause"
	case h.phase == phaseLive && (!allowed || fresh) && a.verb != verbStop:
		bad = "a guest goes on that may not run"
	case a.verb == verbForget && (guest || !w.gone && !w.shutdown):
		bad = "an instance is forgotten too early"
	case (w.gone || w.shutdown) && !guest && a.verb != verbForget:
		bad = "an instance that is gone is kept"
	case a.verb == verbSettle && (w.run || guest):
		bad = "a stop is recorded that did not happen"
	case a.verb == verbWait && (h.phase != phaseWaiting || fresh || !a.until.Equal(h.due)):
		bad = "it waits for nothing"
	}
	if bad != "" {
		t.Errorf("%s: %s", bad, fmt.Sprintf("want %+v, have %+v, action %+v", w, h, a))
	}
}
