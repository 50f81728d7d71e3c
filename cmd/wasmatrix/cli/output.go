package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"buf.build/go/protoyaml"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// The forms of output.
const (
	formTable = "table"
	formJSON  = "json"
	formYAML  = "yaml"
	formName  = "name"
)

// result is what a command prints, in every form it may be asked for.
type result struct {
	// message is the whole answer, for json and yaml.
	message proto.Message
	// names are the ids, for name.
	names []string
	// table writes the form for people.
	table func(w io.Writer)
}

// print writes r to standard output in the form that -o asks for.
func (a *app) print(r result) error {
	switch a.global.output {
	case formJSON:
		raw, err := marshalJSON(r.message)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(a.env.Stdout, "%s\n", raw)
		return err
	case formYAML:
		raw, err := protoyaml.MarshalOptions{Indent: 2, UseProtoNames: true}.Marshal(r.message)
		if err != nil {
			return err
		}
		_, err = a.env.Stdout.Write(raw)
		return err
	case formName:
		for _, name := range r.names {
			if _, err := fmt.Fprintln(a.env.Stdout, cleanLine(name)); err != nil {
				return err
			}
		}
		return nil
	default:
		r.table(a.env.Stdout)
		return nil
	}
}

// printLine writes one message of a stream: one line of JSON, one YAML
// document, a name, or the line for people.
func (a *app) printLine(m proto.Message, name, line string) error {
	var err error
	switch a.global.output {
	case formJSON:
		var raw []byte
		if raw, err = compactJSON(m); err == nil {
			_, err = fmt.Fprintf(a.env.Stdout, "%s\n", raw)
		}
	case formYAML:
		var raw []byte
		if raw, err = (protoyaml.MarshalOptions{Indent: 2, UseProtoNames: true}).Marshal(m); err == nil {
			_, err = fmt.Fprintf(a.env.Stdout, "---\n%s", raw)
		}
	case formName:
		_, err = fmt.Fprintln(a.env.Stdout, cleanLine(name))
	default:
		_, err = fmt.Fprintln(a.env.Stdout, clean(line))
	}
	return err
}

// marshalJSON returns the proto JSON of m, indented. What protojson writes
// differs in spaces from build to build on purpose; this does not.
func marshalJSON(m proto.Message) ([]byte, error) {
	raw, err := compactJSON(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func compactJSON(m proto.Message) ([]byte, error) {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// table is rows under headings, each column as wide as its widest cell.
type table struct {
	head []string
	rows [][]string
	// paint colours a cell after its width was taken; nil leaves all as they are.
	paint func(column, text string) string
}

// row adds a row; its cells are cleaned.
func (t *table) row(cells ...string) {
	safe := make([]string, len(cells))
	for i, cell := range cells {
		safe[i] = cleanCell(cell)
	}
	t.rows = append(t.rows, safe)
}

func (t *table) write(w io.Writer) {
	widths := make([]int, len(t.head))
	for _, row := range append([][]string{t.head}, t.rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b bytes.Buffer
	for n, row := range append([][]string{t.head}, t.rows...) {
		var line strings.Builder
		for i, cell := range row {
			text := cell
			if n > 0 && t.paint != nil {
				text = t.paint(t.head[i], cell)
			}
			line.WriteString(text)
			if i < len(row)-1 {
				line.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " "))
		b.WriteByte('\n')
	}
	_, _ = w.Write(b.Bytes())
}

// painter colours states on a terminal, unless NO_COLOR is set.
func (a *app) painter() func(column, text string) string {
	if !terminal(a.env.Stdout) || a.env.Getenv("NO_COLOR") != "" || a.env.Getenv("TERM") == "dumb" {
		return nil
	}
	return func(column, text string) string {
		if column != "STATE" {
			return text
		}
		colour := "33" // yellow: on its way
		switch text {
		case "RUNNING", "COMPLETED", "READY":
			colour = "32"
		case "FAILED", "CRASHED", "LOST":
			colour = "31"
		case "STOPPED":
			colour = "90"
		}
		return "\x1b[" + colour + "m" + text + "\x1b[0m"
	}
}

// shortName returns an enum's name without its prefix.
func shortName(name, prefix string) string { return strings.TrimPrefix(name, prefix) }

// age tells how long ago t was, in at most two units; "-" for no time.
func (a *app) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return humanDuration(a.env.Now().Sub(t.AsTime()))
}

func humanDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}

// took tells a short time as people measure it: "41 ms", "1.2 s".
func took(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// size tells a number of bytes in its largest unit, with a decimal where it counts.
func size(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	value, unit := float64(n), 0
	for value >= 1024 && unit < len(units)-1 {
		value, unit = value/1024, unit+1
	}
	text := fmt.Sprintf("%.0f", value)
	if value < 10 && unit > 1 {
		text = strings.TrimSuffix(fmt.Sprintf("%.1f", value), ".0")
	}
	return text + " " + units[unit]
}

// shortDigest returns the part of a digest that people recognise.
func shortDigest(d string) string {
	const keep = len("sha256:") + 12
	if len(d) > keep {
		return d[:keep]
	}
	return d
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
