package messaging

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

func TestNeed(t *testing.T) {
	k, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	many := make([]*pb.MessageHeader, MaxHeaders+1)
	for i := range many {
		many[i] = &pb.MessageHeader{Name: "a"}
	}
	headed := func(name, value string) proto.Message {
		return &pb.MsgPublishRequest{Subject: "a", Headers: []*pb.MessageHeader{{Name: name, Value: value}}}
	}
	for name, c := range map[string]struct {
		operation string
		req       proto.Message
		want      permission.Need // zero: ErrInvalid
	}{
		"publish":                  {opPublish, &pb.MsgPublishRequest{Provider: "p", Subject: "a.b", Payload: []byte("x")}, need("publish", "a.b")},
		"the largest message":      {opPublish, &pb.MsgPublishRequest{Subject: strings.Repeat("s", MaxSubject), Payload: make([]byte, MaxPayload), Headers: many[1:]}, need("publish", strings.Repeat("s", MaxSubject))},
		"request":                  {opRequest, &pb.MsgRequestRequest{Subject: "a.ö", TimeoutMs: 7}, need("publish", "a.ö")},
		"subscribe":                {opSubscribe, &pb.MsgSubscribeRequest{Subject: "a.*.>"}, need("subscribe", "a.*.>")},
		"unsubscribe":              {opUnsubscribe, &pb.MsgUnsubscribeRequest{Subject: ">"}, need("subscribe", ">")},
		"a header":                 {opPublish, headed("X-Trace:"[:7], "1 2"), need("publish", "a")},
		"no subject":               {opPublish, &pb.MsgPublishRequest{}, permission.Need{}},
		"publish to *":             {opPublish, &pb.MsgPublishRequest{Subject: "a.*"}, permission.Need{}},
		"request to >":             {opRequest, &pb.MsgRequestRequest{Subject: "a.>"}, permission.Need{}},
		"a wildcard in a token":    {opSubscribe, &pb.MsgSubscribeRequest{Subject: "a.b*"}, permission.Need{}},
		"> before the end":         {opSubscribe, &pb.MsgSubscribeRequest{Subject: "a.>.b"}, permission.Need{}},
		"an empty token":           {opSubscribe, &pb.MsgSubscribeRequest{Subject: "a..b"}, permission.Need{}},
		"a dot at the end":         {opPublish, &pb.MsgPublishRequest{Subject: "a."}, permission.Need{}},
		"a dot at the start":       {opPublish, &pb.MsgPublishRequest{Subject: ".a"}, permission.Need{}},
		"a space":                  {opPublish, &pb.MsgPublishRequest{Subject: "a b"}, permission.Need{}},
		"a line end":               {opPublish, &pb.MsgPublishRequest{Subject: "a\r\nPUB x"}, permission.Need{}},
		"a long subject":           {opPublish, &pb.MsgPublishRequest{Subject: strings.Repeat("s", MaxSubject+1)}, permission.Need{}},
		"$SYS":                     {opPublish, &pb.MsgPublishRequest{Subject: "$SYS.REQ.SERVER.PING"}, permission.Need{}},
		"$JS":                      {opRequest, &pb.MsgRequestRequest{Subject: "$JS.API.STREAM.LIST"}, permission.Need{}},
		"subscribe to $JS":         {opSubscribe, &pb.MsgSubscribeRequest{Subject: "$JS.>"}, permission.Need{}},
		"_INBOX":                   {opSubscribe, &pb.MsgSubscribeRequest{Subject: "_INBOX.>"}, permission.Need{}},
		"another's reply":          {opPublish, &pb.MsgPublishRequest{Subject: "_INBOX.x"}, permission.Need{}},
		"a large payload":          {opPublish, &pb.MsgPublishRequest{Subject: "a", Payload: make([]byte, MaxPayload+1)}, permission.Need{}},
		"many headers":             {opPublish, &pb.MsgPublishRequest{Subject: "a", Headers: many}, permission.Need{}},
		"Nats- header":             {opPublish, headed("nats-Msg-Id", "1"), permission.Need{}},
		"Wasmatrix- header":        {opPublish, headed("Wasmatrix-Timeout", "1"), permission.Need{}},
		"a status of the server":   {opPublish, headed("Status", "404"), permission.Need{}},
		"a header without name":    {opPublish, headed("", "1"), permission.Need{}},
		"a header of two lines":    {opPublish, headed("a", "1\r\nNats-Rollup: all"), permission.Need{}},
		"a header with a colon":    {opPublish, headed("a:b", "1"), permission.Need{}},
		"a header that is trimmed": {opPublish, headed("a", " 1"), permission.Need{}},
		"a long header":            {opPublish, headed("a", strings.Repeat("v", MaxHeaderValue+1)), permission.Need{}},
		"an unknown operation":     {"purge", &pb.MsgPublishRequest{Subject: "a"}, permission.Need{}},
	} {
		t.Run(name, func(t *testing.T) {
			payload, err := proto.Marshal(c.req)
			if err != nil {
				t.Fatal(err)
			}
			got, err := k.Demand(c.operation, payload)
			if c.want == (permission.Need{}) {
				if !errors.Is(err, provider.ErrInvalid) {
					t.Errorf("got %v, %v", got, err)
				}
				return
			}
			if err != nil || got.Need != c.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

// A grant with wildcards covers a subscription token by token, never by prefix.
func TestWildcardsAreCoveredTokenByToken(t *testing.T) {
	for _, c := range []struct {
		grant, asked string
		want         bool
	}{
		{"msg:subscribe:a.*", "a.b", true},
		{"msg:subscribe:a.*", "a.*", true},
		{"msg:subscribe:a.*", "a.>", false},
		{"msg:subscribe:a.*", "*.b", false},
		{"msg:subscribe:a.>", "a.*.>", true},
		{"msg:subscribe:a.>", ">", false},
		{"msg:subscribe:a.>", "ab.c", false},
		{"msg:subscribe:*", ">", false},
		{"msg:publish:a.>", "a.b", false},
	} {
		set, err := permission.ParseSet([]string{c.grant})
		if err != nil {
			t.Fatal(err)
		}
		if _, got := set.Allows(need("subscribe", c.asked)); got != c.want {
			t.Errorf("%s covers %s: %t", c.grant, c.asked, got)
		}
	}
}

func TestOverlap(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"a", "a", true},
		{"a", "b", false},
		{"a.*", "*.b", true},
		{"a.>", "a", false},
		{"a.>", "*.b.c", true},
		{">", "x.y", true},
		{"a.*", "a.b.c", false},
		{"a.b", "a.b.c", false},
	} {
		if overlap(c.a, c.b) != c.want || overlap(c.b, c.a) != c.want {
			t.Errorf("%s and %s: not %t", c.a, c.b, c.want)
		}
	}
}

// decode means what proto.Unmarshal means, on any bytes.
func TestDecodeAgreesWithProto(t *testing.T) {
	text := rapid.StringN(0, 5, -1)
	rapid.Check(t, func(t *rapid.T) {
		want := &pb.MsgRequestRequest{Provider: text.Draw(t, "provider"), Subject: text.Draw(t, "subject"), TimeoutMs: rapid.Uint32().Draw(t, "timeout")}
		if rapid.Bool().Draw(t, "payload") {
			want.Payload = []byte{1, 2}
		}
		for range rapid.IntRange(0, 3).Draw(t, "headers") {
			want.Headers = append(want.Headers, &pb.MessageHeader{Name: text.Draw(t, "name"), Value: text.Draw(t, "value")})
		}
		b, err := proto.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(0, 3).Draw(t, "damages") {
			if len(b) > 0 {
				b[rapid.IntRange(0, len(b)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
			}
		}
		got, err := decode(opRequest, b)
		want = &pb.MsgRequestRequest{}
		wantErr := proto.Unmarshal(b, want)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("decode: %v, proto: %v", err, wantErr)
		}
		if err != nil {
			return
		}
		same := string(got.provider) == want.GetProvider() && string(got.subject) == want.GetSubject() &&
			string(got.payload) == string(want.GetPayload()) && got.timeout == want.GetTimeoutMs() && len(got.headers) == len(want.GetHeaders())
		for i, h := range want.GetHeaders() {
			same = same && string(got.headers[i].name) == h.GetName() && string(got.headers[i].value) == h.GetValue()
		}
		if !same {
			t.Fatalf("decode: %+v, proto: %v", got, want)
		}
	})
}

func TestSettings(t *testing.T) {
	for name, c := range map[string]struct {
		driver   string
		settings map[string]string
		want     string // part of the error; empty for none
	}{
		"nothing":              {"", nil, ""},
		"embedded":             {"embedded", map[string]string{"max_in_flight": "8", "max_pending": "9", "max_deliver": "0", "backoff": "1s", "max_backoff": "2s"}, ""},
		"durable":              {"embedded", map[string]string{"durable": "true", "max_bytes": "64MiB", "max_age": "1h", "ack_wait": "5s", "fsync": "false"}, ""},
		"nats":                 {"nats", map[string]string{"url": "nats://a:4222, tls://b", "prefix": "prod.x"}, ""},
		"nats durable":         {"nats", map[string]string{"url": "nats://a", "durable": "true", "subjects": "a.>, b", "stream": "s_1", "stream_replicas": "3"}, ""},
		"a prefix will do":     {"nats", map[string]string{"url": "nats://a", "durable": "true", "prefix": "p"}, ""},
		"driver":               {"kafka", nil, "expected embedded or nats"},
		"unknown":              {"", map[string]string{"url": "nats://a"}, "has no setting url; expected"},
		"misspelt":             {"nats", map[string]string{"url": "nats://a", "max_inflight": "1"}, "max_inflight"},
		"for durable only":     {"", map[string]string{"max_bytes": "1GiB"}, "with durable=true only"},
		"no url":               {"nats", nil, "needs the setting url"},
		"a wrong url":          {"nats", map[string]string{"url": "http://a"}, "nats://HOST:PORT"},
		"a password":           {"nats", map[string]string{"url": "nats://u:secret@a"}, "password_file"},
		"a secret anywhere":    {"nats", map[string]string{"url": "nats://b,http://secret@a:x:y/%zz"}, "password_file"},
		"user alone":           {"nats", map[string]string{"url": "nats://a", "username": "u"}, "both of username and password_file"},
		"certificate alone":    {"nats", map[string]string{"url": "nats://a", "tls_cert_file": "c"}, "both of tls_cert_file and tls_key_file"},
		"no such file":         {"nats", map[string]string{"url": "nats://a", "tls_ca_file": "/nowhere"}, "tls_ca_file of messaging driver nats: stat /nowhere"},
		"neither":              {"nats", map[string]string{"url": "nats://a", "durable": "true"}, "needs the setting subjects or prefix"},
		"all there is":         {"nats", map[string]string{"url": "nats://a", "durable": "true", "subjects": ">"}, "no wildcard"},
		"reserved subjects":    {"nats", map[string]string{"url": "nats://a", "durable": "true", "subjects": "$JS.>"}, "reserved"},
		"a prefix of NATS":     {"nats", map[string]string{"url": "nats://a", "prefix": "$SYS"}, "prefix"},
		"a number":             {"", map[string]string{"max_in_flight": "0"}, "a number from 1 to 4096"},
		"a duration":           {"", map[string]string{"backoff": "10"}, "a duration from"},
		"a size":               {"", map[string]string{"durable": "true", "max_bytes": "1KiB"}, "a size from 1MiB to 1024TiB"},
		"a choice":             {"", map[string]string{"durable": "yes"}, "true or false"},
		"fsync of another":     {"nats", map[string]string{"url": "nats://a", "durable": "true", "prefix": "p", "fsync": "true"}, "has no setting fsync"},
		"stream":               {"nats", map[string]string{"url": "nats://a", "durable": "true", "prefix": "p", "stream": "a.b"}, "stream"},
		"replicas of a stream": {"nats", map[string]string{"url": "nats://a", "durable": "true", "prefix": "p", "stream_replicas": "9"}, "a number from 1 to 5"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readOptions(provider.Config{ID: "bus", Driver: c.driver, Settings: c.settings, Dir: "/d"})
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, provider.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, expected %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Error("the error tells the password")
			}
		})
	}
}
