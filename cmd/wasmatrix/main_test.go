package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
)

const exitUsage = 2

// execute runs one command line without any environment.
func execute(t *testing.T, args ...string) (code int, said string) {
	t.Helper()
	var out bytes.Buffer
	env := cli.Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out, Getenv: func(string) string { return "" }}
	root := cli.New(env)
	root.AddCommand(newCACommand(env), newDevCommand(env), newAgentCommand(env))
	root.SetArgs(args)
	code = cli.Execute(t.Context(), root, env)
	return code, out.String()
}

// TestMistakesOfTheUserSayWhatToDo has what a newcomer gets wrong: none of it is
// an internal error.
func TestMistakesOfTheUserSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	ca, out := filepath.Join(dir, "ca"), filepath.Join(dir, "out")
	if code, said := execute(t, "ca", "init", ca); code != 0 {
		t.Fatal(said)
	}
	file := filepath.Join(dir, "file")
	config := filepath.Join(dir, "config.yaml")
	for path, text := range map[string]string{
		file:   "",
		config: "node: {name: n1}\ndata_dir: " + dir + "\njoin: {bootstrap_expect: 1}\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		args []string
		says string
	}{
		{"a CA over another", []string{"ca", "init", ca}, "holds a CA already;"},
		{"a bad cluster name", []string{"ca", "init", filepath.Join(dir, "ca2"), "--cluster", "B_"}, "lower-case"},
		{"no CA", []string{"ca", "issue", "--ca", filepath.Join(dir, "none"), "--node", "n1", "--out", out}, "ca init"},
		{"a bad node name", []string{"ca", "issue", "--ca", ca, "--node", "N_1", "--out", out}, "lower-case"},
		{"a negative lifetime", []string{"ca", "issue", "--ca", ca, "--node", "n1", "--ttl", "-1h", "--out", out}, "not positive"},
		{"no certificate", []string{"agent", "--config", config}, "ca issue --node n1"},
		{"nowhere to write the context", []string{"dev"}, "--write-context"},
		{"a context in a file", []string{"dev", "--port-base", "31900", "--metrics-port", "0", "--write-context", filepath.Join(file, "c.yaml")}, "--write-context"},
		{"a negative metrics port", []string{"dev", "--metrics-port", "-1", "--write-context", out}, "metrics port"},
		{"a file for the directory", []string{"dev", "--persist", file, "--write-context", out}, "directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, said := execute(t, tc.args...)
			if code != exitUsage || !strings.Contains(said, tc.says) || strings.Contains(said, "%!") {
				t.Errorf("exit %d, %q: want %d and %q", code, said, exitUsage, tc.says)
			}
		})
	}
}
