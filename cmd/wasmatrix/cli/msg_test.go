package cli

import (
	"context"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestPublishAndRequest(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("bus", "messaging", 0), newProvider("kv", "kv", 0)}
	if got := b.want("msg", "pub", "a.b", "-d", "text", "--header", "k=v=w", "--header", "k=2"); got != "a.b published\n" {
		t.Errorf("pub: %q", got)
	}
	m := b.fake.published[0]
	if m.GetSubject() != "a.b" || string(m.GetPayload()) != "text" || len(m.GetHeaders()) != 2 || m.GetHeaders()[0].GetValue() != "v=w" {
		t.Errorf("published %v", m)
	}
	b.in, b.fake.sequence = "piped\x00", 9
	if got := b.want("msg", "pub", "a.b", "-d", "-"); got != "a.b stored, number 9\n" || string(b.fake.published[1].GetPayload()) != b.in {
		t.Errorf("pub of standard input: %q, %v", got, b.fake.published[1])
	}
	if got := b.want("msg", "request", "a.b", "-d", "text", "--timeout", "1500ms"); got != "text after 1500 ms" {
		t.Errorf("request: %q", got)
	}
	if got := b.want("msg", "request", "a.b", "-d", "x", "--header", "k=v", "-o", "json"); !strings.Contains(got, `"name": "k"`) {
		t.Errorf("request as json: %q", got)
	}
	if req := request[*pb.CallProviderRequest](b.fake); req.GetProviderId() != "bus" || req.GetCapability() != "messaging" || req.GetOperation() != "request" {
		t.Errorf("request is %v", req)
	}
	for _, args := range [][]string{{"pub", "a", "--header", "k"}, {"pub"}, {"request", "a", "--timeout", "1h"}, {"sub"}} {
		if code, _, stderr := b.run(append([]string{"msg"}, args...)...); code != 2 {
			t.Errorf("%v: exit %d\n%s", args, code, stderr)
		}
	}
	b.fake.fail["CallProvider"] = apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "nobody replied")
	if code, _, stderr := b.run("msg", "request", "a.b"); code != 7 || !strings.Contains(stderr, "nobody replied") {
		t.Errorf("no reply: exit %d\n%s", code, stderr)
	}
	b.fake.providers = b.fake.providers[1:]
	if code, _, stderr := b.run("msg", "pub", "a"); code != 3 || !strings.Contains(stderr, "wasmatrix provider register NAME --type messaging") {
		t.Errorf("no provider: exit %d\n%s", code, stderr)
	}
}

func TestSubscribePrintsMessagesAsTheyCome(t *testing.T) {
	b := newBench(t)
	b.fake.providers = []*pb.Provider{newProvider("bus", "messaging", 0)}
	// The third of those sent together says that one was left out.
	b.fake.listening = func() {
		b.fake.change(0, "", func() {
			for _, subject := range []string{"a.b", "a.c", "a.d"} {
				b.fake.published = append(b.fake.published, &pb.Message{
					Subject: subject, Payload: []byte("x\x1b"), Headers: []*pb.MessageHeader{{Name: "k", Value: "v"}},
				})
			}
		})
	}
	code, stdout, stderr := b.run("msg", "sub", ">", "--count", "3")
	if code != 0 || stdout != "a.b | x\\x1b k=v\na.c | x\\x1b k=v\na.d | x\\x1b k=v\n" {
		t.Errorf("exit %d, %q\n%s", code, stdout, stderr)
	}
	if stderr != "listening to > on bus\n1 message left out: they came too fast\n" {
		t.Errorf("standard error: %q", stderr)
	}
	code, stdout, _ = b.run("msg", "sub", "a.c", "--count", "1", "-o", "json")
	if code != 0 || !strings.HasPrefix(stdout, `{"subject":"a.c","payload":"eBs=",`) || strings.Count(stdout, "\n") != 1 {
		t.Errorf("json: exit %d, %q", code, stdout)
	}
	ctx, cancel := context.WithCancel(t.Context())
	b.fake.listening = cancel
	if code, _, stderr := b.runIn(ctx, "msg", "sub", "zzz"); code != 0 {
		t.Errorf("Ctrl-C ends listening with exit %d\n%s", code, stderr)
	}
}
