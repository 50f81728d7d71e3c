package permission

import "strings"

// cutToken returns the first token of a subject and what follows its dot.
func cutToken(s string) (token, rest string, more bool) {
	return strings.Cut(s, ".")
}

// coversSubject reports whether every subject that need stands for matches
// pattern. Both may hold NATS wildcards: * is one token, > is one token or more
// at the end. A malformed need is never covered.
func coversSubject(pattern, need string) bool {
	for {
		p, patternRest, patternMore := cutToken(pattern)
		n, needRest, needMore := cutToken(need)
		switch {
		case !validToken(n) || n == ">" && needMore:
			return false
		case p == ">":
			return !needMore || wellFormed(needRest)
		case n == ">":
			return false
		case p != "*" && p != n:
			return false
		}
		if !patternMore || !needMore {
			return patternMore == needMore
		}
		pattern, need = patternRest, needRest
	}
}

// wellFormed reports whether s is a subject, wildcards allowed.
func wellFormed(s string) bool {
	for {
		token, rest, more := cutToken(s)
		if !validToken(token) || token == ">" && more {
			return false
		}
		if !more {
			return true
		}
		s = rest
	}
}

// literalSubject reports whether s is a subject without wildcards.
func literalSubject(s string) bool {
	last := byte('.')
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c == 0x7f || c == '*' || c == '>' || c == '.' && last == '.' {
			return false
		}
		last = c
	}
	return last != '.'
}

// coversLiteral is coversSubject for a well-formed pattern and a literal subject, which
// every message that is published is asked for.
func coversLiteral(pattern, subject string) bool {
	at := 0
	for i := range len(pattern) {
		switch c := pattern[i]; {
		case c == '>':
			return true // what follows a dot of a literal subject is a token
		case c == '*':
			for at < len(subject) && subject[at] != '.' {
				at++
			}
		case at == len(subject) || c != subject[at]:
			return false
		default:
			at++
		}
	}
	return at == len(subject)
}

// validToken refuses what NATS refuses, and a wildcard inside a longer token:
// NATS takes that literally, which is never what its author meant.
func validToken(token string) bool {
	if token == "" {
		return false
	}
	for i := range len(token) {
		c := token[i]
		if c <= ' ' || c == 0x7f || (c == '*' || c == '>') && len(token) > 1 {
			return false
		}
	}
	return true
}
