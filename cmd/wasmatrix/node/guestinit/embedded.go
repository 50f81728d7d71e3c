//go:build guestinit && linux && amd64

package guestinit

import (
	"bytes"
	"compress/gzip"
	_ "embed" // for the init
	"fmt"
	"io"
)

//go:embed init.gz
var packed []byte

// Program returns the init, nil when this binary holds none.
func Program() ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("unpacking the embedded init: %w", err)
	}
	program, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("unpacking the embedded init: %w", err)
	}
	return program, nil
}
