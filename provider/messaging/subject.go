package messaging

import (
	"strings"
	"unicode/utf8"

	"github.com/wasmatrix/wasmatrix/provider"
)

// MaxSubject is the longest subject in bytes.
const MaxSubject = 255

// checkSubject refuses what is no subject. Where wild is true * and > may stand as
// whole tokens, > as the last only.
func checkSubject(s []byte, wild bool) error {
	if problem := subjectProblem(s, wild); problem != "" {
		return provider.Errorf(provider.ErrInvalid, "subject %.300q %s", s, problem).With("subject", strings.ToValidUTF8(string(s[:min(len(s), MaxSubject)]), "?"))
	}
	return nil
}

func subjectProblem(s []byte, wild bool) string {
	switch {
	case len(s) == 0:
		return "is empty"
	case len(s) > MaxSubject:
		return "is longer than 255 bytes"
	case reserved(s):
		return "is reserved: the first token must not begin with $ or _"
	}
	start, ascii := 0, true
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			c := s[i]
			if c <= ' ' || c == 0x7f {
				return "holds a space or control character"
			}
			ascii = ascii && c < utf8.RuneSelf
			continue
		}
		if i == start {
			return "has an empty token"
		}
		if problem := tokenProblem(s[start:i], i == len(s), wild); problem != "" {
			return problem
		}
		start = i + 1
	}
	if !ascii && !utf8.Valid(s) {
		return "is not valid UTF-8"
	}
	return ""
}

func tokenProblem(token []byte, last, wild bool) string {
	for _, c := range token {
		if c != '*' && c != '>' {
			continue
		}
		switch {
		case !wild:
			return "holds a wildcard, and a message is published to one subject"
		case len(token) > 1:
			return "has a wildcard that is not a whole token"
		case c == '>' && !last:
			return "has > before its last token"
		}
	}
	return ""
}

// reserved reports whether a subject belongs to NATS itself ($SYS, $JS, _INBOX,
// _R_, …) or to this package.
func reserved(s []byte) bool { return len(s) > 0 && (s[0] == '$' || s[0] == '_') }

// overlap reports whether there is a subject that both patterns match.
func overlap(a, b string) bool {
	for {
		x, restA, moreA := strings.Cut(a, ".")
		y, restB, moreB := strings.Cut(b, ".")
		switch {
		case x == ">" || y == ">":
			return true
		case x != y && x != "*" && y != "*":
			return false
		case !moreA || !moreB:
			return moreA == moreB
		}
		a, b = restA, restB
	}
}
