// Package architecture checks what the compiler and the linters cannot say: who
// may import whom, and the sizes that keep the code readable.
package architecture

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/wasmatrix/wasmatrix"

type goPackage struct {
	ImportPath   string
	Dir          string
	Doc          string
	GoFiles      []string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// walls lists, for packages at or below a path, what they must never import.
var walls = []struct {
	at, why string
	never   []string
}{
	{"apierror", "a leaf over proto", []string{"cluster", "fsm", "agent", "runtime", "provider", "client", "cmd", "rpc", "identity"}},
	{"correlation", "a leaf", []string{""}},
	{"permission", "pure", []string{""}},
	{"quantity", "pure", []string{""}},
	{"internal/crew", "a leaf", []string{""}},
	{"internal/pause", "a leaf", []string{""}},
	{"guestabi", "a leaf over apierror and proto", []string{"cluster", "fsm", "agent", "runtime", "provider", "client", "cmd", "rpc", "identity"}},
	{"identity", "a leaf", []string{"cluster", "fsm", "agent", "runtime", "provider", "client", "cmd", "rpc"}},
	{"rpc", "interceptors know no service", []string{"cluster", "fsm", "agent", "runtime", "provider", "client", "cmd"}},
	{"fsm", "pure state", []string{"cluster", "agent", "runtime", "provider", "client", "cmd", "rpc", "identity", "permission"}},
	{"cluster", "the control plane speaks proto to agents and runs no guest", []string{"agent", "runtime", "provider", "client", "cmd"}},
	{"cluster/gossip", "behind members and events, nothing of ours but the messages", []string{"cluster", "fsm", "identity", "rpc"}},
	{"agent", "the data plane speaks proto to the control plane", []string{"cluster", "fsm", "client", "cmd"}},
	{"runtime", "executors know neither plane", []string{"cluster", "fsm", "agent", "provider", "client", "cmd"}},
	{"provider", "providers know neither plane", []string{"cluster", "fsm", "agent", "runtime", "client", "cmd"}},
	{"client", "a client knows only the API", []string{"cluster", "fsm", "agent", "runtime", "provider", "cmd"}},
	{"cmd/wasmatrix/cli", "the CLI uses the client and nothing else", []string{"cluster", "fsm", "agent", "runtime", "provider", "cmd/wasmatrix/node"}},
}

func TestImportWalls(t *testing.T) {
	for _, p := range packages(t) {
		at := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		for _, w := range walls {
			if at != w.at && !strings.HasPrefix(at, w.at+"/") {
				continue
			}
			for _, imported := range p.Imports {
				rel, ours := strings.CutPrefix(imported, module+"/")
				if !ours || within(rel, w.at) {
					continue
				}
				for _, never := range w.never {
					if never == "" || within(rel, never) {
						t.Errorf("%s imports %s: %s (%s)", at, rel, never, w.why)
					}
				}
			}
		}
	}
}

// TestContractsSpeakGo holds the two contracts free of the wire and of each other.
func TestContractsSpeakGo(t *testing.T) {
	allowed := map[string][]string{"runtime": nil, "provider": {"permission", "internal/crew", "internal/plant"}}
	for _, p := range packages(t) {
		at := strings.TrimPrefix(p.ImportPath, module+"/")
		only, contract := allowed[at]
		if !contract {
			continue
		}
		for _, imported := range p.Imports {
			if rel, ours := strings.CutPrefix(imported, module+"/"); ours && !slices.Contains(only, rel) {
				t.Errorf("%s imports %s: a contract imports only %v of ours", at, rel, only)
			}
		}
	}
}

// TestClientsLinkNoServer holds what a user of the Go client links free of
// consensus, executors and stores.
func TestClientsLinkNoServer(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", module+"/client").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, heavy := range []string{"github.com/hashicorp/raft", "github.com/hashicorp/memberlist", "github.com/tetratelabs/wazero", "go.etcd.io/bbolt"} {
		if strings.Contains(string(out), heavy+"\n") {
			t.Errorf("client links %s", heavy)
		}
	}
}

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	for _, p := range packages(t) {
		if p.Doc == "" && len(p.GoFiles) > 0 {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		switch path.Base(p.ImportPath) {
		case "util", "utils", "common", "helper", "helpers", "types", "misc":
			t.Errorf("%s: the name says nothing", p.ImportPath)
		}
	}
}

// TestFilesStayReadable bounds the files that people write.
func TestFilesStayReadable(t *testing.T) {
	const most = 600
	for _, p := range packages(t) {
		for _, name := range p.GoFiles {
			if strings.HasSuffix(name, ".pb.go") {
				continue
			}
			if n := lines(t, filepath.Join(p.Dir, name)); n > most {
				t.Errorf("%s/%s has %d lines, more than %d", p.ImportPath, name, n, most)
			}
		}
	}
}

func within(rel, prefix string) bool { return rel == prefix || strings.HasPrefix(rel, prefix+"/") }

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,GoFiles,Imports,TestImports,XTestImports", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		all = append(all, p)
	}
}

func lines(t *testing.T, name string) int {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); n++ {
	}
	return n
}
