package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// hinted finds the commands in the next step of an error, up to where its
// sentence goes on.
var hinted = regexp.MustCompile(`\bwasmatrix ([a-z][^;,)]*)`)

// hints returns every next step that non-test code gives as a literal.
func hints(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"build", "tools", "guest"}, d.Name())):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); ok && (f.Sel.Name == "Next" || f.Sel.Name == "NextStep") {
				if text := literal(call.Args[0]); text != "" {
					out[text] = path
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestHintedCommandsExist holds errors to suggesting commands that there are.
func TestHintedCommandsExist(t *testing.T) {
	seen := 0
	for text, file := range hints(t) {
		for _, match := range hinted.FindAllStringSubmatch(text, -1) {
			args, err := words(match[1])
			if err == nil && len(args) > 0 {
				seen++
				err = mention(args)
			}
			if err != nil {
				t.Errorf("%s suggests %q: %v", file, text, err)
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d suggested commands were found; the code has more", seen)
	}
}
