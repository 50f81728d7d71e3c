package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func fileFlag(cmd *cobra.Command, files *[]string) {
	cmd.Flags().StringArrayVarP(files, "file", "f", nil, "manifest, or - for standard input (repeatable)")
}

// manifests reads all files before anything is done with the first.
func (a *app) manifests(files []string) ([]*pb.WorkloadSpec, error) {
	if len(files) == 0 {
		return nil, usagef("name a manifest: -f FILE")
	}
	var out []*pb.WorkloadSpec
	for _, path := range files {
		spec, err := a.readManifest(path)
		if err != nil {
			return nil, err
		}
		out = append(out, spec)
	}
	return out, nil
}

func (a *app) newValidate() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use: "validate -f FILE", Short: "check manifests without a cluster", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			specs, err := a.manifests(files)
			if err != nil {
				return err
			}
			for n, spec := range specs {
				if isFile(spec.GetModule()) {
					f, _, err := openModule(spec.GetModule())
					if err != nil {
						return err
					}
					_ = f.Close()
				}
				if err := a.printLine(spec, spec.GetName(), fmt.Sprintf("%s is valid: %s, %s", files[n], spec.GetName(), plural(int(max(1, spec.GetReplicas())), "replica"))); err != nil {
					return err
				}
			}
			return nil
		},
	}
	fileFlag(cmd, &files)
	return cmd
}

func (a *app) newApply() *cobra.Command {
	var files []string
	var replace bool
	var wf waitFlags
	cmd := &cobra.Command{
		Use: "apply -f FILE", Short: "make the cluster run what manifests say",
		Long: `Starts each workload that has no instances, or only ended ones, and leaves alone
what runs as its manifest says. A workload that runs with another spec or with
another number of replicas is a conflict unless --replace is given: then all its
instances are removed and new ones started. Replicas are not added to instances
that run already.`,
		Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			specs, err := a.manifests(files)
			if err != nil {
				return err
			}
			for _, spec := range specs {
				if err := a.applyOne(cmd.Context(), c, spec, replace, wf); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	fileFlag(cmd, &files)
	cmd.Flags().BoolVar(&replace, "replace", false, "remove and start anew what runs with another spec or number of replicas")
	wf.bind(cmd)
	return cmd
}

func (a *app) applyOne(ctx context.Context, c *client.Client, spec *pb.WorkloadSpec, replace bool, wf waitFlags) error {
	s := a.steps()
	if _, err := a.storeModule(ctx, c, spec, s); err != nil {
		return err
	}
	s.end(0)
	list, err := listInstances(ctx, c, &pb.ListInstancesRequest{Name: spec.GetName()})
	if err != nil {
		return err
	}
	var alive []*pb.Instance
	differs := ""
	for _, i := range list.GetInstances() {
		if over(i) {
			continue
		}
		alive = append(alive, i)
		if !sameSpec(i.GetSpec(), spec) {
			differs = i.GetId() + " runs with another spec"
		}
	}
	want := int(max(1, spec.GetReplicas()))
	if differs == "" && len(alive) > 0 && len(alive) != want {
		differs = fmt.Sprintf("%d of its instances run already and the manifest wants %d", len(alive), want)
	}
	switch {
	case differs != "" && !replace:
		return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "%s exists and is not what the manifest says: %s", spec.GetName(), differs).
			Next("wasmatrix apply --replace, which removes its %s and starts new ones; or wasmatrix instance rm %s --force first",
				plural(len(alive), "instance"), spec.GetName())
	case differs != "":
		if _, err := c.RemoveInstance(ctx, &pb.RemoveInstanceRequest{Target: spec.GetName(), Force: true}); err != nil {
			return err
		}
		s.say("%s: %s removed", spec.GetName(), plural(len(list.GetInstances()), "instance"))
	case len(alive) == want:
		return a.print(result{message: list, names: idsOf(alive), table: func(w io.Writer) {
			fmt.Fprintf(w, "%s unchanged, %s\n", spec.GetName(), plural(want, "instance"))
		}})
	}
	return a.start(ctx, c, spec, &runFlags{waiting: wf})
}

// sameSpec reports whether an instance was started from the spec, whatever the
// number of replicas.
func sameSpec(running, wanted *pb.WorkloadSpec) bool {
	a, okA := proto.Clone(running).(*pb.WorkloadSpec)
	b, okB := proto.Clone(wanted).(*pb.WorkloadSpec)
	if !okA || !okB {
		return false
	}
	a.Replicas, b.Replicas = 0, 0
	return proto.Equal(a, b)
}

func (a *app) newDelete() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use: "delete -f FILE", Short: "remove the workloads of manifests, running or not", Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			specs, err := a.manifests(files)
			if err != nil {
				return err
			}
			for _, spec := range specs {
				// A name that no workload has could be the beginning of another one's id.
				list, err := listInstances(cmd.Context(), c, &pb.ListInstancesRequest{Name: spec.GetName()})
				if err != nil {
					return err
				}
				resp := &pb.RemoveInstanceResponse{}
				if len(list.GetInstances()) > 0 {
					if resp, err = c.RemoveInstance(cmd.Context(), &pb.RemoveInstanceRequest{Target: spec.GetName(), Force: true}); err != nil {
						return err
					}
				}
				err = a.print(result{message: resp, names: resp.GetInstanceIds(), table: func(w io.Writer) {
					for _, id := range resp.GetInstanceIds() {
						fmt.Fprintf(w, "%s removed\n", id)
					}
					if len(resp.GetInstanceIds()) == 0 {
						fmt.Fprintf(w, "%s has no instances\n", spec.GetName())
					}
				}})
				if err != nil {
					return err
				}
			}
			return nil
		}),
	}
	fileFlag(cmd, &files)
	return cmd
}
