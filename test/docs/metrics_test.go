package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// metricsTable is where every metric is described.
const metricsTable = "docs/metrics.md"

var (
	metricName = regexp.MustCompile(`^wasmatrix_[a-z0-9_]*[a-z0-9]$`)
	// guestExport is what looks like a metric's name and is an export of guests.
	guestExport = regexp.MustCompile(`^wasmatrix_(alloc|on_[a-z]+)$`)
	tableRow    = regexp.MustCompile("^\\| `(wasmatrix_[a-z0-9_]+)` \\| (counter|gauge|histogram) \\|")
)

// metricsInCode returns the names of metrics that non-test code holds, with the
// file of each. It knows two ways to write one: a whole name, and a name without
// its prefix as first argument of a local function that adds "wasmatrix_".
func metricsInCode(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{"agent", "cluster", "cmd", "provider", "rpc", "runtime"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && slices.Contains([]string{"runtimetest", "modulestest", "providertest"}, d.Name()):
				return filepath.SkipDir
			case d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
				return nil
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			for _, name := range metricsInFile(file) {
				out[name] = path
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func metricsInFile(file *ast.File) []string {
	var out []string
	adders := map[string]bool{} // local functions that add the prefix
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BasicLit:
			if name := literal(n); metricName.MatchString(name) && !guestExport.MatchString(name) {
				out = append(out, name)
			}
		case *ast.AssignStmt:
			if f, ok := n.Rhs[0].(*ast.FuncLit); ok && holds(f, "wasmatrix_") {
				if name, ok := n.Lhs[0].(*ast.Ident); ok {
					adders[name.Name] = true
				}
			}
		}
		return true
	})
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		if f, ok := call.Fun.(*ast.Ident); ok && adders[f.Name] {
			if name := literal(call.Args[0]); name != "" {
				out = append(out, "wasmatrix_"+name)
			}
		}
		return true
	})
	return out
}

// literal returns the value of a string literal, else "".
func literal(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	s, err := strconv.Unquote(lit.Value)
	if err != nil {
		return ""
	}
	return s
}

func holds(f *ast.FuncLit, text string) (found bool) {
	ast.Inspect(f, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && literal(lit) == text {
			found = true
		}
		return !found
	})
	return found
}

func TestEveryMetricIsDescribed(t *testing.T) {
	described := map[string]bool{}
	for _, l := range readDocument(t, metricsTable).prose {
		if match := tableRow.FindStringSubmatch(l.text); match != nil {
			described[match[1]] = true
		}
	}
	inCode := metricsInCode(t)
	// Both ways of writing a name must have been found.
	for _, known := range []string{"wasmatrix_api_requests_total", "wasmatrix_raft_term", "wasmatrix_agent_up", "wasmatrix_instances"} {
		if inCode[known] == "" {
			t.Errorf("%s was not found in the code: this test does not see every metric", known)
		}
	}
	for name, file := range inCode {
		if !described[name] {
			t.Errorf("%s lacks %s of %s", metricsTable, name, file)
		}
	}
	for name := range described {
		if inCode[name] == "" {
			t.Errorf("%s describes %s, which is not in the code", metricsTable, name)
		}
	}
}
