package kernel

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// resolve returns the files of the wanted modules and of what they need, those
// needed first; modules that are built in are left out.
func resolve(dir string, wanted []string) ([]string, error) {
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("reading what is built in: %w", err)
	}
	r := resolver{dir: dir, files: map[string]string{}, needs: map[string][]string{}, done: map[string]bool{}}
	for file := range strings.FieldsSeq(string(builtin)) {
		r.done[name(file)] = true
	}
	index, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("reading the modules' dependencies: %w (depmod makes them)", err)
	}
	for line := range strings.Lines(string(index)) {
		file, needs, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		r.files[name(file)] = file
		for n := range strings.FieldsSeq(needs) {
			r.needs[name(file)] = append(r.needs[name(file)], name(n))
		}
	}
	for _, w := range wanted {
		if err := r.add(w); err != nil {
			return nil, err
		}
	}
	return r.order, nil
}

type resolver struct {
	dir   string
	files map[string]string
	needs map[string][]string
	done  map[string]bool
	order []string
}

func (r *resolver) add(module string) error {
	if r.done[module] {
		return nil
	}
	r.done[module] = true
	file := r.files[module]
	if file == "" {
		return fmt.Errorf("%s has no module %s", r.dir, module)
	}
	// modules.dep names the deepest dependency last.
	for _, need := range slices.Backward(r.needs[module]) {
		if err := r.add(need); err != nil {
			return err
		}
	}
	r.order = append(r.order, filepath.Join(r.dir, file))
	return nil
}

// name is a module's name: dashes and underscores mean the same.
func name(file string) string {
	n, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(n, "-", "_")
}
