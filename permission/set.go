package permission

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Set is the permissions that one instance has for one provider. It is
// immutable and safe for concurrent use; the zero Set allows nothing.
type Set struct {
	list    []Permission
	domains bool // an http:domain is among them
}

// ParseSet reads permissions, keeps their order and drops repeated ones. Its
// error joins one *SyntaxError for each text that is no permission.
func ParseSet(texts []string) (Set, error) {
	s := Set{list: make([]Permission, 0, len(texts))}
	var problems []error
	for _, text := range texts {
		p, err := Parse(text)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if !slices.Contains(s.list, p) {
			s.list = append(s.list, p)
			s.domains = s.domains || p.rule == ruleDomain
		}
	}
	if len(problems) > 0 {
		return Set{}, errors.Join(problems...)
	}
	return s, nil
}

// Len returns the number of permissions.
func (s Set) Len() int { return len(s.list) }

// Strings returns the permissions as they were parsed, in their order.
func (s Set) Strings() []string {
	out := make([]string, len(s.list))
	for i := range s.list {
		out[i] = s.list[i].text
	}
	return out
}

// Allows reports whether the set allows n, and the permission that decided it.
func (s Set) Allows(n Need) (Permission, bool) {
	if i := s.find(&n); i >= 0 {
		return s.list[i], true
	}
	return Permission{}, false
}

// find returns the index of the deciding permission, or -1.
func (s *Set) find(n *Need) int {
	if s.domains && n.Capability == HTTP {
		return s.findDomain(n)
	}
	for i := range s.list {
		if s.list[i].covers(n) {
			return i
		}
	}
	return -1
}

func (s *Set) findDomain(n *Need) int {
	domain, request := -1, false
	for i := range s.list {
		p := &s.list[i]
		switch {
		case p.rule == ruleRequest:
			request = request || p.covers(n)
		case domain < 0 && p.covers(n):
			domain = i
		}
	}
	if !request {
		return -1
	}
	return domain
}

// MayEver reports whether any permission of the set could allow the need's
// capability and action for some resource; an empty Action stands for any. It
// is for refusing early, before the resource is known; Allows decides.
func (s Set) MayEver(n Need) bool {
	for i := range s.list {
		p := &s.list[i]
		if p.rule == ruleDomain {
			continue // without http:request it allows nothing
		}
		if p.about(n.Capability, n.Action) || n.Action == "" && p.Capability() == n.Capability {
			return true
		}
	}
	return false
}

// Missing returns the narrowest permissions that would have to be added for n
// to be allowed; nil when it is allowed already.
func (s Set) Missing(n Need) []string {
	if s.find(&n) >= 0 {
		return nil
	}
	if n.Capability != HTTP {
		return []string{n.grantable()}
	}
	var out []string
	if !s.MayEver(n) {
		out = append(out, "http:request")
	}
	if s.domains && n.Resource != "" && !s.namesHost(&n) {
		out = append(out, n.grantable())
	}
	return out
}

func (s *Set) namesHost(n *Need) bool {
	return slices.ContainsFunc(s.list, func(p Permission) bool { return p.rule == ruleDomain && p.covers(n) })
}

// grantable is the narrowest permission for n that can be written: a resource
// that is not text or too long is left out.
func (n Need) grantable() string {
	text := n.String()
	if utf8.ValidString(text) {
		if _, err := Parse(text); err == nil {
			return text
		}
	}
	n.Resource = ""
	return n.String()
}

// Explain says in one line whether the set allows n and which permission
// decided it; for a refusal what it found and what would have to be added.
func (s Set) Explain(n Need) string {
	if i := s.find(&n); i >= 0 {
		return fmt.Sprintf("allowed: %s by %s", n.quoted(), s.list[i].text)
	}
	var found []string
	for i := range s.list {
		if s.list[i].Capability() == n.Capability {
			found = append(found, s.list[i].text)
		}
	}
	have := fmt.Sprintf("no permission for %s was granted", n.Capability)
	switch {
	case s.domains && n.Capability == HTTP && !s.MayEver(n):
		have = "http:domain only narrows http:request, which was not granted"
	case len(found) > 8:
		have = fmt.Sprintf("not covered by any of %s and %d more", strings.Join(found[:8], ", "), len(found)-8)
	case len(found) > 0:
		have = "not covered by " + strings.Join(found, ", ")
	}
	if missing := s.Missing(n); len(missing) > 0 {
		have += "; it takes " + strings.Join(missing, " and ")
	}
	return fmt.Sprintf("denied: %s: %s", n.quoted(), have)
}

// quoted is the need's text, with quotes when it is not plain.
func (n Need) quoted() string {
	text := n.String()
	for i := range len(text) {
		if text[i] <= ' ' || text[i] >= 0x7f || text[i] == '"' {
			return fmt.Sprintf("%q", text)
		}
	}
	return text
}
