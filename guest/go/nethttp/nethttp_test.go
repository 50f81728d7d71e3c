package nethttp

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
)

func TestClientFollowsRedirectsStepByStep(t *testing.T) {
	var asked []wasmatrix.HTTPRequest
	transport := Transport{do: func(r wasmatrix.HTTPRequest) (wasmatrix.HTTPResponse, error) {
		asked = append(asked, r)
		if r.URL == "http://h/from" {
			return wasmatrix.HTTPResponse{Status: 302, Headers: []wasmatrix.Header{{Name: "location", Value: "/to"}}}, nil
		}
		return wasmatrix.HTTPResponse{Status: 200, Headers: []wasmatrix.Header{{Name: "x-a", Value: "1"}, {Name: "X-A", Value: "2"}}, Body: []byte("there")}, nil
	}}
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	resp, err := client.Post("http://h/from", "text/plain", strings.NewReader("sent"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "there" || resp.StatusCode != http.StatusOK || resp.Status != "200 OK" || resp.Request.URL.Path != "/to" {
		t.Errorf("got %s %q at %s, %v", resp.Status, body, resp.Request.URL, err)
	}
	if got := resp.Header["X-A"]; !reflect.DeepEqual(got, []string{"1", "2"}) {
		t.Errorf("header fields %v", resp.Header)
	}
	if len(asked) != 2 || asked[0].Method != http.MethodPost || string(asked[0].Body) != "sent" || asked[1].Method != http.MethodGet || asked[1].URL != "http://h/to" {
		t.Fatalf("the provider was asked for %+v", asked)
	}
	for _, r := range asked {
		if !r.NoRedirects || r.Timeout <= 0 || r.Timeout > time.Minute {
			t.Errorf("%s %s: redirects are the client's, and its deadline is the time-out: %+v", r.Method, r.URL, r)
		}
	}
	if wasmatrix.HeaderValue(asked[0].Headers, "content-type") != "text/plain" {
		t.Errorf("header fields of the request: %v", asked[0].Headers)
	}
}

func TestFailuresReachTheCaller(t *testing.T) {
	refused := wasmatrix.Errorf(wasmatrix.PermissionDenied, "no")
	client := &http.Client{Transport: Transport{do: func(wasmatrix.HTTPRequest) (wasmatrix.HTTPResponse, error) {
		return wasmatrix.HTTPResponse{}, refused
	}}}
	if _, err := client.Get("http://h/"); wasmatrix.CodeOf(err) != wasmatrix.PermissionDenied {
		t.Errorf("a refused request: %v", err)
	}
	refused = wasmatrix.Errorf(wasmatrix.Timeout, "too long")
	_, err := client.Get("http://h/")
	var asURL *url.Error
	if !errors.As(err, &asURL) || !asURL.Timeout() || wasmatrix.CodeOf(err) != wasmatrix.Timeout {
		t.Errorf("a request that took too long: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://h/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Do(req); !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was cancelled before: %v", err)
	}
	// The zero value uses the host, which there is none of here.
	if _, err := (&http.Client{Transport: Transport{}}).Get("http://h/"); wasmatrix.CodeOf(err) != wasmatrix.Unavailable {
		t.Errorf("without a host: %v", err)
	}
}
