package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newLogs() *cobra.Command {
	var follow, timestamps bool
	var tail int32
	var since time.Duration
	cmd := &cobra.Command{
		Use: "logs NAME...", Short: "show the output of instances, merged, from whichever nodes they run on",
		Example: "  wasmatrix logs hello -f\n  wasmatrix logs hello-k3f9x --tail 20 --timestamps",
		Args:    cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			req := &pb.FollowLogsRequest{Targets: args, Follow: follow}
			if cmd.Flags().Changed("tail") {
				if req.Tail = tail; tail == 0 {
					req.Tail = -1
				}
			}
			if since > 0 {
				req.Since = durationpb.New(since)
			}
			p := &logPrinter{app: a, out: a.env.Stdout, timestamps: timestamps}
			for e, err := range c.FollowLogs(cmd.Context(), req) {
				if err == nil {
					err = p.print(e)
				}
				if err != nil {
					return quietly(err)
				}
			}
			return nil
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with new lines, until Ctrl-C")
	f.Int32Var(&tail, "tail", 0, "begin with this many of the last lines of each instance (default: all that are kept)")
	f.DurationVar(&since, "since", 0, "only lines younger than this, as in 10m")
	f.BoolVar(&timestamps, "timestamps", false, "begin each line with its time")
	return cmd
}

// logPrinter writes lines of output. As soon as there are several instances
// each line names its own.
type logPrinter struct {
	app *app
	// out takes standard output; errOut, unless nil, all other lines.
	out, errOut io.Writer
	timestamps  bool
	named       bool
	first       string
}

func (p *logPrinter) print(e *pb.LogEntry) error {
	if p.app.global.output != formTable {
		return p.app.printLine(e, e.GetInstanceId(), "")
	}
	if p.first == "" {
		p.first = e.GetInstanceId()
	}
	p.named = p.named || p.first != e.GetInstanceId()
	var b strings.Builder
	if p.timestamps {
		b.WriteString(e.GetTime().AsTime().Local().Format("15:04:05.000 "))
	}
	if p.named {
		b.WriteString(e.GetInstanceId() + " | ")
	}
	w := p.out
	if p.errOut != nil && e.GetStream() != pb.LogStream_LOG_STREAM_STDOUT {
		w = p.errOut
	}
	switch e.GetStream() {
	case pb.LogStream_LOG_STREAM_LOG:
		b.WriteString(shortName(e.GetLevel().String(), "LOG_LEVEL_") + " ")
	case pb.LogStream_LOG_STREAM_SYSTEM:
		b.WriteString("· ")
	default:
	}
	message := strings.TrimSuffix(e.GetMessage(), "\r")
	b.WriteString(indented(clean(message), "    "))
	for _, key := range slices.Sorted(maps.Keys(e.GetAttributes())) {
		fmt.Fprintf(&b, " %s=%s", cleanLine(key), cleanLine(e.GetAttributes()[key]))
	}
	_, err := fmt.Fprintln(w, b.String())
	return err
}

// followUntil prints the output of instances while finished runs, and after it
// whatever of the output is left.
func (p *logPrinter) followUntil(ctx context.Context, c *client.Client, targets []string, finished func(context.Context) error) error {
	var seen client.LogFilter
	live, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		defer close(done)
		for e, err := range c.FollowLogs(live, &pb.FollowLogsRequest{Targets: targets, Follow: true}) {
			if err == nil && seen.New(e) {
				err = p.print(e)
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	err := finished(ctx)
	cancel()
	streamErr := quietly(<-done)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	seen.Restart()
	for e, restErr := range c.FollowLogs(ctx, &pb.FollowLogsRequest{Targets: targets}) {
		if restErr == nil && seen.New(e) {
			restErr = p.print(e)
		}
		if restErr != nil {
			streamErr = restErr
			break
		}
		streamErr = nil
	}
	if err == nil && streamErr != nil && !passes(streamErr) {
		err = fmt.Errorf("read the output: %w", streamErr)
	}
	return err
}
