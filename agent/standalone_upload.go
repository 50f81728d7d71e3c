package agent

import (
	"errors"
	"fmt"
	"io"
	"os"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// upload stores a module: the header first, then chunks, until recv returns io.EOF.
func (s *standalone) upload(recv func() (*pb.UploadModuleRequest, error)) (*pb.UploadModuleResponse, error) {
	first, err := recv()
	if err != nil {
		return nil, fmt.Errorf("receiving the header of an upload: %w", err)
	}
	header := first.GetHeader()
	if header == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "an upload begins with its header")
	}
	var size uint64
	digest, err := s.modules.store(header.GetDigest(), func(to io.Writer) error {
		for {
			msg, err := recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return fmt.Errorf("receiving a module: %w", err)
			}
			if msg.GetHeader() != nil {
				return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "an upload has one header")
			}
			if size += uint64(len(msg.GetChunk())); size > header.GetSizeBytes() {
				break
			}
			if _, err := to.Write(msg.GetChunk()); err != nil {
				return err
			}
		}
		if size != header.GetSizeBytes() {
			return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "the upload does not have the %d bytes that its header tells", header.GetSizeBytes())
		}
		return nil
	})
	switch {
	case errors.Is(err, errModuleDamaged):
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s", err)
	case err != nil:
		return nil, err
	}
	return s.uploaded(digest, header)
}

// uploaded describes a stored module, and removes what is no module at all.
func (s *standalone) uploaded(digest string, header *pb.UploadModuleHeader) (*pb.UploadModuleResponse, error) {
	f, err := os.Open(s.modules.path(digest))
	if err != nil {
		return nil, fmt.Errorf("opening a module: %w", err)
	}
	defer f.Close()
	module, err := guestabi.Inspect(f)
	if err != nil {
		return nil, errors.Join(err, os.Remove(f.Name()))
	}
	module.Digest, module.SizeBytes, module.Name = digest, header.GetSizeBytes(), header.GetName()
	module.CreatedAt = timestamppb.New(s.now())
	return &pb.UploadModuleResponse{Module: module}, nil
}
