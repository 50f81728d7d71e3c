package sim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Job is one world to run in a process of its own.
type Job struct {
	// Profile and Seed name the world.
	Profile string
	Seed    uint64
	// Duration is how long it runs at least, in virtual time; one round at least.
	Duration time.Duration
	// Round replaces the length of the profile's rounds when it is not 0.
	Round time.Duration
	// Planted is the bug to plant, in a binary that has them.
	Planted string
}

// Outcome is what came of a job.
type Outcome struct {
	Job Job `json:"-"`
	// Violation is nil when all promises were kept.
	Violation *Violation
	// Counts is what happened.
	Counts map[string]int64
	// Faults are the faults by kind.
	Faults map[string]int
	// Real is how long it took.
	Real time.Duration
	// Err says why there is no outcome: the process crashed or did not end.
	Err error `json:"-"`
}

// resultMark begins the line in which a child tells its outcome.
const resultMark = "SIM-RESULT "

// realLimit is how long one virtual minute may take before a world counts as stuck.
const realLimit = 40 * time.Second

// RunJobs runs each job in a child of this test binary, a few at a time, and
// calls done with each outcome, one at a time. A world of its own process cannot
// disturb another, and one that crashes is an outcome like every other. It stops
// taking jobs when done returns false.
func RunJobs(ctx context.Context, jobs []Job, parallel int, done func(Outcome) bool) {
	queue := make(chan Job)
	var workers sync.WaitGroup
	var mu sync.Mutex
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for range parallel {
		workers.Go(func() {
			for job := range queue {
				outcome := runChild(ctx, job)
				mu.Lock()
				if ctx.Err() == nil && !done(outcome) {
					stop()
				}
				mu.Unlock()
			}
		})
	}
	for _, job := range jobs {
		select {
		case queue <- job:
		case <-ctx.Done():
		}
	}
	close(queue)
	workers.Wait()
}

// runChild runs one job in a child process.
func runChild(ctx context.Context, job Job) Outcome {
	began := time.Now()
	limit := time.Minute + time.Duration(max(job.Duration, job.Round, 5*time.Minute).Minutes()*float64(realLimit))
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run", "^TestSeed$", "-test.timeout", (limit - time.Second).String(),
		"-profile", job.Profile, "-from", strconv.FormatUint(job.Seed, 10), "-hours", fmt.Sprint(job.Duration.Hours()),
		"-round", job.Round.String(), "-planted", job.Planted, "-child")
	// One thread makes a seed as reproducible as it can be, and two worlds fit on two processors.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GODEBUG=randautoseed=0", "GOGC=400")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	outcome := Outcome{Job: job, Real: time.Since(began)}
	lines := bufio.NewScanner(bytes.NewReader(out.Bytes()))
	lines.Buffer(nil, 1<<22)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), resultMark); ok {
			outcome.Err = json.Unmarshal([]byte(text), &outcome)
			outcome.Real = time.Since(began)
			return outcome
		}
	}
	outcome.Err = fmt.Errorf("profile %s, seed %d gave no result: %w\n%s", job.Profile, job.Seed, errors.Join(err, ctx.Err()), gist(out.String()))
	return outcome
}

// gist leaves out of a dump the goroutines that only wait for simulated time: what
// is left holds it up.
func gist(dump string) string {
	var kept []string
	for part := range strings.SplitSeq(dump, "\n\n") {
		if head, _, _ := strings.Cut(part, "\n"); !strings.Contains(head, "(durable)") {
			kept = append(kept, part)
		}
	}
	text := strings.Join(kept, "\n\n")
	return text[:min(len(text), 16_000)]
}

// tell writes an outcome for the parent.
func tell(v *Violation, c *Counts) {
	faults, _ := c.Faults()
	text, err := json.Marshal(Outcome{Violation: v, Counts: c.numbers(), Faults: faults})
	if err != nil {
		panic(err)
	}
	fmt.Println(resultMark + string(text))
}
