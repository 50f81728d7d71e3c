// Greeter fetches a greeting over HTTP and passes it on. The URL is what it is
// called with, or GREETING_URL of its environment; its permissions say which
// hosts it may reach.
package main

import (
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/invoke"
)

// What is fetched is a line of text: more is a mistake, and so is a long wait.
const (
	maxGreeting = 64 << 10
	patience    = 5 * time.Second
)

func init() { invoke.Handle(greet) }

func main() {}

func greet(req invoke.Request) (invoke.Response, error) {
	target := strings.TrimSpace(string(req.Payload))
	if target == "" {
		target = os.Getenv("GREETING_URL")
	}
	if target == "" {
		return invoke.Response{}, wasmatrix.Errorf(wasmatrix.InvalidRequest, "no URL: call with one, or set GREETING_URL")
	}
	text, host, err := fetch(target)
	if err != nil {
		return invoke.Response{}, err
	}
	wasmatrix.Logger().Info("greeted", "host", host, "bytes", len(text))
	return invoke.Response{
		Payload:     fmt.Appendf(nil, "%s says: %s\n", host, text),
		ContentType: "text/plain; charset=utf-8",
	}, nil
}

// fetch returns the text at target and the host that answered in the end.
func fetch(target string) (text, host string, err error) {
	var web wasmatrix.HTTP
	resp, err := web.Do(wasmatrix.HTTPRequest{
		URL: target, Headers: []wasmatrix.Header{{Name: "Accept", Value: "text/plain"}},
		Timeout: patience, MaxResponseBytes: maxGreeting,
	})
	if err != nil {
		return "", "", fmt.Errorf("fetch a greeting: %w", err)
	}
	if resp.Status != 200 {
		return "", "", wasmatrix.Errorf(wasmatrix.CommunicationFailure, "fetch a greeting: %s answered with status %d", target, resp.Status)
	}
	from, err := url.Parse(resp.URL)
	if err != nil {
		return "", "", fmt.Errorf("fetch a greeting: %w", err)
	}
	return strings.TrimSpace(string(resp.Body)), from.Host, nil
}
