//go:build planted

package sim

import (
	"runtime"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/plant"
)

// plantBug plants a bug in this process.
func plantBug(t *testing.T, bug string) {
	t.Helper()
	plant.Set(plant.Bug(bug))
}

// hunt says where a bug is looked for: a profile that stresses its part.
type hunt struct {
	bug     plant.Bug
	profile string
	// shows are the invariants that may show it first.
	shows []string
}

func hunts() []hunt {
	lost := []string{"I9", "I10", "linearizable", "converge"}
	return []hunt{
		{plant.AcknowledgeBeforeCommit, "isolation", lost},
		{plant.LeaseRead, "isolation", []string{"linearizable"}},
		{plant.NoDedup, "repeats", lost},
		{plant.MapOrder, "drains", []string{"I10"}},
		{plant.LostSnapshotField, "restarts", []string{"I10", "linearizable"}},
		{plant.FencingOffByOne, "cuts", []string{"I1", "I2"}},
		{plant.ServesAnyGeneration, "cuts", []string{"I1", "I2"}},
		{plant.ChecksumOff, "flips", []string{"I10", "I9"}},
		{plant.ExpireEarly, "cuts", []string{"I3", "I4", "I8"}},
		{plant.NoGrace, "elections", []string{"I3", "I8"}},
		{plant.RenewExpired, "pauses", []string{"I5"}},
		{plant.DeadlineFromAnswer, "renewals", []string{"I1", "I3", "I4"}},
		{plant.GenerationWithoutStop, "drains", []string{"I3"}},
		{plant.VoteNotSaved, "power", lost},
		{plant.UnsyncedAcknowledgement, "power", lost},
		{plant.ForgottenVotes, "amnesia", lost},
		{plant.StopsWhenCutOff, "cuts", []string{"I7"}},
		{plant.LateCalls, "calls", []string{"I1", "I2", "I4"}},
	}
}

const (
	// huntSeeds is how many seeds a bug may take, huntRound how long each hunts.
	huntSeeds = 4
	huntRound = time.Minute
)

// TestPlanted plants each bug, and the simulation must catch it. Without a bug
// the same seeds must pass.
func TestPlanted(t *testing.T) {
	if *child {
		t.Skip("this is a child")
	}
	var jobs []Job
	clean := map[string]bool{}
	for _, h := range hunts() {
		if !clean[h.profile] {
			clean[h.profile] = true
			jobs = append(jobs, Job{Profile: h.profile, Seed: *from, Round: huntRound})
		}
	}
	began := time.Now()
	RunJobs(t.Context(), jobs, runtime.NumCPU(), func(o Outcome) bool {
		if o.Err != nil || o.Violation != nil {
			t.Errorf("no bug is planted: %v %v", o.Violation, o.Err)
		}
		return true
	})
	t.Logf("%s real: no bug planted, %d profiles run", time.Since(began).Round(time.Millisecond), len(jobs))
	for _, h := range hunts() {
		t.Run(string(h.bug), func(t *testing.T) { h.run(t) })
	}
}

// run looks for one bug, seed by seed.
func (h hunt) run(t *testing.T) {
	var jobs []Job
	for i := range huntSeeds {
		jobs = append(jobs, Job{Profile: h.profile, Seed: *from + uint64(i), Round: huntRound, Planted: string(h.bug)})
	}
	began, found, virtual := time.Now(), false, time.Duration(0)
	RunJobs(t.Context(), jobs, runtime.NumCPU(), func(o Outcome) bool {
		virtual += time.Duration(o.Counts["virtual"])
		switch {
		case o.Err != nil:
			t.Errorf("%v", o.Err)
		case o.Violation != nil:
			found = true
			for _, want := range h.shows {
				if o.Violation.Invariant == want {
					t.Logf("caught by %s, seed %d, at %s of virtual time, %s real: %s", want, o.Job.Seed,
						o.Violation.At.Round(time.Millisecond), time.Since(began).Round(10*time.Millisecond), firstLine(o.Violation.What))
					return false
				}
			}
			t.Errorf("caught by something else, want one of %v: %v", h.shows, o.Violation)
		}
		return !found
	})
	if !found {
		t.Errorf("not caught in %d seeds of profile %s, %s of virtual time", huntSeeds, h.profile, virtual)
	}
}

func firstLine(s string) string {
	for i, c := range s {
		if c == '\n' {
			return s[:i]
		}
	}
	return s
}
