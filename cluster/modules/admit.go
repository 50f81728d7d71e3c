package modules

import (
	"errors"
	"io"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// Admit inspects the bytes of r while it stores them, and keeps them only when
// they can be a guest. expected is as for Put. It returns the module as the
// registry records it, without a name. Its errors are those of Put
// and guestabi.Inspect.
func (s *Store) Admit(r io.Reader, expected string) (*pb.Module, error) {
	checked := inspectWhile(r)
	// After a failure of the disk the inspection still waits for bytes.
	defer func() { _ = checked.stop() }()
	digest, size, err := s.Put(checked, expected)
	if refusal := (*apierror.Error)(nil); errors.As(err, &refusal) {
		return nil, refusal
	}
	if err != nil {
		return nil, err
	}
	m := checked.module
	m.Digest, m.SizeBytes = digest, size
	return m, nil
}

// inspectedReader passes a stream on while it is inspected, and turns the
// end of the stream into the refusal if there is one.
type inspectedReader struct {
	in      io.Reader
	pipe    *io.PipeWriter
	verdict chan error
	module  *pb.Module
	done    bool
}

func inspectWhile(r io.Reader) *inspectedReader {
	along, pipe := io.Pipe()
	out := &inspectedReader{in: r, pipe: pipe, verdict: make(chan error, 1)}
	go func() {
		m, err := guestabi.Inspect(along)
		// The writer learns of a refusal at once instead of sending on in vain.
		_ = along.CloseWithError(err)
		out.module = m
		out.verdict <- err
	}()
	return out
}

func (r *inspectedReader) Read(p []byte) (int, error) {
	n, err := r.in.Read(p)
	if n > 0 {
		if _, perr := r.pipe.Write(p[:n]); perr != nil {
			return 0, perr
		}
	}
	if errors.Is(err, io.EOF) && !r.done {
		if refusal := r.stop(); refusal != nil {
			return n, refusal
		}
	}
	return n, err
}

// stop ends the inspection and waits for it. It returns the verdict the first time.
func (r *inspectedReader) stop() error {
	if r.done {
		return nil
	}
	r.done = true
	_ = r.pipe.Close()
	return <-r.verdict
}
