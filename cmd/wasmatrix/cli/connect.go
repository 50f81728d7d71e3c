package cli

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
)

// contextPath returns the path of the context that this command line uses.
func (a *app) contextPath() (string, error) {
	path, err := client.ContextPath(a.global.context, a.env.Getenv)
	if err != nil {
		return "", Usage(err)
	}
	return path, nil
}

// loadContext reads the context that this command line uses, with the
// addresses of --address in place of its own.
func (a *app) loadContext() (client.Context, string, error) {
	path, err := a.contextPath()
	if err != nil {
		return client.Context{}, "", err
	}
	c, err := client.LoadContext(path)
	switch {
	case notExist(err) && a.global.context == "" && a.env.Getenv(client.ContextVariable) == "":
		return c, path, &usageError{
			err:  fmt.Errorf("no cluster is known: there is no context file %s", path),
			next: "wasmatrix dev starts a cluster on this machine; --context FILE names another one",
		}
	case err != nil:
		return c, path, &usageError{err: err, next: "wasmatrix context list shows the contexts there are"}
	}
	if len(a.global.addresses) > 0 {
		c.Addresses = a.global.addresses
	}
	return c, path, nil
}

// connect makes the client of this command line. It dials with its first call.
func (a *app) connect() (*client.Client, error) {
	c, _, err := a.loadContext()
	if err != nil {
		return nil, err
	}
	id, err := c.Identity()
	if err != nil {
		return nil, err
	}
	cfg := client.Config{Addresses: c.Addresses, Identity: id, Timeout: a.global.timeout}
	if a.global.verbose {
		cfg.Logger = slog.New(slog.NewTextHandler(a.env.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	cl, err := client.New(cfg)
	if err != nil {
		return nil, Usage(err)
	}
	return cl, nil
}

// withClient turns a function that needs a client into one that cobra runs.
func (a *app) withClient(f func(cmd *cobra.Command, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		err = f(cmd, c, args)
		// What a broken connection says while closing adds nothing to the answer.
		_ = c.Close()
		return err
	}
}
