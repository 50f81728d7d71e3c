package cli

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxPayload is the most that one invocation carries.
const maxPayload = 4 << 20

func (a *app) newInvoke() *cobra.Command {
	var data, contentType string
	cmd := &cobra.Command{
		Use: "invoke NAME", Short: "call a running instance and print its answer",
		Long: `Calls the invoke handler of an instance; of a workload any running replica
answers. It is called at most once: when the connection breaks meanwhile the
command fails rather than call again.`,
		Example: "  wasmatrix invoke hello -d Ada\n  wasmatrix invoke resize -d @photo.jpg > small.jpg",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			payload, err := a.dataFlag("--data", data, maxPayload)
			if err != nil {
				return err
			}
			resp, err := c.Invoke(cmd.Context(), &pb.InvokeRequest{Target: args[0], Payload: payload, ContentType: contentType})
			if err != nil {
				return err
			}
			if a.global.verbose {
				fmt.Fprintf(a.env.Stderr, "answered by %s on %s\n", resp.GetInstanceId(), resp.GetNodeId())
			}
			return a.print(result{message: resp, names: []string{resp.GetInstanceId()}, table: func(w io.Writer) { a.raw(w, resp.GetPayload()) }})
		}),
	}
	cmd.Flags().StringVarP(&data, "data", "d", "", "input: TEXT, @FILE or - for standard input")
	cmd.Flags().StringVar(&contentType, "content-type", "", "media type of the input")
	return cmd
}

// raw writes bytes as they are; a terminal gets an end of line after them.
func (a *app) raw(w io.Writer, data []byte) {
	_, _ = w.Write(data)
	if terminal(w) && len(data) > 0 && !bytes.HasSuffix(data, []byte("\n")) {
		fmt.Fprintln(w)
	}
}

func (a *app) newExplain() *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use: "explain NAME", Short: "tell where an instance could run, and why not elsewhere",
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp, err := c.Explain(cmd.Context(), &pb.ExplainRequest{Target: args[0], Read: &pb.ReadOptions{Stale: stale}})
			if err != nil {
				return whichOne("explain", err)
			}
			var eligible []string
			for _, n := range resp.GetNodes() {
				if n.GetEligible() {
					eligible = append(eligible, n.GetNodeId())
				}
			}
			return a.print(result{message: resp, names: eligible, table: func(w io.Writer) { explainTable(w, resp) }})
		}),
	}
	cmd.Flags().BoolVar(&stale, "stale", false, "read what the answering peer has, without asking the leader")
	return cmd
}

// whichOne lets an error about an ambiguous name say which ids to choose from.
func whichOne(command string, err error) error {
	e := apierror.From(err)
	ids := strings.Split(e.Detail("matches"), ", ")
	if e.Code() != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST || ids[0] == "" {
		return err
	}
	next := "wasmatrix " + command + " " + ids[0]
	if len(ids) > 1 {
		next += ", or one of " + strings.Join(ids[1:], ", ")
	}
	return e.Next("%s", next)
}

func explainTable(w io.Writer, resp *pb.ExplainResponse) {
	i := resp.GetInstance()
	fmt.Fprintf(w, "%s is %s on %s", i.GetId(), stateOf(i), orDash(i.GetPlacement().GetNodeId()))
	if m := oneLine(i.GetStatus().GetMessage()); m != "" {
		fmt.Fprintf(w, ": %s", cleanLine(m))
	}
	fmt.Fprintln(w)
	t := table{head: []string{"NODE", "VERDICT", "RUNTIME", "REASONS"}}
	for _, n := range resp.GetNodes() {
		verdict := "no"
		switch {
		case n.GetChosen():
			verdict = "best"
		case n.GetEligible():
			verdict = "possible"
		}
		t.row(n.GetNodeId(), verdict, runtimeText(n), strings.Join(n.GetReasons(), "; "))
	}
	t.write(w)
}
