package agent

import (
	"bytes"
	"crypto/sha256"

	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxRememberedRequests bounds the answers kept by request id.
const maxRememberedRequests = 1024

// remembered is the answer to a request id.
type remembered struct {
	digest [sha256.Size]byte
	ids    []string
}

// recall returns the ids that a request id led to, and the request's digest. It
// fails with CONFLICT when the id was used for another request.
func (s *standalone) recall(requestID string, req proto.Message) ([sha256.Size]byte, []string, error) {
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		return [sha256.Size]byte{}, nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the request cannot be encoded: %s", err)
	}
	digest := sha256.Sum256(append([]byte(req.ProtoReflect().Descriptor().FullName()+"\x00"), encoded...))
	if requestID == "" {
		return digest, nil, nil
	}
	before, ok := s.answers[requestID]
	if ok && !bytes.Equal(before.digest[:], digest[:]) {
		return digest, nil, apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "request id %q was used for another request", requestID).
			With("request_id", requestID).Next("choose a new request id")
	}
	return digest, before.ids, nil
}

func (s *standalone) remember(requestID string, digest [sha256.Size]byte, ids []string) {
	if requestID == "" {
		return
	}
	s.answers[requestID] = remembered{digest: digest, ids: ids}
	s.sequence = append(s.sequence, requestID)
	if len(s.sequence) > maxRememberedRequests {
		delete(s.answers, s.sequence[0])
		s.sequence = s.sequence[1:]
	}
}
