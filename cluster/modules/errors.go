package modules

import (
	"errors"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// MaxSize is the largest module in bytes.
const MaxSize = 64 << 20

// Sentinels that the errors of this package wrap.
var (
	// ErrNotFound: the bytes are not on this peer's disk.
	ErrNotFound = errors.New("module is not on this peer")
	// ErrDamaged: the bytes on disk were not those of the digest; the file is removed.
	ErrDamaged = errors.New("module was damaged on disk")
	// ErrDigest: the digest is malformed, or the bytes have another one.
	ErrDigest = errors.New("digest does not match")
	// ErrEmpty: there were no bytes.
	ErrEmpty = errors.New("module is empty")
	// ErrTooLarge: there were more than MaxSize bytes.
	ErrTooLarge = errors.New("module is larger than 64 MiB")
	// ErrNoSpace: the disk has no room for the module.
	ErrNoSpace = errors.New("no space for modules on this peer's disk")
)

// APIError turns an error of this package into the API's shape. Errors that
// have it already, and errors it does not know, pass unchanged; nil stays nil.
func APIError(err error) error {
	if own := (*apierror.Error)(nil); err == nil || errors.As(err, &own) {
		return err
	}
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrDamaged):
		return apierror.New(pb.ErrorCode_ERROR_CODE_MODULE_NOT_FOUND, "%s", err).
			Next("wasmatrix module push FILE.wasm")
	case errors.Is(err, ErrDigest):
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s", err).
			Next("compute the digest again, or leave it out")
	case errors.Is(err, ErrEmpty):
		return guestabi.Empty()
	case errors.Is(err, ErrTooLarge):
		return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "%s", err).
			Next("build it without debug information, such as with -ldflags '-s -w' or wasm-strip")
	case errors.Is(err, ErrNoSpace):
		return apierror.New(pb.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED, "%s", err).
			Next("free disk space under the peer's data directory")
	default:
		return err
	}
}
