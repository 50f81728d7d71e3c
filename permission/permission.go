package permission

import (
	"strings"
)

// The capabilities that a Need names. A permission spells messaging "msg".
const (
	KV        = "kv"
	HTTP      = "http"
	Messaging = "messaging"
	Provider  = "provider"
)

// The actions of the built-in capabilities.
const (
	Read      = "read"
	Write     = "write"
	Delete    = "delete"
	Request   = "request"
	Publish   = "publish"
	Subscribe = "subscribe"
)

// MaxLength is the longest permission in bytes.
const MaxLength = 512

// Need is what one capability call asks for.
type Need struct {
	// Capability is "kv", "http", "messaging" or "provider".
	Capability string
	// Action is what the grammar names: "read", "write", "delete", "request",
	// "publish", "subscribe", or an external provider's operation.
	Action string
	// Resource is the key, host or topic; for "provider" the provider's id. For
	// a listing it is the prefix that is listed. A host is in lower case,
	// without a final dot, an IP address in its canonical form (IPv6 in
	// brackets), and ends in ":port"; without a port only rules without one
	// cover it.
	Resource string
}

// rule is what a permission is about.
type rule uint8

const (
	ruleNone rule = iota // the zero Permission, which covers nothing
	ruleKV
	ruleRequest
	ruleDomain
	rulePublish
	ruleSubscribe
	ruleProvider
)

// Permission is one parsed permission. It is immutable and comparable; the zero
// Permission covers nothing.
type Permission struct {
	text     string
	rule     rule
	action   string // what a Need's Action must be; "*" of a provider rule is any
	resource string // key prefix, subject pattern or provider id; "" is any
	host     hostRule
}

// String returns the permission exactly as it was parsed.
func (p Permission) String() string { return p.text }

// Capability returns the capability that the permission is for, as a Need names
// it: "kv", "http", "messaging" or "provider".
func (p Permission) Capability() string {
	switch p.rule {
	case ruleKV:
		return KV
	case ruleRequest, ruleDomain:
		return HTTP
	case rulePublish, ruleSubscribe:
		return Messaging
	case ruleProvider:
		return Provider
	default:
		return ""
	}
}

// Covers reports whether the permission's own rule matches n. For http that is
// not the whole decision: http:request is always needed, and http:domain
// narrows it; Set.Allows decides over all permissions together.
func (p Permission) Covers(n Need) bool { return p.covers(&n) }

func (p *Permission) covers(n *Need) bool {
	if p.rule == ruleNone || !p.about(n.Capability, n.Action) {
		return false
	}
	switch p.rule {
	case ruleKV:
		return strings.HasPrefix(n.Resource, p.resource)
	case ruleRequest:
		return true
	case ruleDomain:
		return p.host.covers(n.Resource)
	case rulePublish:
		if p.resource == "" {
			return n.Resource == "" || literalSubject(n.Resource)
		}
		return literalSubject(n.Resource) && coversLiteral(p.resource, n.Resource)
	case ruleSubscribe:
		if p.resource == "" {
			return n.Resource == "" || wellFormed(n.Resource)
		}
		return coversSubject(p.resource, n.Resource)
	default:
		return p.resource == n.Resource
	}
}

// about reports whether the permission is for this capability and action,
// whatever the resource.
func (p *Permission) about(capability, action string) bool {
	switch p.rule {
	case ruleKV:
		return capability == KV && action == p.action
	case ruleRequest, ruleDomain:
		return capability == HTTP && action == Request
	case rulePublish, ruleSubscribe:
		return capability == Messaging && action == p.action
	case ruleProvider:
		return capability == Provider && action != "" && (p.action == "*" || p.action == action)
	default:
		return false
	}
}

// String returns the need as the narrowest permission that covers it, for
// messages: "kv:read:orders/17". An HTTP need is written as its http:domain
// rule, which http:request must accompany.
func (n Need) String() string {
	var head string
	switch n.Capability {
	case HTTP:
		if n.Resource == "" {
			return HTTP + ":" + n.Action
		}
		return "http:domain:" + n.Resource
	case Provider:
		return Provider + ":" + orAny(n.Resource) + ":" + orAny(n.Action)
	case Messaging:
		head = "msg:" + n.Action
	default:
		head = n.Capability + ":" + n.Action
	}
	if n.Resource == "" {
		return head
	}
	return head + ":" + n.Resource
}

func orAny(s string) string {
	if s == "" {
		return "*"
	}
	return s
}
