package survey

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// The init is the one that was named, else the one inside the program, else the
// program itself with the arguments that make it one.
func TestWhichInitIsTaken(t *testing.T) {
	named := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(named, []byte("named"), 0o600); err != nil {
		t.Fatal(err)
	}
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	arguments := []string{"be", "init"}
	embedded := func() ([]byte, error) { return []byte("embedded"), nil }
	none := func() ([]byte, error) { return nil, nil }
	for name, tt := range map[string]struct {
		options   Options
		want      []byte
		arguments []string
	}{
		"named":      {Options{Init: named, Embedded: embedded, SelfArguments: arguments}, []byte("named"), nil},
		"embedded":   {Options{Embedded: embedded, SelfArguments: arguments}, []byte("embedded"), nil},
		"holds none": {Options{Embedded: none, SelfArguments: arguments}, self, arguments},
		"itself":     {Options{SelfArguments: arguments}, self, arguments},
	} {
		got, from, with, err := findInit(tt.options)
		if err != nil || !bytes.Equal(got, tt.want) || !slices.Equal(with, tt.arguments) || from == "" {
			t.Errorf("%s: %d bytes from %s with %q: %v", name, len(got), from, with, err)
		}
	}
	damaged := errors.New("damaged")
	if _, _, _, err := findInit(Options{Embedded: func() ([]byte, error) { return nil, damaged }}); !errors.Is(err, damaged) {
		t.Errorf("a damaged embedded init: %v", err)
	}
}
