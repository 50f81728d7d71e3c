// Probe is a guest for tests: it makes every call of the SDK once, with every
// field set, and answers with what came back, so that a test can compare both
// with the messages of wasmatrix.v1.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/invoke"
	"github.com/wasmatrix/wasmatrix/guest/go/message"
)

func init() {
	invoke.Handle(probe)
	message.Handle(handle)
}

func main() {}

func headers() []wasmatrix.Header {
	return []wasmatrix.Header{{Name: "A", Value: "1"}, {Name: "a", Value: "2"}, {Name: "Empty"}}
}

// got is what one call gave.
type got struct {
	Value  any
	Code   wasmatrix.Code
	Error  string
	Detail map[string]string
}

func probe(req invoke.Request) (invoke.Response, error) {
	value, err := calls(string(req.Payload))
	g := got{Value: value, Code: wasmatrix.CodeOf(err)}
	var own *wasmatrix.Error
	if errors.As(err, &own) {
		g.Detail = own.Details
	}
	if err != nil {
		g.Error = err.Error()
	}
	if string(req.Payload) == "refuse" {
		return invoke.Response{}, fmt.Errorf("around: %w", &wasmatrix.Error{Code: wasmatrix.Conflict, Message: "no", Details: map[string]string{"why": "told"}})
	}
	out, err := json.Marshal(g)
	return invoke.Response{Payload: out, ContentType: req.ContentType + req.Target}, err
}

func calls(name string) (any, error) {
	kv := wasmatrix.KV{Provider: "p"}
	web := wasmatrix.HTTP{Provider: "p"}
	bus := wasmatrix.Messaging{Provider: "p"}
	switch name {
	case "kv get":
		value, version, err := kv.Get("k")
		return []any{value, version}, err
	case "kv set":
		return kv.Set("k", []byte("v"), 1500*time.Microsecond)
	case "kv delete":
		return kv.Delete("k")
	case "kv cas":
		swapped, version, err := kv.CompareAndSet("k", 7, []byte("v"), time.Second)
		return []any{swapped, version}, err
	case "kv list":
		return kv.List("k", wasmatrix.ListOptions{Limit: 3, Cursor: []byte("c"), KeysOnly: true})
	case "http get":
		return web.Get("http://h/")
	case "http post":
		return web.Post("http://h/", "text/plain", []byte("b"))
	case "http request":
		return web.Do(wasmatrix.HTTPRequest{
			Method: "PATCH", URL: "http://h/", Headers: headers(), Body: []byte("b"), Timeout: 2 * time.Second, MaxResponseBytes: 99, NoRedirects: true,
		})
	case "messaging publish":
		return bus.Publish("s", []byte("b"), headers()...)
	case "messaging request":
		return bus.Request("s", []byte("b"), 3*time.Second, headers()...)
	case "messaging subscribe":
		return nil, bus.Subscribe("s.*")
	case "messaging unsubscribe":
		return bus.Unsubscribe("s.*")
	case "provider call":
		return wasmatrix.External{Provider: "p"}.Call("op", []byte("b"))
	case "log write":
		wasmatrix.Logger().With("a", 1).WithGroup("g").Warn("text", "b", 2)
		return nil, nil
	case "context get":
		return wasmatrix.CurrentContext()
	default:
		return nil, wasmatrix.Errorf(wasmatrix.InvalidRequest, "there is no call %q", name)
	}
}

// handle gives the verdict that the payload names, and replies with what it saw.
func handle(m *message.Message) error {
	saw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	m.Reply(saw)
	switch string(m.Payload) {
	case "reject":
		return fmt.Errorf("around: %w", message.Reject("never"))
	case "retry":
		return message.Retry(1500*time.Millisecond, errors.New("later"))
	case "fail":
		return wasmatrix.Errorf(wasmatrix.Unavailable, "no store")
	default:
		return nil
	}
}
