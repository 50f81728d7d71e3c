//go:build linux

package chaos

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/internal/pause"
	"github.com/wasmatrix/wasmatrix/test/harness"
	"github.com/wasmatrix/wasmatrix/test/register"
)

var (
	rounds    = flag.Int("rounds", 4, "how many histories")
	perRound  = flag.Int("faults", 5, "how many faults in each")
	baseSeed  = flag.Uint64("seed", 0, "seed of the first round; 0 takes the time")
	onlyRound = flag.Int("round", -1, "only this round of the seed, from 0")
	outDir    = flag.String("histories", "../../build/chaos", "where a failing history goes")
)

const (
	// recoverWithin bounds how long a fault that is over may keep the cluster from answering.
	recoverWithin = time.Minute
	// faultWithin bounds the injection of a fault, a whole rolling restart included.
	faultWithin = 90 * time.Second
	// progress is how many writes must be acknowledged before, and after, each fault.
	progress = 60
)

// tally sums up what the rounds did.
type tally struct {
	mu                             sync.Mutex
	histories, ops, refused, open  int
	unanswered, elections, revived int
	faults                         map[string]int
	longest                        time.Duration // the longest time from the end of a fault to progress
	codes                          map[string]int
	checking                       time.Duration
}

// TestHistories runs rounds of load and faults, each on a cluster of its own,
// and has each history checked.
func TestHistories(t *testing.T) {
	seed := *baseSeed
	if seed == 0 {
		seed = uint64(time.Now().Unix())
	}
	t.Logf("seed %d: repeat with `go test ./test/chaos -run TestHistories -seed %d -rounds %d`", seed, seed, *rounds)
	began, total := time.Now(), &tally{faults: map[string]int{}, codes: map[string]int{}}
	t.Run("round", func(t *testing.T) {
		for i := range *rounds {
			if *onlyRound >= 0 && i != *onlyRound {
				continue
			}
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				(&round{t: t, seed: seed + uint64(i), faults: deal(seed, i), total: total}).run()
			})
		}
	})
	t.Logf("%d histories in %s: %d operations, %d of them refused, %d writes of unknown outcome; %d reads without an answer, %d elections, "+
		"%d peers that ended by a disk fault and were started again, longest recovery %s, checking %s", total.histories, time.Since(began).Round(time.Second),
		total.ops, total.refused, total.open, total.unanswered, total.elections, total.revived, total.longest.Round(ms), total.checking.Round(ms))
	t.Logf("faults: %s", counts(total.faults))
	t.Logf("failed calls: %s", counts(total.codes))
}

// deal gives a round its faults: all kinds come up before one comes again.
func deal(seed uint64, i int) []fault {
	random := rand.New(rand.NewPCG(seed, 0))
	var deck []fault
	for len(deck) < (i+1)**perRound {
		kinds := allFaults()
		random.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
		deck = append(deck, kinds...)
	}
	return deck[i**perRound : (i+1)**perRound]
}

func counts(m map[string]int) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s %d", name, m[name]))
	}
	return strings.Join(out, " · ")
}

// round is one history.
type round struct {
	t      *testing.T
	seed   uint64
	faults []fault
	total  *tally

	arena   *arena
	history *history
	load    *load
	said    []string
	longest time.Duration
}

func (r *round) run() {
	random := rand.New(rand.NewPCG(r.seed, 1))
	r.arena = newArena(r.t, random)
	r.history = newHistory()
	r.load = newLoad(r.history, r.arena.clients, r.arena.readers, r.seed)
	ctx, stop := context.WithCancel(r.t.Context())
	defer stop()
	_, before, err := r.arena.leader(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	var load sync.WaitGroup
	load.Go(func() { r.load.run(ctx) })
	err = r.nemesis(ctx, random)
	stop()
	load.Wait()
	term, settled := r.settle()
	began := time.Now()
	checked := r.history.check(*outDir, fmt.Sprintf("history-%d", r.seed))
	r.report(int(term-before), time.Since(began))
	for _, err := range []error{err, settled, checked, r.load.err(), r.arena.panics()} {
		if err != nil {
			r.t.Errorf("seed %d: %v", r.seed, err)
		}
	}
}

// nemesis injects one fault after the other into a cluster that makes progress.
func (r *round) nemesis(ctx context.Context, random *rand.Rand) error {
	if err := r.progress(ctx); err != nil {
		return fmt.Errorf("before any fault: %w", err)
	}
	for _, f := range r.faults {
		from := r.history.now()
		what, err := r.suffer(ctx, f, random)
		r.history.mark(f.name+": "+what, from)
		r.said = append(r.said, fmt.Sprintf("%s (%s)", f.name, what))
		if err != nil {
			return fmt.Errorf("%s (%s): %w", f.name, what, err)
		}
		over := time.Now()
		if err := r.progress(ctx); err != nil {
			return fmt.Errorf("after %s (%s) was over: %w", f.name, what, err)
		}
		r.longest = max(r.longest, time.Since(over))
		if err := r.arena.unhurt(); err != nil {
			return fmt.Errorf("%s (%s): %w", f.name, what, err)
		}
	}
	return nil
}

// suffer injects a fault, lets it last, and ends it.
func (r *round) suffer(ctx context.Context, f fault, random *rand.Rand) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, faultWithin)
	defer cancel()
	if err := r.arena.revive(ctx); err != nil {
		return "", err
	}
	what, undo, err := f.inject(ctx, r.arena, random)
	if err == nil {
		pause.For(ctx, f.holds[0]+time.Duration(random.Int64N(int64(f.holds[1]-f.holds[0]))))
	}
	if undo != nil {
		err = errors.Join(err, undo(ctx))
	}
	return what, err
}

// progress waits for writes to be acknowledged; peers that have ended are started again.
func (r *round) progress(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, recoverWithin)
	defer cancel()
	start := r.load.acked.Load()
	return harness.Until(ctx, "acknowledged writes", func(ctx context.Context) error {
		if err := r.arena.revive(ctx); err != nil {
			return err
		}
		if n := r.load.acked.Load() - start; n < progress {
			return fmt.Errorf("%d of %d, failures %v", n, progress, r.load.failures())
		}
		return nil
	})
}

// settle brings the cluster to rest, compares the peers, and reads all keys.
func (r *round) settle() (term uint64, err error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), recoverWithin)
	defer cancel()
	if err := r.arena.net.Heal(); err != nil {
		return 0, err
	}
	if term, err = r.arena.settle(ctx); err != nil {
		return term, err
	}
	return term, r.load.readAll(ctx)
}

func (r *round) report(elections int, checking time.Duration) {
	refused, open := 0, 0
	for _, op := range r.history.ops {
		switch register.As[register.Output](op.Output).Outcome {
		case register.Exists, register.Absent:
			refused++
		case register.Unknown:
			open++
		default:
		}
	}
	failures := r.load.failures()
	r.t.Logf("seed %d: %d operations in %s, %d refused, %d of unknown outcome, failed calls: %s; %d elections; faults: %s; checked in %s", r.seed,
		len(r.history.ops), time.Duration(r.history.now()).Round(ms), refused, open, counts(failures), elections, strings.Join(r.said, ", "), checking.Round(ms))
	s := r.total
	s.mu.Lock()
	defer s.mu.Unlock()
	s.histories++
	s.ops += len(r.history.ops)
	s.refused += refused
	s.open += open
	s.unanswered += int(r.load.unsure.Load()) - open
	s.elections += elections
	s.revived += len(r.arena.ended)
	s.longest = max(s.longest, r.longest)
	s.checking += checking
	for name, n := range failures {
		s.codes[name] += n
	}
	for _, f := range r.faults {
		s.faults[f.name]++
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(m.Run())
}
