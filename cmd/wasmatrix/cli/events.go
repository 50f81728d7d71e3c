package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

type eventFlags struct {
	follow  bool
	subject string
	kinds   []string
	after   uint64
}

func (f *eventFlags) bind(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.follow, "follow", "f", false, "go on with what happens from now on, until Ctrl-C")
	cmd.Flags().StringSliceVar(&f.kinds, "kind", nil, "only events of this kind, as in INSTANCE_CRASHED (repeatable)")
	cmd.Flags().Uint64Var(&f.after, "after", 0, "only events after this sequence number")
}

func (a *app) newEvents() *cobra.Command {
	var ef eventFlags
	cmd := &cobra.Command{
		Use: "events", Short: "tell what happened, in order",
		Example: "  wasmatrix events -f\n  wasmatrix events --for instance/hello --kind INSTANCE_CRASHED",
		Args:    cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			return a.showEvents(cmd.Context(), c, ef)
		}),
	}
	ef.bind(cmd)
	cmd.Flags().StringVar(&ef.subject, "for", "", "only events of this one: KIND/NAME, or an instance's id, a workload, a node or a provider")
	return cmd
}

func (a *app) newInstanceEvents() *cobra.Command {
	var ef eventFlags
	cmd := &cobra.Command{
		Use: "events NAME", Short: "tell what happened to an instance or a workload",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			ef.subject = args[0]
			return a.showEvents(cmd.Context(), c, ef)
		}),
	}
	ef.bind(cmd)
	return cmd
}

func (a *app) showEvents(ctx context.Context, c *client.Client, ef eventFlags) error {
	req := &pb.WatchEventsRequest{Follow: ef.follow, AfterSequence: ef.after, Subject: ef.subject}
	if kind, name, ok := strings.Cut(ef.subject, "/"); ok {
		switch kind {
		case "instance", "workload", "node", "provider":
			req.Subject = name
		default:
			return usagef("--for %s: unknown kind %q: want instance, workload, node or provider", ef.subject, kind)
		}
	}
	for _, name := range ef.kinds {
		n, ok := pb.EventKind_value["EVENT_KIND_"+strings.ToUpper(name)]
		if !ok || n == 0 {
			return unknownKind(name)
		}
		req.Kinds = append(req.Kinds, pb.EventKind(n))
	}
	for e, err := range c.WatchEvents(ctx, req) {
		if ef.follow && errors.Is(err, context.Canceled) {
			return nil // Ctrl-C is how one stops following
		}
		if err != nil {
			return err
		}
		if e.GetGap() {
			fmt.Fprintln(a.env.Stderr, "older events are no longer kept")
		}
		if e.GetEvent() == nil {
			continue
		}
		if err := a.printLine(e.GetEvent(), fmt.Sprint(e.GetEvent().GetSequence()), eventLine(e.GetEvent())); err != nil {
			return err
		}
	}
	return nil
}

func unknownKind(name string) error {
	var all []string
	values := pb.EventKind(0).Descriptor().Values()
	for i := 1; i < values.Len(); i++ {
		all = append(all, shortName(string(values.Get(i).Name()), "EVENT_KIND_"))
	}
	out := &usageError{err: fmt.Errorf("unknown kind of event %q", name), next: "one of " + strings.Join(all, ", ")}
	if close := nearest(name, all); close != "" {
		out.next = "--kind " + close
	}
	return out
}

// eventLine is an event for people.
func eventLine(e *pb.Event) string {
	at := e.GetTime().AsTime().Local().Format("2006-01-02 15:04:05.000")
	var about []string
	for _, part := range []string{e.GetInstanceId(), e.GetProviderId(), shortDigest(e.GetModuleDigest()), e.GetNodeId()} {
		if part != "" {
			about = append(about, part)
		}
	}
	line := fmt.Sprintf("%s  %-22s %s", at, shortName(e.GetKind().String(), "EVENT_KIND_"), strings.Join(about, " "))
	if m := oneLine(e.GetMessage()); m != "" {
		line += "  " + m
	}
	return strings.TrimRight(line, " ")
}

// settleFor is how long a shown state may lag behind a burst of events.
const settleFor = 50 * time.Millisecond

// watch shows something now and again whenever something happened, until Ctrl-C.
func (a *app) watch(ctx context.Context, c *client.Client, show func(context.Context) error) error {
	status, err := c.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var events sync.WaitGroup
	defer events.Wait()
	defer cancel()
	failed := make(chan error, 1)
	wake := make(chan struct{}, 1)
	events.Go(func() {
		// What is recorded already is in what is shown first.
		for e, err := range c.WatchEvents(ctx, &pb.WatchEventsRequest{Follow: true}) {
			if err != nil {
				failed <- err
				return
			}
			if e.GetEvent().GetIndex() <= status.GetAppliedIndex() {
				continue
			}
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	})
	for {
		if terminal(a.env.Stdout) {
			fmt.Fprint(a.env.Stdout, "\x1b[H\x1b[2J")
		}
		if err := show(ctx); err != nil && (!passes(err) || ctx.Err() != nil) {
			return quietly(err)
		} else if err != nil {
			fmt.Fprintf(a.env.Stderr, "%s; trying again\n", cleanLine(err.Error()))
		}
		select {
		case <-wake:
		case err := <-failed:
			return quietly(err)
		}
		select {
		case <-time.After(settleFor):
		case <-ctx.Done():
		}
		if !terminal(a.env.Stdout) && a.global.output == formTable {
			fmt.Fprintln(a.env.Stdout)
		}
	}
}

// quietly makes Ctrl-C the ordinary end of a command that never ends by itself.
func quietly(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
