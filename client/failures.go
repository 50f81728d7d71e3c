package client

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// failures collects what the attempts of one call came to, so that giving up
// can be explained by address.
type failures struct {
	noLeader *apierror.Error
	// byAddress holds the last failure of each peer.
	byAddress map[string]error
}

func (f *failures) note(address string, err error) {
	if f.byAddress == nil {
		f.byAddress = map[string]error{}
	}
	// The deadline of the whole call says nothing of this peer.
	if _, known := f.byAddress[address]; known && apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return
	}
	f.byAddress[address] = err
	if own := apierror.From(err); own.Code() == pb.ErrorCode_ERROR_CODE_NO_LEADER {
		f.noLeader = own
	}
}

// gaveUp returns the error of a call whose context ended.
func (f *failures) gaveUp(ctx context.Context, elapsed time.Duration) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	within := max(elapsed, 10*time.Millisecond).Round(10 * time.Millisecond).String()
	if f.noLeader != nil {
		out := apierror.FromProto(f.noLeader.Proto(ctx)).With("gave up after", within)
		for address, err := range f.byAddress {
			if apierror.CodeOf(err) != pb.ErrorCode_ERROR_CODE_NO_LEADER {
				out = out.With(address, reason(err))
			}
		}
		return out
	}
	code, message := pb.ErrorCode_ERROR_CODE_TIMEOUT, "no answer within %s"
	for _, err := range f.byAddress {
		if transient(err) {
			code, message = pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "no peer could be reached within %s"
		}
	}
	out := apierror.New(code, message, within).Next("check that the peers run and that these addresses are theirs")
	for address, err := range f.byAddress {
		out = out.With(address, reason(err))
	}
	return apierror.FromProto(out.Proto(ctx))
}

// refusedByAll returns an error when every peer failed for the identity of one
// side: waiting does not help then.
func (f *failures) refusedByAll(ctx context.Context, peers []*peer) error {
	text := ""
	for _, p := range peers {
		if text = identityFailure(f.byAddress[p.address]); text == "" {
			return nil
		}
	}
	out := apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "no secure connection: %s", text).
		Next("check that the context's certificate belongs to this cluster and is not expired: wasmatrix context show")
	for _, p := range peers {
		out = out.With(p.address, identityFailure(f.byAddress[p.address]))
	}
	return apierror.FromProto(out.Proto(ctx))
}

// reason returns the part of a failure that says why, without what gRPC wraps around it.
func reason(err error) string {
	text := apierror.From(err).Error()
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_TIMEOUT {
		return "did not answer in time"
	}
	for _, noise := range []string{`connection error: desc = "`, "transport: ", "Error while dialing: "} {
		text = strings.TrimPrefix(text, noise)
	}
	return strings.TrimSuffix(text, `"`)
}
