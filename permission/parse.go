package permission

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// ErrSyntax is what every *SyntaxError wraps.
var ErrSyntax = errors.New("invalid permission")

// SyntaxError says why a text is no permission.
type SyntaxError struct {
	// Text is what was found.
	Text string
	// Reason says what is wrong with it and what is expected.
	Reason string
	// Suggestion is a permission that was probably meant, or "".
	Suggestion string
}

// Error returns text, reason and suggestion in one line.
func (e *SyntaxError) Error() string {
	msg := fmt.Sprintf("permission %q: %s", e.Text, e.Reason)
	if e.Suggestion != "" {
		msg += fmt.Sprintf("; did you mean %q?", e.Suggestion)
	}
	return msg
}

// Unwrap returns ErrSyntax.
func (e *SyntaxError) Unwrap() error { return ErrSyntax }

var (
	providerID        = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	providerOperation = regexp.MustCompile(`^(\*|[A-Za-z0-9_][A-Za-z0-9_./-]{0,62})$`)
)

// Parse reads one permission. Its errors are of type *SyntaxError.
func Parse(s string) (Permission, error) {
	p, problem := parse(s)
	if problem == nil {
		return p, nil
	}
	problem.Suggestion = settle(problem.Suggestion)
	return Permission{}, problem
}

// settle follows a guess to a permission that parses; a guess may hold a second
// slip, which has a guess of its own. It returns "" when that leads nowhere.
func settle(guess string) string {
	for range 3 {
		if guess == "" {
			return ""
		}
		_, problem := parse(guess)
		if problem == nil {
			return guess
		}
		guess = problem.Suggestion
	}
	return ""
}

// parse is Parse with a suggestion that may not parse itself.
func parse(s string) (Permission, *SyntaxError) {
	if len(s) > MaxLength {
		return Permission{}, &SyntaxError{
			Text:   s[:32] + "…",
			Reason: fmt.Sprintf("it has %d bytes, the most is %d", len(s), MaxLength),
		}
	}
	capability, rest, _ := strings.Cut(s, ":")
	var p Permission
	var problem *SyntaxError
	switch capability {
	case "kv":
		p, problem = parseKV(rest)
	case "http":
		p, problem = parseHTTP(rest)
	case "msg":
		p, problem = parseMessaging(rest)
	case "provider":
		p, problem = parseProvider(rest)
	default:
		problem = &SyntaxError{
			Reason:     fmt.Sprintf("capability %q is unknown; expected kv, http, msg or provider", capability),
			Suggestion: guessCapability(capability, rest),
		}
	}
	if problem != nil {
		problem.Text = s
		return Permission{}, problem
	}
	p.text = s
	return p, nil
}

func parseKV(rest string) (Permission, *SyntaxError) {
	action, prefix, colon := strings.Cut(rest, ":")
	switch action {
	case Read, Write, Delete:
	default:
		return Permission{}, unknownAction("kv", action, prefix, colon, Read, Write, Delete)
	}
	if colon && prefix == "" {
		return Permission{}, &SyntaxError{
			Reason:     "a key prefix is expected after the second colon",
			Suggestion: "kv:" + action,
		}
	}
	return Permission{rule: ruleKV, action: action, resource: prefix}, nil
}

func parseHTTP(rest string) (Permission, *SyntaxError) {
	action, host, colon := strings.Cut(rest, ":")
	switch action {
	case Request:
		if colon {
			return Permission{}, &SyntaxError{
				Reason:     "http:request takes nothing more; hosts are named by http:domain",
				Suggestion: domainOr(host, "http:request"),
			}
		}
		return Permission{rule: ruleRequest, action: Request}, nil
	case "domain":
		h, reason, suggestion := parseHost(host)
		if reason != "" {
			if suggestion != "" {
				suggestion = domainOr(suggestion, "")
			}
			return Permission{}, &SyntaxError{Reason: reason, Suggestion: suggestion}
		}
		return Permission{rule: ruleDomain, action: Request, resource: host, host: h}, nil
	default:
		problem := unknownAction("http", action, host, colon, Request, "domain")
		if strings.Contains(action, ".") {
			problem.Suggestion = domainOr(rest, problem.Suggestion)
		}
		return Permission{}, problem
	}
}

// domainOr returns the domain permission for host when there is one.
func domainOr(host, otherwise string) string {
	if _, reason, _ := parseHost(host); reason != "" {
		return otherwise
	}
	return "http:domain:" + host
}

func parseMessaging(rest string) (Permission, *SyntaxError) {
	action, subject, colon := strings.Cut(rest, ":")
	p := Permission{action: action, resource: subject}
	switch action {
	case Publish:
		p.rule = rulePublish
	case Subscribe:
		p.rule = ruleSubscribe
	default:
		return Permission{}, unknownAction("msg", action, subject, colon, Publish, Subscribe)
	}
	if colon && subject == "" {
		return Permission{}, &SyntaxError{
			Reason:     "a subject is expected after the second colon",
			Suggestion: "msg:" + action,
		}
	}
	if colon && !wellFormed(subject) {
		return Permission{}, &SyntaxError{
			Reason: fmt.Sprintf("%q is not a subject; expected tokens joined by dots without spaces, "+
				"* as a whole token, > as the last", subject),
			Suggestion: guessSubject(action, subject),
		}
	}
	return p, nil
}

func parseProvider(rest string) (Permission, *SyntaxError) {
	id, operation, colon := strings.Cut(rest, ":")
	if !providerID.MatchString(id) {
		return Permission{}, &SyntaxError{
			Reason: fmt.Sprintf("%q is not a provider id; expected 1 to 63 lower-case letters, digits and hyphens", id),
		}
	}
	if !colon || operation == "" {
		return Permission{}, &SyntaxError{
			Reason:     "an operation is expected after the provider's id",
			Suggestion: "provider:" + id + ":*",
		}
	}
	if !providerOperation.MatchString(operation) {
		return Permission{}, &SyntaxError{
			Reason: fmt.Sprintf("%q is not an operation; expected * or 1 to 63 letters, digits and any of _ . / -", operation),
		}
	}
	return Permission{rule: ruleProvider, action: operation, resource: id}, nil
}

// ParseNeed reads what a permission's text asks for, as the question "may this
// instance kv:read:orders/17?": a kv resource is a key, http:domain:<host> is a
// request to that host. A publish must name a subject without wildcards. Its
// errors are of type *SyntaxError.
func ParseNeed(s string) (Need, error) {
	p, err := Parse(s)
	if err != nil {
		return Need{}, err
	}
	n := Need{Capability: p.Capability(), Action: p.action, Resource: p.resource}
	if p.rule == rulePublish && p.resource != "" && !literalSubject(p.resource) {
		return Need{}, &SyntaxError{Text: s, Reason: "a message is published to one subject; wildcards are for permissions"}
	}
	if p.rule == ruleDomain && (p.host.wild || p.host.prefix.IsValid()) {
		return Need{}, &SyntaxError{Text: s, Reason: "a request goes to one host; wildcards and ranges are for permissions"}
	}
	return n, nil
}
