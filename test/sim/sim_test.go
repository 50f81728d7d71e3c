package sim

import (
	"flag"
	"log/slog"
	"os"
	"runtime"
	"testing"
	"time"
)

var (
	seeds   = flag.Int("seeds", 6, "how many seeds to run, over all profiles in turn")
	from    = flag.Uint64("from", 1, "the first seed")
	hours   = flag.Float64("hours", 0, "virtual hours in total, shared by the seeds; 0 means one short round for each")
	round   = flag.Duration("round", 0, "the length of a round in virtual time; 0 means that of the profile")
	profile = flag.String("profile", "", "run only this profile")
	show    = flag.Bool("show", false, "show the logs of all processes")
	bug     = flag.String("planted", "", "the bug to plant; needs the build tag planted")
	child   = flag.Bool("child", false, "tell the outcome to a parent process")
)

// shortRound is the length of a round when no hours are asked for.
const shortRound = 2 * time.Minute

// TestSim runs many seeds, each in a process of its own.
func TestSim(t *testing.T) {
	if *child {
		t.Skip("this is a child")
	}
	profiles := Profiles()
	if p, ok := ProfileOf(*profile); ok {
		profiles = []Profile{p}
	}
	length := *round
	if length == 0 && *hours == 0 {
		length = shortRound
	}
	var jobs []Job
	for i := range *seeds {
		jobs = append(jobs, Job{
			Profile: profiles[i%len(profiles)].Name, Seed: *from + uint64(i), Round: length,
			Duration: time.Duration(*hours * float64(time.Hour) / float64(*seeds)),
		})
	}
	began, counts, violations := time.Now(), &Counts{}, 0
	RunJobs(t.Context(), jobs, runtime.NumCPU(), func(o Outcome) bool {
		counts.Add(o)
		switch {
		case o.Err != nil:
			violations++
			t.Error(o.Err)
		case o.Violation != nil:
			violations++
			t.Error(o.Violation)
		}
		if testing.Verbose() {
			t.Logf("%s real, %d violations: %s", time.Since(began).Round(time.Second), violations, counts)
		}
		return true
	})
	kinds, _ := counts.Faults()
	t.Logf("%s real: %d violations in %s\nfaults: %v", time.Since(began).Round(time.Second), violations, counts, kinds)
}

// TestSeed runs one seed in this process.
func TestSeed(t *testing.T) {
	if *profile == "" {
		t.Skip("no -profile is given; TestSim runs all")
	}
	p, ok := ProfileOf(*profile)
	if !ok {
		t.Fatalf("there is no profile %q", *profile)
	}
	if *round != 0 {
		p.Round = *round
	}
	plantBug(t, *bug)
	var logs slog.Handler
	if *show {
		logs = slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})
	}
	began, counts := time.Now(), &Counts{}
	v := Run(t, Config{Seed: *from, Duration: time.Duration(*hours * float64(time.Hour)), Profile: p, Counts: counts, Log: logs})
	if *child {
		tell(v, counts)
		return
	}
	if v != nil {
		t.Error(v)
	}
	t.Logf("%s real: %s", time.Since(began).Round(time.Millisecond), counts)
}
