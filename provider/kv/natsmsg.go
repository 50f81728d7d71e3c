package kv

import (
	"encoding/base32"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/wasmatrix/wasmatrix/provider"
)

// The stream of a namespace holds one message of each subject, the last:
//
//	$WASMATRIX.KV.NAMESPACE.k.BUCKET.KEY   a key's value, or that it was deleted
//	$WASMATRIX.KV.NAMESPACE.m.INSTANCE     an instance's newest mark
//	$WASMATRIX.KV.NAMESPACE.t.ID           the rest of a value that is too large for one message
//
// Names are in base32hex, which holds no dot; so no two of them are the same
// subject. The header natsHeader says what a message means:
//
//	k   "set EXPIRES TAIL" with TAIL the id of the rest or "-"; or "deleted"
//	m   "mark CREATED GENERATION"
//	t   "tail"
const (
	natsHeader   = "Wasmatrix-Kv"
	natsMsgID    = "Nats-Msg-Id"
	natsLastSeq  = "Nats-Expected-Last-Sequence"
	natsLastID   = "Nats-Expected-Last-Msg-Id"
	natsSize     = "Nats-Msg-Size"
	natsNoTail   = "-"
	natsOverhead = 1024 // an upper bound of the headers of a message
)

func natsNames() *base32.Encoding {
	return base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)
}

func natsName(raw string) string { return natsNames().EncodeToString([]byte(raw)) }

// natsSubjects makes and reads the subjects of a namespace.
type natsSubjects struct{ head string }

func newNatsSubjects(namespace string) natsSubjects {
	return natsSubjects{head: "$WASMATRIX.KV." + namespace + "."}
}

func (s natsSubjects) all() string { return s.head + ">" }

func (s natsSubjects) key(bucket, key string) string {
	return s.head + "k." + natsName(bucket) + "." + natsName(key)
}

func (s natsSubjects) mark(instance string) string { return s.head + "m." + natsName(instance) }

func (s natsSubjects) tail(id string) string { return s.head + "t." + natsName(id) }

// natsChange is what a message of the stream says.
type natsChange struct {
	entry *natsEntry // of a key that was set or deleted

	instance string // of a mark
	mark     provider.Mark

	tail string // the id of a tail
}

// natsEntry is what is known of one key without its value.
type natsEntry struct {
	bucket, key string
	sequence    uint64 // the version
	expires     int64
	size        int // of the value; 0 where it has a tail
	tail        string
	deleted     bool
	stored      int64 // when, in nanoseconds since 1970
}

func (e *natsEntry) alive(now int64) bool {
	return !e.deleted && (e.expires == 0 || e.expires > now)
}

// describe returns the header that says what the entry is.
func (e *natsEntry) describe() string {
	if e.deleted {
		return "deleted"
	}
	tail := e.tail
	if tail == "" {
		tail = natsNoTail
	}
	return fmt.Sprintf("set %d %s", e.expires, tail)
}

// describe fills in what a header says of a key.
func (e *natsEntry) parse(header string) bool {
	if header == "deleted" {
		e.deleted = true
		return true
	}
	words := strings.Split(header, " ")
	if len(words) != 3 || words[0] != "set" {
		return false
	}
	expires, err := strconv.ParseInt(words[1], 10, 64)
	if err != nil || expires < 0 {
		return false
	}
	e.expires = expires
	if words[2] != natsNoTail {
		e.tail = words[2]
	}
	return true
}

// read reads a message by its subject and headers. It reports false for one that
// is none of ours.
func (s natsSubjects) read(subject string, header nats.Header) (natsChange, bool) {
	rest, ours := strings.CutPrefix(subject, s.head)
	if !ours {
		return natsChange{}, false
	}
	var names []string
	tokens := strings.Split(rest, ".")
	for _, token := range tokens[1:] {
		raw, err := natsNames().DecodeString(token)
		if err != nil || natsName(string(raw)) != token {
			return natsChange{}, false
		}
		names = append(names, string(raw))
	}
	says := header.Get(natsHeader)
	switch {
	case tokens[0] == "k" && len(names) == 2:
		e := &natsEntry{bucket: names[0], key: names[1]}
		e.size, _ = strconv.Atoi(header.Get(natsSize))
		if !e.parse(says) {
			return natsChange{}, false
		}
		return natsChange{entry: e}, true
	case tokens[0] == "m" && len(names) == 1:
		c := natsChange{instance: names[0]}
		_, err := fmt.Sscanf(says, "mark %d %d", &c.mark.Created, &c.mark.Generation)
		return c, err == nil
	case tokens[0] == "t" && len(names) == 1 && says == "tail":
		return natsChange{tail: names[0]}, true
	default:
		return natsChange{}, false
	}
}
