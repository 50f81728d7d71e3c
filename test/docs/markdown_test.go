package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// line is one line of a document.
type line struct {
	file   string // relative to root
	number int
	text   string
}

// block is a fenced code block.
type block struct {
	language string
	lines    []line
}

// document is a Markdown file, taken apart.
type document struct {
	file   string
	prose  []line
	blocks []block
}

// readDocument reads a Markdown file; file is relative to root.
func readDocument(t *testing.T, file string) document {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	doc := document{file: file}
	var open *block
	for n, text := range strings.Split(string(raw), "\n") {
		l := line{file: file, number: n + 1, text: text}
		switch language, fence := strings.CutPrefix(strings.TrimSpace(text), "```"); {
		case fence && open == nil:
			open = &block{language: language}
		case fence:
			doc.blocks = append(doc.blocks, *open)
			open = nil
		case open != nil:
			open.lines = append(open.lines, l)
		default:
			doc.prose = append(doc.prose, l)
		}
	}
	if open != nil {
		t.Errorf("%s: a code block is not closed", file)
	}
	return doc
}

// documents reads every Markdown file of the repository.
func documents(t *testing.T) []document {
	t.Helper()
	var out []document
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			if path != root && (strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"build", "testdata"}, d.Name())) {
				return filepath.SkipDir
			}
		case filepath.Ext(path) == ".md":
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			out = append(out, readDocument(t, rel))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 5 {
		t.Fatalf("found %d documents below %s; the repository has more", len(out), root)
	}
	return out
}

var (
	codeSpan = regexp.MustCompile("`[^`]*`")
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	notSlug  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors returns the names under which the headings of a document can be linked.
func anchors(doc document) map[string]bool {
	out := map[string]bool{}
	for _, l := range doc.prose {
		heading, ok := strings.CutPrefix(strings.TrimLeft(l.text, "#"), " ")
		if !ok || !strings.HasPrefix(l.text, "#") {
			continue
		}
		slug := notSlug.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
		out[strings.ReplaceAll(slug, " ", "-")] = true
	}
	return out
}

func TestLinksLeadSomewhere(t *testing.T) {
	docs := documents(t)
	byFile := map[string]document{}
	for _, doc := range docs {
		byFile[doc.file] = doc
	}
	seen := 0
	for _, doc := range docs {
		for _, l := range doc.prose {
			for _, match := range link.FindAllStringSubmatch(codeSpan.ReplaceAllString(l.text, ""), -1) {
				target, anchor, _ := strings.Cut(match[1], "#")
				if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
					continue
				}
				seen++
				to := doc.file
				if target != "" {
					to = filepath.Join(filepath.Dir(doc.file), target)
				}
				if _, err := os.Stat(filepath.Join(root, to)); err != nil {
					t.Errorf("%s:%d: the link %s leads to no file", l.file, l.number, match[1])
					continue
				}
				if other, isDoc := byFile[to]; anchor != "" && isDoc && !anchors(other)[anchor] {
					t.Errorf("%s:%d: %s has no heading #%s", l.file, l.number, to, anchor)
				}
			}
		}
	}
	if seen == 0 {
		t.Error("no relative link was found; the documents have some")
	}
}
