package docs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/cli"
)

// inBinary are the commands that the binary adds to those of package cli.
var inBinary = []string{"dev", "agent", "doctor", "cluster ca", "cluster recover"}

// errSkipped marks a command line that only the built binary can judge.
var errSkipped = errors.New("WASMATRIX_BINARY is not set")

var (
	// started finds a command line at the start of a line, behind a pipe or in $().
	started = regexp.MustCompile(`(?:^|\| |\$\()wasmatrix (.*)`)
	// shellEnd is what ends a command in a shell.
	shellEnd = []string{"|", "||", "&&", ";", ">", ">>", "<", "&", "#"}
	// spanCommand finds a command in a code span; one in capitals is a placeholder.
	spanCommand = regexp.MustCompile("`wasmatrix ([a-z-][^`]*)`")
)

// words splits a command line as a shell does, as far as documents use it, and
// ends where the command ends.
func words(text string) ([]string, error) {
	var out []string
	var word strings.Builder
	quote, some := rune(0), false
	for _, r := range text + " " {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, some = r, true
		case r == ')':
			return append(out, word.String()), nil
		case r != ' ' && r != '\t':
			word.WriteRune(r)
			some = true
		case some:
			if slices.Contains(shellEnd, word.String()) {
				return out, nil
			}
			out = append(out, word.String())
			word.Reset()
			some = false
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote %c is not closed", quote)
	}
	return out, nil
}

// commandLines returns the command lines of a code block. In a block with
// prompts only lines with a prompt are commands, the others are output.
func commandLines(b block) []line {
	if !slices.Contains([]string{"", "sh", "bash", "console", "shell"}, b.language) {
		return nil
	}
	prompted := slices.ContainsFunc(b.lines, func(l line) bool { return strings.HasPrefix(l.text, "$ ") })
	var out []line
	for _, l := range b.lines {
		text, prompt := strings.CutPrefix(strings.TrimSpace(l.text), "$ ")
		if prompted && !prompt {
			continue
		}
		for _, match := range started.FindAllStringSubmatch(text, -1) {
			out = append(out, line{file: l.file, number: l.number, text: match[1]})
		}
	}
	return out
}

// judge says what is wrong with the words after "wasmatrix": an unknown command
// or flag, a value that does not fit, too few or too many arguments.
func judge(args []string, binary string) error {
	for _, name := range inBinary {
		if own := strings.Fields(name); len(args) >= len(own) && slices.Equal(args[:len(own)], own) {
			return judgeByHelp(args, binary)
		}
	}
	tree := cli.New(cli.Env{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard, Getenv: func(string) string { return "" }})
	tree.InitDefaultHelpCmd()
	tree.InitDefaultCompletionCmd()
	cmd, rest, err := tree.Find(args)
	if err != nil {
		return err
	}
	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	positional := cmd.Flags().Args()
	if cmd.HasSubCommands() && len(positional) > 0 {
		return fmt.Errorf("%s has no command %q", cmd.CommandPath(), positional[0])
	}
	if help, err := cmd.Flags().GetBool("help"); err != nil || help || cmd.HasSubCommands() {
		return err
	}
	return cmd.ValidateArgs(positional)
}

var helpFlag = regexp.MustCompile(`(?m)^ +(?:-([a-zA-Z]), )?--([a-z-]+)`)

// judgeByHelp asks the built binary for the command's help and looks for the
// path and the flags there.
func judgeByHelp(args []string, binary string) error {
	if binary == "" {
		return errSkipped
	}
	path := args
	if i := slices.IndexFunc(args, func(s string) bool { return strings.HasPrefix(s, "-") }); i >= 0 {
		path = args[:i]
	}
	raw, err := exec.Command(binary, append(slices.Clone(path), "--help")...).Output()
	if err != nil {
		return fmt.Errorf("ask for help: %w", err)
	}
	help := string(raw)
	// A word that is no command is an argument, which the usage shows in capitals.
	for len(path) > 0 && !strings.Contains(help, "\n  wasmatrix "+strings.Join(path, " ")+" ") {
		path = path[:len(path)-1]
	}
	usage := "\n  wasmatrix " + strings.Join(path, " ") + " "
	if len(path) == 0 || !strings.Contains(help, usage) {
		return fmt.Errorf("the binary has no command %q", strings.Join(args, " "))
	}
	flags := map[string]bool{}
	for _, match := range helpFlag.FindAllStringSubmatch(help, -1) {
		flags["-"+match[1]], flags["--"+match[2]] = true, true
	}
	for _, arg := range args {
		if name, _, _ := strings.Cut(arg, "="); len(arg) > 1 && arg[0] == '-' && !flags[name] {
			return fmt.Errorf("wasmatrix %s has no flag %s", strings.Join(path, " "), name)
		}
	}
	return nil
}

func TestShownCommandsExist(t *testing.T) {
	binary := os.Getenv("WASMATRIX_BINARY")
	judged, skipped := 0, 0
	check := func(l line, args []string) {
		switch err := judge(args, binary); {
		case errors.Is(err, errSkipped):
			skipped++
		case err != nil:
			t.Errorf("%s:%d: wasmatrix %s: %v", l.file, l.number, l.text, err)
		default:
			judged++
		}
	}
	for _, doc := range documents(t) {
		if doc.file != "README.md" && filepath.Dir(doc.file) != "docs" {
			continue
		}
		for _, b := range doc.blocks {
			for _, l := range commandLines(b) {
				args, err := words(l.text)
				if err != nil {
					t.Errorf("%s:%d: %v", l.file, l.number, err)
					continue
				}
				check(l, args)
			}
		}
		for _, l := range doc.prose {
			for _, match := range spanCommand.FindAllStringSubmatch(l.text, -1) {
				if args, err := words(match[1]); err == nil {
					checkMention(t, l, args)
				}
			}
		}
	}
	t.Logf("%d command lines judged, %d need WASMATRIX_BINARY", judged, skipped)
	if judged < 10 {
		t.Errorf("only %d command lines were found; the documents show more", judged)
	}
}

// checkMention judges a command in prose, which may leave arguments out: its
// command and its flags must exist.
func checkMention(t *testing.T, l line, args []string) {
	t.Helper()
	if err := mention(args); err != nil {
		t.Errorf("%s:%d: wasmatrix %s: %v", l.file, l.number, strings.Join(args, " "), err)
	}
}

func mention(args []string) error {
	if slices.Contains(inBinary, args[0]) || len(args) > 1 && slices.Contains(inBinary, args[0]+" "+args[1]) {
		return nil
	}
	tree := cli.New(cli.Env{Getenv: func(string) string { return "" }})
	cmd, rest, err := tree.Find(args)
	if err != nil {
		return err
	}
	if cmd.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && !choice(cmd, rest[0]) {
		return fmt.Errorf("%s has no command %q", cmd.CommandPath(), rest[0])
	}
	for _, arg := range rest {
		name, long := strings.CutPrefix(arg, "--")
		name, _, _ = strings.Cut(name, "=")
		if long && name != "" && cmd.Flag(name) == nil {
			return fmt.Errorf("%s has no flag --%s", cmd.CommandPath(), name)
		}
	}
	return nil
}

// choice reports whether word is a|b|c of commands that cmd has.
func choice(cmd *cobra.Command, word string) bool {
	for one := range strings.SplitSeq(strings.ReplaceAll(word, `\`, ""), "|") {
		if found, _, err := cmd.Find([]string{one}); err != nil || found == cmd {
			return false
		}
	}
	return true
}

func TestJudgeRefuses(t *testing.T) {
	for _, text := range []string{
		"nosuch", "kv nosuch", "instance frobnicate hello", "run a.wasm --nosuch", "run", "can hello",
		"status --timeout soon", "ps one two three", "kv get",
	} {
		args, err := words(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := judge(args, ""); err == nil {
			t.Errorf("wasmatrix %s: want an error", text)
		}
	}
	for _, text := range []string{
		`run a.wasm --stdin - -- -top 3 | head`, `kv put "a b" 'c d' --bucket x # comment`, `context show -o name)`, "instance", "version",
	} {
		args, err := words(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := judge(args, ""); err != nil {
			t.Errorf("wasmatrix %s: %v", text, err)
		}
	}
}
