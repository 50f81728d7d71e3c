package permission

import (
	"fmt"
	"strings"
)

// synonyms are words that people write for an action, by capability.
var synonyms = map[string]map[string]string{
	"kv": {
		"get": Read, "list": Read, "scan": Read, "set": Write, "put": Write, "cas": Write,
		"del": Delete, "remove": Delete, "rw": Write, "*": Read,
	},
	"http": {
		"get": Request, "post": Request, "put": Request, "fetch": Request, "call": Request,
		"host": "domain", "hosts": "domain", "domains": "domain", "*": Request,
	},
	"msg": {
		"pub": Publish, "send": Publish, "request": Publish, "sub": Subscribe, "receive": Subscribe,
		"unsubscribe": Subscribe, "*": Publish,
	},
}

func unknownAction(capability, action, rest string, colon bool, known ...string) *SyntaxError {
	last := len(known) - 1
	problem := &SyntaxError{Reason: fmt.Sprintf("action %q of %s is unknown; expected %s or %s",
		action, capability, strings.Join(known[:last], ", "), known[last])}
	meant, ok := synonyms[capability][strings.ToLower(action)]
	if !ok {
		meant = nearest(action, known)
	}
	if meant == "" {
		return problem
	}
	suggestion := capability + ":" + meant
	if colon {
		suggestion += ":" + rest
	}
	problem.Suggestion = suggestion
	return problem
}

// capabilityWords are words that people write for a capability.
var capabilityWords = map[string]string{
	"messaging": "msg", "message": "msg", "messages": "msg", "nats": "msg", "https": "http", "keyvalue": "kv",
}

func guessCapability(capability, rest string) string {
	meant := capabilityWords[strings.ToLower(capability)]
	if meant == "" {
		meant = nearest(capability, []string{"kv", "http", "msg", "provider"})
	}
	if meant == "" {
		return ""
	}
	return meant + ":" + rest
}

func guessSubject(action, subject string) string {
	fixed := strings.Trim(strings.TrimSpace(subject), ".")
	if fixed == subject {
		return ""
	}
	return "msg:" + action + ":" + fixed
}

// nearest returns the candidate within two edits of word, or "".
func nearest(word string, candidates []string) string {
	best, bestDistance := "", 3
	if len(word) > 16 {
		return ""
	}
	for _, c := range candidates {
		if d := distance(strings.ToLower(strings.TrimSpace(word)), c); d < bestDistance && d < len(c) {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is the optimal string alignment distance: insertions, deletions,
// substitutions and swaps of neighbours.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
