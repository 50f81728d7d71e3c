package harness

import (
	"context"
	"fmt"
	"time"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// pollEvery is the pace of waits for which there is nothing to subscribe to.
const pollEvery = 10 * time.Millisecond

// Until calls f until it returns nil or ctx ends; then it returns f's last error.
func Until(ctx context.Context, what string, f func(context.Context) error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (last: %w)", what, ctx.Err(), err)
		}
	}
}

// WaitState waits until the instance is in the given state.
func WaitState(ctx context.Context, c *client.Client, id string, want pb.InstanceState) error {
	return Until(ctx, fmt.Sprintf("%s to be %s", id, want), func(ctx context.Context) error {
		got, err := c.QueryInstance(ctx, &pb.QueryInstanceRequest{Target: id})
		if err != nil {
			return err
		}
		if st := got.Instance.Status; st.State != want {
			return fmt.Errorf("it is %s, %s %s", st.State, st.Reason, st.Message)
		}
		return nil
	})
}

// WaitApplied waits until the peer of node n has applied index.
func WaitApplied(ctx context.Context, c *dev.Cluster, n *dev.Node, index uint64) error {
	cl, err := ClientOf(c, n)
	if err != nil {
		return err
	}
	defer cl.Close()
	return Until(ctx, fmt.Sprintf("%s to apply index %d", n.Name(), index), func(ctx context.Context) error {
		status, err := cl.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return err
		}
		if status.AppliedIndex < index {
			return fmt.Errorf("it is at %d", status.AppliedIndex)
		}
		return nil
	})
}

// ClientOf returns a client that talks to one node only; close it.
func ClientOf(c *dev.Cluster, n *dev.Node) (*client.Client, error) {
	context, err := client.LoadContext(c.ContextPath)
	if err != nil {
		return nil, err
	}
	context.Addresses = []string{n.Config.APIAddress()}
	return client.FromContext(context)
}
