package cli

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// onlyProvider returns the provider that was named, else the only one of the
// type that serves the permission.
func onlyProvider(ctx context.Context, c *client.Client, serves, named string) (string, error) {
	if named != "" {
		return named, nil
	}
	list, err := c.ListProviders(ctx, &pb.ListProvidersRequest{})
	if err != nil {
		return "", err
	}
	grants, err := chooseProviders(list.GetProviders(), []string{serves}, nil)
	if err != nil {
		return "", err
	}
	return grants[0].GetProvider(), nil
}

// callProvider makes a call as a user, on the path that a guest's call takes: to
// names the provider and the operation, req and resp are the operation's messages.
func callProvider(ctx context.Context, c *client.Client, to *pb.CallProviderRequest, req, resp proto.Message) (err error) {
	if to.Payload, err = proto.Marshal(req); err != nil {
		return err
	}
	answer, err := c.CallProvider(ctx, to)
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer.GetPayload(), resp)
}
