package cli

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// clean returns text that a terminal only shows: what would move its cursor,
// change its colours or turn its writing round is written as in a Go string
// (\x1b, \u202e), and so are bytes that are not UTF-8. Tabs and ends of lines
// stay. Much of what is shown was chosen by a guest.
func clean(text string) string { return cleanBut(text, "\n\t") }

// cleanLine is clean for text that must stay on one line: ends of lines are
// escaped too, so that none looks like a line of wasmatrix.
func cleanLine(text string) string { return cleanBut(text, "\t") }

// cleanCell is clean for one cell of a table.
func cleanCell(text string) string { return cleanBut(text, "") }

func cleanBut(text, kept string) string {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	if strings.IndexFunc(text, unsafeRune) < 0 {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRuneInString(text[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case !unsafeRune(r) || r == utf8.RuneError || strings.ContainsRune(kept, r):
			b.WriteString(text[i : i+n])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case r < utf8.RuneSelf:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += n
	}
	return b.String()
}

// unsafeRune reports whether a rune needs a second look: a control character,
// one that changes the direction of text, or one that stands for a broken byte.
func unsafeRune(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == utf8.RuneError ||
		r == '\u2028' || r == '\u2029'
}

// indented sets all lines but the first apart from what wasmatrix says itself.
func indented(text, by string) string { return strings.ReplaceAll(text, "\n", "\n"+by) }
