package external

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/remote"
)

// answered reports whether the server says itself what the error is.
func answered(err error) bool {
	for _, d := range status.Convert(err).Details() {
		if _, ok := d.(*pb.Error); ok {
			return true
		}
	}
	return false
}

// sentinels are what the codes of a server without details mean.
var sentinels = map[codes.Code]error{
	codes.InvalidArgument: provider.ErrInvalid, codes.OutOfRange: provider.ErrInvalid,
	codes.Unimplemented: provider.ErrInvalid, codes.NotFound: provider.ErrInvalid,
	codes.PermissionDenied: provider.ErrDenied, codes.Unauthenticated: provider.ErrDenied,
	codes.ResourceExhausted:  provider.ErrExhausted,
	codes.FailedPrecondition: provider.ErrConflict, codes.AlreadyExists: provider.ErrConflict, codes.Aborted: provider.ErrConflict,
}

// failed returns the error for a call that the server refused or the transport
// failed. sent says that it may have reached the server.
func (p *service) failed(ctx context.Context, err error, sent bool) error {
	if answered(err) {
		return remote.FromAPI(err)
	}
	st := status.Convert(err)
	var out *provider.Error
	switch st.Code() {
	case codes.DeadlineExceeded:
		out = provider.Errorf(provider.ErrTimeout, "provider %s did not answer in time", p.id)
	case codes.Canceled:
		out = provider.Errorf(provider.ErrCommunication, "the call of provider %s was cancelled", p.id)
		if ctx.Err() == nil { // by the server
			out = provider.Errorf(provider.ErrInternal, "provider %s cancelled the call", p.id)
		}
	case codes.Unavailable:
		if !sent {
			return p.unavailable("its server cannot be reached: " + st.Message())
		}
		out = provider.Errorf(provider.ErrCommunication, "the connection to provider %s broke during the call: %s", p.id, st.Message())
	case codes.ResourceExhausted:
		if strings.Contains(st.Message(), "received message larger than max") {
			return p.tooLong()
		}
		fallthrough
	default:
		kind, known := sentinels[st.Code()]
		if !known {
			kind = provider.ErrInternal
		}
		return p.located(provider.Errorf(kind, "provider %s: %s", p.id, st.Message()).Because(err))
	}
	if sent {
		out = out.With(provider.DetailOutcome, provider.OutcomeUnknown)
	}
	return p.located(out.Because(err))
}

// tooLong is for an answer that cannot be passed on; the call was carried out.
func (p *service) tooLong() error {
	return p.located(provider.Errorf(provider.ErrExhausted, "provider %s carried the call out, but its answer has more than %d bytes", p.id, MaxPayload))
}

func (p *service) located(e *provider.Error) *provider.Error {
	return e.With("provider", p.id).With("address", p.settings.address)
}
