package client

import (
	"context"
	"errors"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// repeat says when a call that failed may be made again.
type repeat int

const (
	// repeatUnsent: only when it was certainly not sent.
	repeatUnsent repeat = iota
	// repeatRefused: also when the server says it has no leader, so did nothing.
	repeatRefused
	// repeatAlways: also when nobody knows whether it was done; it is a read, or
	// carries a request id.
	repeatAlways
)

// policyOf returns when a call may be repeated. What is not known to be safe is not.
func policyOf(req any) repeat {
	switch r := req.(type) {
	case *pb.InvokeRequest:
		return repeatUnsent
	case *pb.CallProviderRequest:
		if r.GetCapability() == "kv" && (r.GetOperation() == "get" || r.GetOperation() == "list") {
			return repeatAlways
		}
		return repeatUnsent
	case *pb.RemoveRequest, *pb.PromoteRequest, *pb.TransferLeadershipRequest:
		return repeatRefused
	case *pb.JoinRequest, *pb.StatusRequest:
		return repeatAlways
	case interface{ GetRequestId() string }, interface{ GetRead() *pb.ReadOptions }:
		return repeatAlways
	default:
		return repeatUnsent
	}
}

// withRequestID returns req with a request id, its own or a new one. It does
// not change req.
func withRequestID(req any) any {
	identified, ok := req.(interface{ GetRequestId() string })
	if !ok || identified.GetRequestId() != "" {
		return req
	}
	msg, ok := req.(proto.Message)
	if !ok {
		return req
	}
	field := msg.ProtoReflect().Descriptor().Fields().ByName("request_id")
	if field == nil {
		return req
	}
	out := proto.Clone(msg)
	out.ProtoReflect().Set(field, protoreflect.ValueOfString(uuid.NewString()))
	return out
}

// transient reports whether another peer, or the same one a little later, may
// do what this one did not.
func transient(err error) bool {
	switch apierror.CodeOf(err) {
	case pb.ErrorCode_ERROR_CODE_NO_LEADER, pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE:
		return !errors.Is(err, context.Canceled)
	default:
		return false
	}
}

// mayRepeat reports whether a call that failed with err may be made again.
func (r repeat) mayRepeat(err error, sent bool) bool {
	if !transient(err) {
		return false
	}
	switch {
	case r == repeatAlways, !sent:
		return true
	case r == repeatRefused:
		return apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_NO_LEADER
	default:
		return false
	}
}

// identityFailures are the texts by which a handshake failed for good. gRPC
// hands on only the text of a handshake error; "remote error: tls" is how
// crypto/tls reports what the other side objected to.
func identityFailures() []string {
	return []string{
		"remote error: tls: ",
		identity.ErrExpired.Error(), identity.ErrUntrusted.Error(),
		identity.ErrWrongCluster.Error(), identity.ErrNotAllowed.Error(),
	}
}

// identityFailure returns what was wrong with the identity of either side, or
// "" when err is something else.
func identityFailure(err error) string {
	text := apierror.From(err).Error()
	for _, known := range identityFailures() {
		if i := strings.Index(text, known); i >= 0 {
			return strings.TrimSuffix(text[i:], `"`)
		}
	}
	return ""
}
