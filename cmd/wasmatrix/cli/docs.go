package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// topic explains an error code, or something that errors refer to.
type topic struct {
	name, means, causes, next string
}

// topics explains every error code. A test holds it complete.
func topics() []topic {
	return []topic{
		{
			"INVALID_REQUEST", "The request is malformed or breaks a documented rule; sending it again unchanged fails again.",
			"a misspelt field, a name with capitals, a value out of range; the details name each field",
			"wasmatrix validate -f FILE checks a manifest without a cluster",
		},
		{
			"INSTANCE_NOT_FOUND", "No instance has this id, name or prefix.",
			"it was removed, never accepted, or belongs to another cluster", "wasmatrix instance list; wasmatrix context show",
		},
		{
			"PROVIDER_NOT_FOUND", "No provider has this id, or there is none of the type that is needed.",
			"it was deregistered, or no node's configuration declares one", "wasmatrix provider list; wasmatrix provider register NAME --type TYPE",
		},
		{"MODULE_NOT_FOUND", "No module has this digest.", "it was never uploaded to this cluster", "wasmatrix module list; wasmatrix module push FILE.wasm"},
		{"NODE_NOT_FOUND", "No node or peer has this id.", "its agent never registered, or the peer was removed", "wasmatrix node list; wasmatrix cluster peers"},
		{
			"PERMISSION_DENIED", "The caller may not do this: an instance without the permission, a certificate without the role, or no secure connection.",
			"a permission was not granted or was revoked; the certificate is expired or of another cluster",
			"wasmatrix can NAME PERMISSION; wasmatrix grant NAME PERMISSION; wasmatrix context show",
		},
		{
			"RESOURCE_EXHAUSTED", "A limit was reached: memory, concurrency, size, number of instances; or no node has room.",
			"all slots of an instance are busy, nodes are full", "wasmatrix explain NAME; raise limits, or add replicas or nodes",
		},
		{
			"PROVIDER_UNAVAILABLE", "The provider exists and does not serve at the moment.",
			"it was stopped, its driver does not open, or its node is lost", "wasmatrix provider get NAME; wasmatrix provider start NAME",
		},
		{
			"COMMUNICATION_FAILURE", "The other side could not be reached, or the connection broke before an answer came.",
			"a process is down, a wrong address, a firewall; an invocation may have been carried out", "wasmatrix status; wasmatrix context show",
		},
		{"TIMEOUT", "The deadline passed first.", "a slow guest or disk, a wait that was too short", "raise --timeout or --wait-timeout; wasmatrix events"},
		{
			"CONFLICT", "The request does not fit the present state.",
			"a name in use, a running instance that is to be removed, a provider that is not stopped", "look at the state the details tell, then decide",
		},
		{
			"NO_LEADER", "The control plane has no leader at the moment; running instances and their capability calls go on.",
			"an election is under way, or a majority of the voting peers is gone", "wasmatrix status; start the missing peers; reads work with --stale",
		},
		{"INTERNAL_ERROR", "A defect of wasmatrix itself.", "one that we would like to know", "the server's log lines of the correlation id say more"},
		{
			"permissions", "What an instance may do with a provider. Nothing is allowed that was not granted; revoking takes effect at once.",
			"kv:read kv:write kv:delete, each with an optional key prefix (kv:read:orders/)\n" +
				"http:request, narrowed by any http:domain:HOST\n" +
				"msg:publish msg:subscribe, each with an optional subject (msg:publish:orders.*)\n" +
				"provider:ID:OPERATION for external providers",
			"wasmatrix run FILE --allow PERMISSION; wasmatrix grant NAME PERMISSION; wasmatrix can NAME PERMISSION",
		},
	}
}

// exitOfCode returns the exit code of an error code, or -1 for a topic that is none.
func exitOfCode(name string) int {
	n, ok := pb.ErrorCode_value["ERROR_CODE_"+name]
	if !ok {
		return -1
	}
	return exitCode(apierror.New(pb.ErrorCode(n), ""))
}

func (a *app) newDocs() *cobra.Command {
	return &cobra.Command{
		Use: "docs [CODE]", Short: "explain an error code, or list all", Args: cobra.MaximumNArgs(1),
		Example: "  wasmatrix docs NO_LEADER\n  wasmatrix docs permissions",
		RunE: func(_ *cobra.Command, args []string) error {
			all := topics()
			if len(args) == 0 {
				return a.listTopics(all)
			}
			name := strings.TrimPrefix(strings.ToUpper(args[0]), "ERROR_CODE_")
			i := slices.IndexFunc(all, func(t topic) bool { return strings.EqualFold(t.name, name) })
			if i < 0 {
				out := &usageError{err: fmt.Errorf("there is nothing about %q", args[0]), next: "wasmatrix docs"}
				var names []string
				for _, t := range all {
					names = append(names, t.name)
				}
				if close := nearest(name, names); close != "" {
					out.next = "wasmatrix docs " + close
				}
				return out
			}
			return a.printTopic(all[i])
		},
	}
}

func (a *app) printTopic(t topic) error {
	message, err := structpb.NewStruct(map[string]any{"name": t.name, "means": t.means, "causes": t.causes, "next": t.next, "exit": exitOfCode(t.name)})
	if err != nil {
		return err
	}
	return a.print(result{message: message, names: []string{t.name}, table: func(w io.Writer) {
		heading := t.name
		causes := "usual causes"
		if exit := exitOfCode(t.name); exit >= 0 {
			heading += fmt.Sprintf(" · exit %d", exit)
		} else {
			causes = "there are"
		}
		fmt.Fprintf(w, "%s\n%s\n\n%s:\n  %s\ntry:\n  %s\n", heading, t.means, causes,
			strings.ReplaceAll(t.causes, "\n", "\n  "), strings.ReplaceAll(t.next, "; ", "\n  "))
	}})
}

func (a *app) listTopics(all []topic) error {
	var names []string
	var list []any
	t := table{head: []string{"CODE", "EXIT", "MEANS"}}
	for _, topic := range all {
		names = append(names, topic.name)
		list = append(list, topic.name)
		exit := "-"
		if n := exitOfCode(topic.name); n >= 0 {
			exit = fmt.Sprint(n)
		}
		t.row(topic.name, exit, topic.means)
	}
	message, err := structpb.NewStruct(map[string]any{"topics": list})
	if err != nil {
		return err
	}
	return a.print(result{message: message, names: names, table: t.write})
}
