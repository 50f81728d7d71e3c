package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev/control"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// electionPatience is how long a new leader is waited for.
	electionPatience = 15 * time.Second
	// roundPatience bounds one round of failovers.
	roundPatience = time.Minute
	// glanceEvery is the pace of looks at the peers during an election.
	glanceEvery = 2 * time.Millisecond
	// glanceTimeout bounds one look at a peer, which may be broken.
	glanceTimeout = 500 * time.Millisecond
	// steadyWrites are acknowledged before each kill.
	steadyWrites = 20
)

// election is who leads after another, and when that was seen.
type election struct {
	leader string
	term   uint64
	at     time.Time
}

// nextLeader waits for a peer that leads in a later term than before.
func (c *chaos) nextLeader(ctx context.Context, state *control.State, before *pb.StatusResponse) (election, error) {
	known, _, err := c.loadContext()
	if err != nil {
		return election{}, err
	}
	found := make(chan election, len(state.Nodes))
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, n := range state.Nodes {
		if n.Name == before.GetLeaderId() {
			continue
		}
		one := known
		one.Addresses = []string{n.APIAddress}
		cl, err := client.FromContext(one)
		if err != nil {
			return election{}, err
		}
		wg.Go(func() {
			defer func() { _ = cl.Close() }()
			if e, ok := watchForLeader(ctx, cl, before.GetTerm()); ok {
				found <- e
			}
		})
	}
	select {
	case e := <-found:
		return e, nil
	case <-ctx.Done():
		return election{}, ctx.Err()
	}
}

// watchForLeader looks at one peer until it leads in a later term.
func watchForLeader(ctx context.Context, cl *client.Client, after uint64) (election, bool) {
	tick := time.NewTicker(glanceEvery)
	defer tick.Stop()
	for {
		look, cancel := context.WithTimeout(ctx, glanceTimeout)
		status, err := cl.Status(look, &pb.StatusRequest{})
		cancel()
		if err == nil && status.GetRaftState() == "leader" && status.GetTerm() > after {
			return election{leader: status.GetPeerId(), term: status.GetTerm(), at: time.Now()}, true
		}
		select {
		case <-ctx.Done():
			return election{}, false
		case <-tick.C:
		}
	}
}

func (a *app) newChaosFailover() *cobra.Command {
	var rounds int
	var part string
	cmd := &cobra.Command{
		Use: "failover", Short: "kill the leader again and again under writes, and measure", Args: cobra.NoArgs,
		Long: `Kills the leader while a client writes one record after the other, tells how long
the election took and when the next write was acknowledged, brings the node back,
and compares what was acknowledged with what is there. Exit code 8 when a write
was lost or applied twice.`,
		Example: "  wasmatrix chaos failover --rounds 20\n  wasmatrix chaos failover --rounds 20 -o json",
		RunE: a.withChaos(func(ctx context.Context, c *chaos, _ []string) error {
			if rounds < 1 || rounds > 1000 {
				return usagef("--rounds %d: want 1 to 1000", rounds)
			}
			if err := checkPart(part); err != nil || part == control.Agent {
				return usagef("--only %q: want peer", part)
			}
			return c.failover(ctx, rounds, part)
		}),
	}
	cmd.Flags().IntVar(&rounds, "rounds", 1, "how often, 1 to 1000")
	partFlag(cmd, &part)
	return cmd
}

// failoverRound is what one round measured.
type failoverRound struct {
	killed, elected string
	term            uint64
	election        time.Duration // from the kill until the next peer leads
	firstWrite      time.Duration // from the kill until the next acknowledged write
	writes          int           // acknowledged
	lost, twice     int
}

func (c *chaos) failover(ctx context.Context, rounds int, part string) (err error) {
	w, err := newScribe(ctx, c.client)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.remove(context.WithoutCancel(ctx))) }()
	writing, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { w.run(writing) })
	defer wg.Wait()
	defer stop()
	if c.global.output == formTable {
		fmt.Fprintf(c.env.Stdout, failoverLine, "ROUND", "KILLED", "ELECTED", "TERM", "ELECTION", "FIRST WRITE", "WRITES", "LOST", "TWICE")
	}
	var all []failoverRound
	for i := range rounds {
		r, err := c.failoverRound(ctx, w, part)
		if err != nil {
			return fmt.Errorf("round %d: %w", i+1, err)
		}
		all = append(all, r)
		if c.global.output == formTable {
			fmt.Fprintf(c.env.Stdout, failoverLine, strconv.Itoa(i+1), r.killed, r.elected, strconv.FormatUint(r.term, 10), millis(r.election),
				millis(r.firstWrite), strconv.Itoa(r.writes), strconv.Itoa(r.lost), strconv.Itoa(r.twice))
		}
	}
	return c.failoverTotal(all)
}

const failoverLine = "%-6s %-8s %-8s %-6s %-10s %-12s %-7s %-5s %s\n"

func millis(d time.Duration) string { return d.Round(time.Millisecond).String() }

// failoverRound kills the leader once and sees the cluster whole again.
func (c *chaos) failoverRound(ctx context.Context, w *scribe, part string) (failoverRound, error) {
	ctx, cancel := context.WithTimeout(ctx, roundPatience)
	defer cancel()
	if err := w.progress(ctx, steadyWrites); err != nil {
		return failoverRound{}, err
	}
	leader, before, err := c.name(ctx, leaderName)
	if err != nil {
		return failoverRound{}, err
	}
	state, err := c.do(ctx, control.PathKill, control.Request{Node: leader, Part: part})
	if err != nil {
		return failoverRound{}, err
	}
	next, err := c.nextLeader(ctx, state, before)
	if err != nil {
		return failoverRound{}, fmt.Errorf("no leader after %s was killed: %w", leader, err)
	}
	first, err := w.firstAfter(ctx, state.Done)
	if err != nil {
		return failoverRound{}, err
	}
	if _, err := c.do(ctx, control.PathHeal, control.Request{}); err != nil {
		return failoverRound{}, err
	}
	if err := c.whole(ctx, state); err != nil {
		return failoverRound{}, err
	}
	out := failoverRound{
		killed: leader, elected: next.leader, term: next.term, election: next.at.Sub(state.Began), firstWrite: first.Sub(state.Began),
	}
	out.writes, out.lost, out.twice, err = w.compare(ctx)
	return out, err
}

// whole waits until every node is ready and every peer has a leader and all of the log.
func (c *chaos) whole(ctx context.Context, state *control.State) error {
	known, _, err := c.loadContext()
	if err != nil {
		return err
	}
	for _, n := range state.Nodes {
		one := known
		one.Addresses = []string{n.APIAddress}
		cl, err := client.FromContext(one)
		if err != nil {
			return err
		}
		err = c.back(ctx, cl, len(state.Nodes))
		_ = cl.Close()
		if err != nil {
			return fmt.Errorf("%s does not come back: %w", n.Name, err)
		}
	}
	return nil
}

// back waits until one peer takes part again.
func (c *chaos) back(ctx context.Context, cl *client.Client, nodes int) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		look, cancel := context.WithTimeout(ctx, glanceTimeout)
		lead, err := c.client.Status(look, &pb.StatusRequest{})
		own, errOwn := cl.Status(look, &pb.StatusRequest{})
		cancel()
		if err == nil && errOwn == nil && own.GetLeaderId() != "" && own.GetAppliedIndex() >= lead.GetCommitIndex() && int(own.GetNodesReady()) >= nodes {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err, errOwn)
		case <-tick.C:
		}
	}
}

// failoverTotal prints the sum of all rounds.
func (c *chaos) failoverTotal(all []failoverRound) error {
	var elections, writes []time.Duration
	rows := []any{}
	acked, lost, twice := 0, 0, 0
	for _, r := range all {
		elections, writes = append(elections, r.election), append(writes, r.firstWrite)
		acked, lost, twice = acked+r.writes, lost+r.lost, twice+r.twice
		rows = append(rows, map[string]any{
			"killed": r.killed, "elected": r.elected, "term": float64(r.term), "electionMs": ms(r.election), "firstWriteMs": ms(r.firstWrite),
			"writes": r.writes, "lost": r.lost, "appliedTwice": r.twice,
		})
	}
	slices.Sort(elections)
	slices.Sort(writes)
	message, err := structpb.NewStruct(map[string]any{"rounds": rows, "total": map[string]any{
		"rounds": len(all), "electionP50Ms": ms(half(elections)), "electionMaxMs": ms(last(elections)),
		"firstWriteP50Ms": ms(half(writes)), "firstWriteMaxMs": ms(last(writes)), "writes": acked, "lost": lost, "appliedTwice": twice,
	}})
	if err != nil {
		return err
	}
	err = c.print(result{message: message, table: func(w io.Writer) {
		fmt.Fprintf(w, "%s: election p50 %s, max %s · first write p50 %s, max %s · %d writes acknowledged, %d lost, %d applied twice\n",
			plural(len(all), "failover"), millis(half(elections)), millis(last(elections)), millis(half(writes)), millis(last(writes)), acked, lost, twice)
	}})
	if err == nil && lost+twice > 0 {
		return fail(exitFailed, verdict("%d acknowledged writes were lost and %d were applied twice", lost, twice))
	}
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func half(sorted []time.Duration) time.Duration { return sorted[(len(sorted)-1)/2] }

func last(sorted []time.Duration) time.Duration { return sorted[len(sorted)-1] }

// scribe writes one record again and again: the declaration of a provider that no
// node may run. The registry counts the versions of the record, so that a write
// which was lost, or applied twice, shows.
type scribe struct {
	client *client.Client
	id     string

	writing sync.Mutex // held during a write

	mu      sync.Mutex
	acks    []write       // acknowledged
	unsure  int           // failed, so nobody knows
	version uint64        // of the record, at the last comparison
	counted int           // acknowledged, at the last comparison
	doubted int           // unsure, at the last comparison
	changed chan struct{} // closed and replaced with every write
	failed  error
}

// write is one acknowledged write.
type write struct{ began, acked time.Time }

func newScribe(ctx context.Context, c *client.Client) (*scribe, error) {
	w := &scribe{client: c, id: "chaos-" + uuid.NewString()[:8], changed: make(chan struct{})}
	got, err := c.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: w.spec(0)})
	if err != nil {
		return nil, err
	}
	w.version = got.GetProvider().GetSpecVersion()
	return w, nil
}

func (w *scribe) spec(n int) *pb.ProviderSpec {
	return &pb.ProviderSpec{
		Id: w.id, Type: "kv", Driver: "memory", Config: map[string]string{"write": strconv.Itoa(n)},
		Placement: &pb.PlacementRules{Labels: map[string]string{"chaos": "nowhere"}},
	}
}

// run writes until ctx ends.
func (w *scribe) run(ctx context.Context) {
	for n := 1; ctx.Err() == nil; n++ {
		w.writing.Lock()
		began := time.Now()
		_, err := w.client.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: w.spec(n)})
		w.mu.Lock()
		if err == nil {
			w.acks = append(w.acks, write{began: began, acked: time.Now()})
		} else {
			w.unsure, w.failed = w.unsure+1, err
		}
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
		w.writing.Unlock()
	}
}

// until waits until ok, which is called under w.mu.
func (w *scribe) until(ctx context.Context, what string, ok func() bool) error {
	for {
		w.mu.Lock()
		reached, changed, failed := ok(), w.changed, w.failed
		w.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, errors.Join(ctx.Err(), failed))
		}
	}
}

// progress waits for n more acknowledged writes.
func (w *scribe) progress(ctx context.Context, n int) error {
	w.mu.Lock()
	start := len(w.acks)
	w.mu.Unlock()
	return w.until(ctx, "acknowledged writes", func() bool { return len(w.acks) >= start+n })
}

// firstAfter waits for the first acknowledged write that began after t: one that
// began before may have been acknowledged by who was killed.
func (w *scribe) firstAfter(ctx context.Context, t time.Time) (at time.Time, err error) {
	err = w.until(ctx, "a write after the kill", func() bool {
		i := slices.IndexFunc(w.acks, func(one write) bool { return one.began.After(t) })
		if i >= 0 {
			at = w.acks[i].acked
		}
		return i >= 0
	})
	return at, err
}

// compare compares the writes since the last comparison with the record.
func (w *scribe) compare(ctx context.Context) (acked, lost, twice int, err error) {
	w.writing.Lock()
	defer w.writing.Unlock()
	got, err := w.client.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: w.id})
	if err != nil {
		return 0, 0, 0, fmt.Errorf("read the writes back: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	applied := int(got.GetProvider().GetSpecVersion() - w.version)
	acked, unsure := len(w.acks)-w.counted, w.unsure-w.doubted
	w.version, w.counted, w.doubted = got.GetProvider().GetSpecVersion(), len(w.acks), w.unsure
	return acked, max(0, acked-applied), max(0, applied-acked-unsure), nil
}

// remove removes the record.
func (w *scribe) remove(ctx context.Context) error {
	_, err := w.client.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: w.id})
	return err
}
