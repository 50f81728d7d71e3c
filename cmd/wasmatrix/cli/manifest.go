package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"buf.build/go/protovalidate"
	"buf.build/go/protoyaml"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/quantity"
)

// maxManifestBytes bounds a manifest; standard input in it may have 1 MiB, in base64.
const maxManifestBytes = 4 << 20

// readManifest reads a workload from a YAML file, or from standard input when
// path is "-", and checks everything that can be checked without a cluster. The
// module's path is returned relative to where the command runs.
func (a *app) readManifest(path string) (*pb.WorkloadSpec, error) {
	spec := &pb.WorkloadSpec{}
	if err := a.readYAML(path, spec); err != nil {
		return nil, err
	}
	if err := checkMeaning(spec); err != nil {
		return nil, usagef("%s: %w", path, err)
	}
	if isFile(spec.GetModule()) && !filepath.IsAbs(spec.GetModule()) && path != "-" {
		spec.Module = filepath.Join(filepath.Dir(path), spec.GetModule())
	}
	return spec, nil
}

// readYAML reads a message from a YAML file, strictly: what the message does
// not know, or what breaks its rules, is an error with line, column and caret.
func (a *app) readYAML(path string, into proto.Message) error {
	raw, err := a.readInput(path, maxManifestBytes)
	if err != nil {
		return err
	}
	validator, err := protovalidate.New()
	if err != nil {
		return err
	}
	shown := path
	if path == "-" {
		shown = "standard input"
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var document, further yaml.Node
	switch err := dec.Decode(&document); {
	case errors.Is(err, io.EOF):
		return usagef("%s is empty", shown)
	case err != nil:
		return &usageError{err: syntaxError(shown, raw, err)}
	}
	if err := dec.Decode(&further); !errors.Is(err, io.EOF) {
		return usagef("%s:%d holds more than one document; give each workload a file of its own", shown, further.Line)
	}
	err = protoyaml.UnmarshalOptions{Path: shown, Validator: rules{validator}}.Unmarshal(raw, into)
	if err != nil {
		return &usageError{err: explainYAML(err), next: "docs/cli.md shows a whole manifest"}
	}
	return nil
}

// rules is protovalidate as protoyaml calls it.
type rules struct{ validator protovalidate.Validator }

// Validate checks a message against the rules of its proto file.
func (r rules) Validate(m proto.Message) error { return r.validator.Validate(m) }

// readInput reads a file, or standard input for "-".
func (a *app) readInput(path string, limit int64) ([]byte, error) {
	r := a.env.Stdin
	if path != "-" {
		f, err := openFile(path)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(raw)) > limit {
		return nil, usagef("%s is larger than %s", path, size(uint64(limit)))
	}
	return raw, nil
}

// openFile opens a file that the user named; for one that does not exist it
// looks whether another was meant.
func openFile(path string) (*os.File, error) {
	f, err := os.Open(path)
	if notExist(err) {
		out := &usageError{err: fmt.Errorf("%s: no such file", path)}
		var names []string
		if entries, dirErr := os.ReadDir(filepath.Dir(path)); dirErr == nil {
			for _, e := range entries {
				names = append(names, e.Name())
			}
		}
		if close := nearest(filepath.Base(path), names); close != "" {
			out.next = filepath.Join(filepath.Dir(path), close)
		}
		return nil, out
	}
	if err != nil {
		return nil, Usage(err)
	}
	if info, err := f.Stat(); err == nil && info.IsDir() {
		_ = f.Close()
		return nil, usagef("%s is a directory", path)
	}
	return f, nil
}

// Texts of the YAML libraries, which give no types for what they found.
var (
	unknownField = regexp.MustCompile(`unknown field "([^"]*)", expected one of \[([^\]]*)\]`)
	yamlLine     = regexp.MustCompile(`line (\d+): (.*)`)
)

// explainYAML replaces the list of all fields by the one that was probably meant.
func explainYAML(err error) error {
	text := unknownField.ReplaceAllStringFunc(err.Error(), func(found string) string {
		parts := unknownField.FindStringSubmatch(found)
		known := strings.Fields(parts[2])
		if close := nearest(parts[1], known); close != "" {
			return fmt.Sprintf("unknown field %q; did you mean %q?", parts[1], close)
		}
		return fmt.Sprintf("unknown field %q; known are %s", parts[1], strings.Join(known, ", "))
	})
	return errors.New(strings.TrimRight(text, "\n"))
}

// syntaxError shows the line that is no YAML.
func syntaxError(path string, raw []byte, err error) error {
	found := yamlLine.FindStringSubmatch(err.Error())
	if found == nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	n, convErr := strconv.Atoi(found[1])
	lines := strings.Split(string(raw), "\n")
	if convErr != nil || n < 1 || n > len(lines) {
		return fmt.Errorf("%s: %w", path, err)
	}
	line := lines[n-1]
	indent := len(line) - len(strings.TrimLeft(line, " \t"))
	return fmt.Errorf("%s:%d:%d %s\n%4d | %s\n%4d | %s^", path, n, indent+1, found[2], n, line, n, strings.Repeat(".", indent))
}

// The bounds of an instance's memory, in bytes.
const (
	minMemory = 64 << 10
	maxMemory = 4 << 30
)

// flagsOf says which flag of run gives which field.
func flagsOf() map[string]string {
	return map[string]string{
		"name": "--name", "replicas": "--replicas", "runtime": "--runtime", "placement.node": "--node",
		"limits.memory": "--memory", "limits.timeout": "--timeout", "limits.concurrency": "--concurrency",
		"restart.policy": "--restart", "restart.max_retries": "--max-retries",
	}
}

// wanted says for people what a pattern in the rules asks for.
func wanted() map[string]string {
	return map[string]string{
		"name":          "want up to 53 lower-case letters, digits and hyphens, no hyphen first or last",
		"limits.memory": "want a number with KiB, MiB or GiB, as in 32MiB",
	}
}

// checkRules checks a spec made from flags against the rules of its proto file,
// before anything is sent.
func checkRules(spec *pb.WorkloadSpec) error {
	validator, err := protovalidate.New()
	if err != nil {
		return err
	}
	err = validator.Validate(spec)
	var broken *protovalidate.ValidationError
	if !errors.As(err, &broken) || len(broken.Violations) == 0 {
		return err
	}
	first := broken.Violations[0].Proto
	field := protovalidate.FieldPathString(first.GetField())
	what := field
	if flag := flagsOf()[field]; flag != "" {
		what = flag
	}
	text := wanted()[field]
	if text == "" {
		text = first.GetMessage()
	}
	return usagef("%s: %s", what, text)
}

// checkMeaning checks what the rules of the message cannot say and no cluster is needed for.
func checkMeaning(spec *pb.WorkloadSpec) error {
	if m := spec.GetLimits().GetMemory(); m != "" {
		n, err := quantity.ParseBytes(m)
		if err != nil {
			return fmt.Errorf("limits.memory: %w", err)
		}
		if n < minMemory || n > maxMemory {
			return fmt.Errorf("limits.memory is %s, and 64KiB to 4GiB are allowed", m)
		}
	}
	for i, grant := range spec.GetCapabilities() {
		if _, err := permission.ParseSet(grant.GetPermissions()); err != nil {
			return fmt.Errorf("capabilities[%d].permissions: %w", i, err)
		}
	}
	if strings.HasPrefix(spec.GetModule(), "oci://") {
		return errors.New("module: oci:// is not supported yet; name a file or a digest")
	}
	return nil
}

// isFile reports whether a module is named by a path, not by its digest.
func isFile(module string) bool { return !strings.HasPrefix(module, "sha256:") }

// openModule opens a module's file and checks what can be told from its size
// and its first bytes.
func openModule(path string) (*os.File, int64, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, 0, err
	}
	n, err := checkModule(f, path)
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, n, nil
}

func checkModule(f *os.File, path string) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, Usage(err)
	}
	if info.Size() > client.MaxModuleBytes {
		return 0, usagef("%s has %s; a module has at most %s", path, size(uint64(info.Size())), size(client.MaxModuleBytes))
	}
	head := make([]byte, 8)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, Usage(err)
	}
	switch {
	case n < len(head) || !bytes.HasPrefix(head, []byte("\x00asm")):
		return 0, usagef("%s is not a WebAssembly module: it begins with %q", path, head[:n])
	case !bytes.Equal(head[4:], []byte{1, 0, 0, 0}):
		return 0, &usageError{
			err:  fmt.Errorf("%s is not a core WebAssembly module (a component, or another version of the format)", path),
			next: "build a core module, as docs/guests.md tells",
		}
	}
	return info.Size(), nil
}
