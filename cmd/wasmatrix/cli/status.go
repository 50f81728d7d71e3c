package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newStatus() *cobra.Command {
	var watch, check bool
	cmd := &cobra.Command{
		Use: "status", Short: "tell how the cluster is",
		Long: `Tells how the cluster is, as one of its peers sees it; that needs no leader. With
--check the exit code is 6 when there is no leader and 7 when something is
degraded: a peer is not seen, a node is lost, a provider or an instance failed.`,
		Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			if watch && check {
				return usagef("--watch and --check do not go together")
			}
			var last *pb.StatusResponse
			show := func(ctx context.Context) error {
				resp, err := c.Status(ctx, &pb.StatusRequest{})
				if err != nil {
					return err
				}
				last = resp
				return a.print(result{message: resp, names: []string{resp.GetPeerId()}, table: func(w io.Writer) { statusText(w, resp) }})
			}
			if watch {
				return a.watch(cmd.Context(), c, show)
			}
			if err := show(cmd.Context()); err != nil {
				return err
			}
			if check {
				return checkStatus(last)
			}
			return nil
		}),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show again whenever something happens, until Ctrl-C")
	cmd.Flags().BoolVar(&check, "check", false, "exit with 6 or 7 unless all is well")
	return cmd
}

func statusText(w io.Writer, s *pb.StatusResponse) {
	leader := "no leader"
	switch {
	case s.GetLeaderId() != "":
		leader = "leader " + s.GetLeaderId()
	case s.GetWithoutLeader() != nil:
		leader += " for " + humanDuration(s.GetWithoutLeader().AsDuration())
	}
	fmt.Fprintf(w, "cluster %s · %s · term %d · index %d · wasmatrix %s\n", s.GetCluster(), leader, s.GetTerm(), s.GetAppliedIndex(), s.GetVersion())
	fmt.Fprintf(w, "  nodes      %s\n", nodesText(s))
	fmt.Fprintf(w, "  instances  %s\n", orDash(tally(intCounts(s.GetInstances()))))
	fmt.Fprintf(w, "  providers  %s\n", orDash(tallyOf(intCounts(s.GetProviders()), providerStates())))
	if len(s.GetRuntimes()) > 0 {
		fmt.Fprintf(w, "  runtimes   %s\n", cleanLine(offersText(s.GetRuntimes())))
	}
	peerTable(w, s)
	for _, p := range problems(s) {
		fmt.Fprintf(w, "! %s\n", cleanLine(p))
	}
}

func nodesText(s *pb.StatusResponse) string {
	text := fmt.Sprintf("%d ready", s.GetNodesReady())
	if s.GetNodesLost() > 0 {
		text += fmt.Sprintf(", %d lost", s.GetNodesLost())
	}
	return text
}

func intCounts(in map[string]uint32) map[string]int {
	out := map[string]int{}
	for key, n := range in {
		out[key] = int(n)
	}
	return out
}

func providerStates() []string {
	var out []string
	values := pb.ProviderState(0).Descriptor().Values()
	for i := 1; i < values.Len(); i++ {
		out = append(out, shortName(string(values.Get(i).Name()), "PROVIDER_STATE_"))
	}
	return out
}

// sortedPeers returns the peers by id, so that two looks are easily compared.
func sortedPeers(s *pb.StatusResponse) []*pb.PeerStatus {
	return slices.SortedFunc(slices.Values(s.GetPeers()), func(a, b *pb.PeerStatus) int { return strings.Compare(a.GetId(), b.GetId()) })
}

func peerTable(w io.Writer, s *pb.StatusResponse) {
	t := table{head: []string{"PEER", "ROLE", "SEEN", "API", "RAFT", "MESSAGE"}}
	for _, p := range sortedPeers(s) {
		role := "follower"
		switch {
		case p.GetLeader():
			role = "leader"
		case !p.GetVoter():
			role = "non-voter"
		case s.GetLeaderId() == "":
			role = "voter"
		}
		seen := "no"
		switch {
		case p.GetSelf():
			seen = "answers"
		case p.GetAlive():
			seen = "yes"
		}
		t.row(p.GetId(), role, seen, orDash(p.GetApiAddress()), orDash(p.GetRaftAddress()), oneLine(p.GetMessage()))
	}
	t.write(w)
}

// problems lists what is not as it should be.
func problems(s *pb.StatusResponse) []string {
	var out []string
	voters, seen := 0, 0
	for _, p := range sortedPeers(s) {
		alive := p.GetAlive() || p.GetSelf()
		if p.GetVoter() {
			voters++
			if alive {
				seen++
			}
		}
		if !alive {
			out = append(out, strings.TrimSpace(fmt.Sprintf("peer %s is not seen %s", p.GetId(), oneLine(p.GetMessage()))))
		}
	}
	if s.GetLeaderId() == "" {
		out = append([]string{fmt.Sprintf("no leader: %d of %d voting peers seen, quorum is %d", seen, voters, voters/2+1)}, out...)
	}
	if n := s.GetNodesLost(); n > 0 {
		out = append(out, plural(int(n), "node")+" lost")
	}
	if n := s.GetProviders()["FAILED"] + s.GetProviders()["LOST"]; n > 0 {
		out = append(out, plural(int(n), "provider")+" failed or lost")
	}
	if n := s.GetInstances()["FAILED"]; n > 0 {
		out = append(out, plural(int(n), "instance")+" failed")
	}
	return out
}

func checkStatus(s *pb.StatusResponse) error {
	found := problems(s)
	switch {
	case len(found) == 0:
		return nil
	case s.GetLeaderId() == "":
		return apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "%s", strings.Join(found, "; ")).
			Next("start the peers that are not seen; reads work with --stale")
	default:
		return fail(exitDegraded, verdict("the cluster is degraded: %s", strings.Join(found, "; ")).
			Next("wasmatrix events"))
	}
}
