package microvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/wasmatrix/wasmatrix/runtime"
)

// trial is a command that does nothing: it exports its memory of one page and an
// empty _start.
var trial = []byte("\x00asm\x01\x00\x00\x00" + // header
	"\x01\x04\x01\x60\x00\x00" + // types: () -> ()
	"\x03\x02\x01\x00" + // functions: one of type 0
	"\x05\x03\x01\x00\x01" + // memory: one page
	"\x07\x13\x02\x06memory\x02\x00\x06_start\x00\x00" + // exports
	"\x0a\x04\x01\x02\x00\x0b") // code: end

// Try runs a guest that does nothing from beginning to end, as a proof that this
// node can.
func (r *Runtime) Try(ctx context.Context) (err error) {
	f, err := os.CreateTemp("", "trial-*.wasm")
	if err != nil {
		return fmt.Errorf("keeping the module: %w", err)
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(trial)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("keeping the module: %w", err)
	}
	sum := sha256.Sum256(trial)
	i, err := r.Prepare(ctx, runtime.Spec{
		InstanceID: "trial", Name: "trial", Digest: "sha256:" + hex.EncodeToString(sum[:]), ModulePath: f.Name(),
		MemoryBytes: 64 << 10, Stdout: io.Discard, Stderr: io.Discard,
	}, noHost{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.Close(ctx)) }()
	if err := i.Start(ctx); err != nil {
		return err
	}
	exit, err := i.Wait(ctx)
	if err == nil && exit.Reason != runtime.Completed {
		err = fmt.Errorf("the trial guest ended with: %s", exit.Message)
	}
	return err
}

// noHost refuses every call.
type noHost struct{}

// Call implements runtime.Host.
func (noHost) Call(context.Context, string, string, []byte) ([]byte, error) {
	return nil, errors.New("the trial guest calls nothing")
}
