package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
	"github.com/wasmatrix/wasmatrix/identity"
)

// newCACommand makes the CA and the certificates of a cluster of one's own. It
// works on files only and talks to nobody.
func newCACommand(env cli.Env) *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "make the certificates of a cluster (files only)"}
	cmd.AddCommand(newCAInitCommand(env), newCAIssueCommand(env))
	return cmd
}

func newCAInitCommand(env cli.Env) *cobra.Command {
	var cluster string
	cmd := &cobra.Command{
		Use: "init DIR", Short: "make a new CA in DIR", Args: cobra.ExactArgs(1),
		Example: "  wasmatrix cluster ca init ./ca --cluster production",
		RunE: func(_ *cobra.Command, args []string) error {
			dir := args[0]
			if _, err := identity.LoadCA(dir); err == nil {
				return cli.Usage(fmt.Errorf("%s holds a CA already; choose another directory", dir))
			} else if !errors.Is(err, os.ErrNotExist) {
				return cli.Usage(fmt.Errorf("%w; choose another directory than %s", err, dir))
			}
			ca, err := identity.NewCA(cluster)
			if err == nil {
				err = ca.Save(dir)
			}
			if err != nil {
				return cli.Usage(err)
			}
			fmt.Fprintf(env.Stdout, "CA of cluster %s written to %s; keep its key off the nodes\n", cluster, dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "wasmatrix", "the cluster's name")
	return cmd
}

func newCAIssueCommand(env cli.Env) *cobra.Command {
	var caDir, out, nodeName, role, user string
	var ttl time.Duration
	var addresses []string
	cmd := &cobra.Command{
		Use: "issue", Short: "issue the certificate of a node or a user", Args: cobra.NoArgs,
		Example: "  wasmatrix cluster ca issue --ca ./ca --node n1 --role both --out ./n1-tls\n" +
			"  wasmatrix cluster ca issue --ca ./ca --user ada --out ./ada --address 10.0.0.1:7400",
		RunE: func(*cobra.Command, []string) error {
			if (nodeName == "") == (user == "") || out == "" {
				return cli.Usage(errors.New("name either --node or --user, and --out"))
			}
			ca, err := identity.LoadCA(caDir)
			if err != nil {
				return cli.Usage(fmt.Errorf("open the CA in %s (make one with `wasmatrix cluster ca init %s`): %w", caDir, caDir, err))
			}
			subject := identity.Subject{Cluster: ca.Cluster(), Kind: identity.Node, Name: nodeName, Role: identity.Role(role)}
			if user != "" {
				subject.Kind, subject.Name, subject.Role = identity.User, user, identity.RoleAdmin
			}
			if _, err := identity.ParseSubject(subject.String()); err != nil {
				return cli.Usage(err)
			}
			bundle, err := ca.Issue(subject, ttl)
			if err == nil {
				err = bundle.Save(out)
			}
			if err != nil {
				// A name, a lifetime or a directory that cannot be.
				return cli.Usage(err)
			}
			fmt.Fprintf(env.Stdout, "%s written to %s\n", subject, out)
			if user == "" || len(addresses) == 0 {
				return nil
			}
			dir, err := filepath.Abs(out)
			if err != nil {
				return err
			}
			path := filepath.Join(dir, "context.yaml")
			fmt.Fprintf(env.Stdout, "context written; use it with: export WASMATRIX_CONTEXT=%s\n", path)
			return client.SaveContext(path, client.Context{Name: user, Cluster: ca.Cluster(), Addresses: addresses, TLSDir: dir})
		},
	}
	f := cmd.Flags()
	f.StringVar(&caDir, "ca", "ca", "directory of the CA")
	f.StringVar(&nodeName, "node", "", "the node's name")
	f.StringVar(&role, "role", "both", "the node's role: server, worker, both")
	f.StringVar(&user, "user", "", "the user's name; a user may do everything")
	f.StringVar(&out, "out", "", "directory for the certificate, its key and the CA's certificate")
	f.DurationVar(&ttl, "ttl", 365*24*time.Hour, "how long the certificate lasts")
	f.StringSliceVar(&addresses, "address", nil, "API addresses for a user's context file")
	return cmd
}
