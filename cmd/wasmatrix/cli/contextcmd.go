package cli

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/client"
)

func (a *app) newContext() *cobra.Command {
	cmd := &cobra.Command{
		Use: "context", Short: "tell which cluster is talked to, and as whom",
		Long: `A context is a YAML file with the addresses of a cluster's peers and a user's
certificate. The one that is used is, in this order: --context, the environment
variable WASMATRIX_CONTEXT, and the file contexts/default.yaml below
$XDG_CONFIG_HOME/wasmatrix or ~/.config/wasmatrix. A bare name stands for a file
of that directory.`,
	}
	cmd.AddCommand(a.newContextShow(), a.newContextList())
	return cmd
}

func (a *app) newContextShow() *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "show the context that is used; -o name prints the directory of its certificate", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, path, err := a.loadContext()
			if err != nil {
				return err
			}
			subject, expires := "", ""
			// A context that cannot be used is shown all the same, with the reason.
			id, idErr := c.Identity()
			if idErr == nil {
				subject = id.Self().String()
				expires = id.Expires().UTC().Format(time.RFC3339)
			} else {
				subject = "unusable: " + idErr.Error()
			}
			addresses := make([]any, len(c.Addresses))
			for i, address := range c.Addresses {
				addresses[i] = address
			}
			message, err := structpb.NewStruct(map[string]any{
				"path": path, "name": c.Name, "cluster": c.Cluster, "addresses": addresses,
				"tls_dir": c.TLSDir, "subject": subject, "expires": expires,
			})
			if err != nil {
				return err
			}
			err = a.print(result{message: message, names: []string{c.TLSDir}, table: func(w io.Writer) {
				for _, line := range [][2]string{
					{"context", c.Name},
					{"file", path},
					{"cluster", c.Cluster},
					{"addresses", strings.Join(c.Addresses, " ")},
					{"certificate", orInline(c.TLSDir)},
					{"subject", subject},
					{"expires", orDash(expires)},
				} {
					fmt.Fprintf(w, "%-12s %s\n", line[0], line[1])
				}
			}})
			if err != nil {
				return err
			}
			return idErr
		},
	}
}

func orInline(dir string) string {
	if dir == "" {
		return "in the file"
	}
	return dir
}

func (a *app) newContextList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "list the contexts of this user; * marks the one that is used", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			used, err := a.contextPath()
			if err != nil {
				return err
			}
			dir, err := client.ContextDir(a.env.Getenv)
			if err != nil {
				return Usage(err)
			}
			entries, err := os.ReadDir(dir)
			if err != nil && !notExist(err) {
				return err
			}
			t := table{head: []string{"", "NAME", "CLUSTER", "ADDRESSES"}}
			var names []string
			var list []any
			for _, e := range entries {
				name, isContext := strings.CutSuffix(e.Name(), ".yaml")
				if !isContext || strings.HasPrefix(name, ".") {
					continue
				}
				path := filepath.Join(dir, e.Name())
				mark, cluster, addresses := "", "", ""
				if path == used {
					mark = "*"
				}
				if c, err := client.LoadContext(path); err != nil {
					addresses = oneLine(err.Error())
				} else {
					cluster, addresses = c.Cluster, strings.Join(c.Addresses, " ")
				}
				names = append(names, name)
				list = append(list, map[string]any{"name": name, "path": path, "cluster": cluster, "used": mark != ""})
				t.row(mark, name, cluster, addresses)
			}
			message, err := structpb.NewStruct(map[string]any{"contexts": list})
			if err != nil {
				return err
			}
			return a.print(result{message: message, names: names, table: func(w io.Writer) {
				if len(names) == 0 {
					fmt.Fprintf(w, "no contexts in %s\n", dir)
					return
				}
				t.write(w)
			}})
		},
	}
}

func (a *app) newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			message, err := structpb.NewStruct(map[string]any{"version": Version})
			if err != nil {
				return err
			}
			return a.print(result{message: message, names: []string{Version}, table: func(w io.Writer) { fmt.Fprintf(w, "wasmatrix %s\n", Version) }})
		},
	}
}
