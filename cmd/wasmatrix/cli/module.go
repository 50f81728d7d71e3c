package cli

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (a *app) newModule() *cobra.Command {
	cmd := &cobra.Command{Use: "module", Aliases: []string{"modules"}, Short: "store and list modules"}
	cmd.AddCommand(a.newModulePush(), a.newModuleList())
	return cmd
}

func (a *app) newModulePush() *cobra.Command {
	return &cobra.Command{
		Use: "push FILE.wasm", Short: "store a module and print its digest", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			f, n, err := openModule(args[0])
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			m, err := c.UploadModule(cmd.Context(), filepath.Base(args[0]), f, n)
			if err != nil {
				return err
			}
			return a.print(result{message: m, names: []string{m.GetDigest()}, table: func(w io.Writer) { fmt.Fprintln(w, m.GetDigest()) }})
		}),
	}
}

func (a *app) newModuleList() *cobra.Command {
	var stale bool
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "list modules", Args: cobra.NoArgs,
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			resp, err := c.ListModules(cmd.Context(), &pb.ListModulesRequest{Read: &pb.ReadOptions{Stale: stale}})
			if err != nil {
				return err
			}
			var digests []string
			for _, m := range resp.GetModules() {
				digests = append(digests, m.GetDigest())
			}
			return a.print(result{message: resp, names: digests, table: func(w io.Writer) {
				if len(resp.GetModules()) == 0 {
					fmt.Fprintln(w, "no modules")
					return
				}
				t := table{head: []string{"DIGEST", "NAME", "KIND", "SIZE", "AGE", "IMPORTS"}}
				for _, m := range resp.GetModules() {
					t.row(shortDigest(m.GetDigest()), orDash(m.GetName()), strings.ToLower(shortName(m.GetKind().String(), "MODULE_KIND_")),
						size(m.GetSizeBytes()), a.age(m.GetCreatedAt()), orDash(strings.Join(capabilityImports(m), ", ")))
				}
				t.write(w)
			}})
		}),
	}
	cmd.Flags().BoolVar(&stale, "stale", false, "read what the answering peer has, without asking the leader")
	return cmd
}
