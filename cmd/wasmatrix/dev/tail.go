package dev

import (
	"io"
	"os"
	"strings"
)

// tailBytes bounds how much of a file Tail looks at.
const tailBytes = 64 << 10

// Tail returns the last lines of a file, for an error message. When the file
// cannot be read it returns why.
func Tail(path string, lines int) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error() + "\n"
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > tailBytes {
		_, _ = f.Seek(-tailBytes, io.SeekEnd)
	}
	raw, _ := io.ReadAll(f)
	all := strings.Split(strings.TrimRight(string(raw), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n") + "\n"
}
