package apierror_test

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// TestEveryCodeHasAnOutcome: no failure of a write leaves its caller guessing.
func TestEveryCodeHasAnOutcome(t *testing.T) {
	certain := 0
	for number, name := range pb.ErrorCode_name {
		e := apierror.From(apierror.OfWrite(t.Context(), apierror.New(pb.ErrorCode(number), "x"), "r"))
		switch e.Detail(apierror.DetailOutcome) {
		case apierror.OutcomeFailed:
			certain++
		case apierror.OutcomeUnknown:
		default:
			t.Errorf("%s: outcome %q", name, e.Detail(apierror.DetailOutcome))
		}
		if e.Detail(apierror.DetailRequestID) != "r" {
			t.Errorf("%s: no request id", name)
		}
	}
	if certain != 9 {
		t.Errorf("%d codes are certain without a word of the server", certain)
	}
	for _, err := range []error{context.DeadlineExceeded, errors.New("x"), status.Error(codes.Unavailable, "x"), status.Error(codes.Canceled, "x")} {
		if e := apierror.From(apierror.OfWrite(t.Context(), err, "")); e.Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown {
			t.Errorf("%v: %v", err, e.Proto(t.Context()))
		}
	}
	if apierror.OfWrite(t.Context(), nil, "r") != nil {
		t.Error("no error became one")
	}
	known := apierror.New(pb.ErrorCode_ERROR_CODE_NO_LEADER, "x").With(apierror.DetailOutcome, apierror.OutcomeFailed)
	if got := apierror.OfWrite(t.Context(), known, "r"); apierror.From(got).Detail(apierror.DetailOutcome) != apierror.OutcomeFailed {
		t.Errorf("what the server said was changed: %v", got)
	}
	if known.Detail(apierror.DetailRequestID) != "" {
		t.Error("the error that was given was changed")
	}
}

// TestAttempts: doubt stays until the state itself has answered.
func TestAttempts(t *testing.T) {
	of := func(outcome, index string) error {
		e := apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "x").With(apierror.DetailOutcome, outcome)
		if index != "" {
			e = e.With(apierror.DetailIndex, index)
		}
		return e
	}
	failed, unknown, answer := of(apierror.OutcomeFailed, ""), of(apierror.OutcomeUnknown, ""), of(apierror.OutcomeFailed, "7")
	for name, c := range map[string]struct {
		attempts []error
		want     string
	}{
		"one failed":             {[]error{failed}, apierror.OutcomeFailed},
		"one unknown":            {[]error{unknown}, apierror.OutcomeUnknown},
		"unknown, then failed":   {[]error{unknown, failed}, apierror.OutcomeUnknown},
		"failed, then unknown":   {[]error{failed, unknown}, apierror.OutcomeUnknown},
		"unknown, then answered": {[]error{unknown, failed, answer}, apierror.OutcomeFailed},
	} {
		var a apierror.Attempts
		for _, err := range c.attempts {
			a.Note(err)
		}
		a.Note(nil)
		got := a.Conclude(t.Context(), c.attempts[len(c.attempts)-1], "r")
		if e := apierror.From(got); e.Detail(apierror.DetailOutcome) != c.want || a.Doubtful() != (c.want == apierror.OutcomeUnknown) {
			t.Errorf("%s: got %v", name, e.Proto(t.Context()))
		}
	}
}
