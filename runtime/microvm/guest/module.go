package guest

import (
	"errors"
	"fmt"
	"os"
)

// moduleFile is the module on its way from the host into the compiler.
type moduleFile struct{ file *os.File }

// add appends a piece.
func (m *moduleFile) add(dir string, piece []byte) (err error) {
	if m.file == nil {
		if m.file, err = os.CreateTemp(dir, "module-*.wasm"); err != nil {
			return fmt.Errorf("keeping the module: %w", err)
		}
	}
	if _, err := m.file.Write(piece); err != nil {
		return fmt.Errorf("keeping the module: %w", err)
	}
	return nil
}

// path returns where the whole module is; a path that does not exist when nothing
// was loaded, which is fine for a module that is compiled already.
func (m *moduleFile) path() string {
	if m.file == nil {
		return "/no/module/was/loaded"
	}
	return m.file.Name()
}

// remove gives the file's memory back.
func (m *moduleFile) remove() error {
	if m.file == nil {
		return nil
	}
	f := m.file
	m.file = nil
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
