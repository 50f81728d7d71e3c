package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/correlation"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// server is the state behind the interceptors of one gRPC server.
type server struct {
	logger       *slog.Logger
	validator    protovalidate.Validator
	validatorErr error
	metrics      *metrics
}

func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	c := s.begin(ctx, info.FullMethod)
	// Only a call without a transport cannot take a header, and that one has no caller either.
	_ = grpc.SetHeader(ctx, metadata.Pairs(correlation.Header, correlation.ID(c.ctx)))
	defer func() {
		err = c.end(err, recover())
		if err != nil {
			resp = nil
		}
		s.metrics.duration.WithLabelValues(c.method).Observe(time.Since(c.start).Seconds())
	}()
	if err := c.authenticate(); err != nil {
		return nil, err
	}
	if err := s.validate(req); err != nil {
		return nil, err
	}
	return next(c.ctx, req)
}

func (s *server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	c := s.begin(ss.Context(), info.FullMethod)
	_ = ss.SetHeader(metadata.Pairs(correlation.Header, correlation.ID(c.ctx)))
	defer func() { err = c.end(err, recover()) }()
	if err := c.authenticate(); err != nil {
		return err
	}
	return next(srv, &serverStream{ServerStream: ss, ctx: c.ctx, validate: s.validate})
}

// call is one call under way.
type call struct {
	server *server
	ctx    context.Context //nolint:containedctx // a call ends before its context does
	method string
	start  time.Time
}

func (s *server) begin(ctx context.Context, fullMethod string) *call {
	id := ""
	if sent := metadata.ValueFromIncomingContext(ctx, correlation.Header); len(sent) > 0 {
		id = sent[0]
	}
	return &call{
		server: s,
		ctx:    correlation.With(ctx, id),
		method: strings.TrimPrefix(strings.TrimPrefix(fullMethod, "/"), "wasmatrix.v1."),
		start:  time.Now(),
	}
}

func (c *call) authenticate() error {
	ctx, err := identity.Authenticate(c.ctx)
	if err == nil {
		c.ctx = ctx
	}
	return err
}

// end turns what the call came to into what leaves the server, counts it and logs it.
func (c *call) end(err error, panicked any) error {
	if panicked != nil {
		c.server.logger.ErrorContext(c.ctx, "handler panicked", "method", c.method, "panic", fmt.Sprint(panicked),
			"correlation_id", correlation.ID(c.ctx), "stack", string(debug.Stack()))
		err = apierror.New(pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR, "%s failed by a defect of wasmatrix", c.method).
			Next("report it with the server's log lines of this correlation id")
	}
	code := "OK"
	if err != nil {
		err = outgoing(c.ctx, err)
		code = strings.TrimPrefix(apierror.CodeOf(err).String(), "ERROR_CODE_")
	}
	c.server.metrics.requests.WithLabelValues(c.method, code).Inc()
	c.log(code, err)
	return err
}

func (c *call) log(code string, err error) {
	level := slog.LevelDebug
	switch {
	case apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_INTERNAL_ERROR:
		level = slog.LevelError
	case err != nil && !errors.Is(c.ctx.Err(), context.Canceled):
		level = slog.LevelInfo
	}
	if !c.server.logger.Enabled(c.ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", c.method),
		slog.String("code", code),
		slog.Duration("duration", time.Since(c.start)),
		slog.String("correlation_id", correlation.ID(c.ctx)),
	}
	if caller, ok := identity.Caller(c.ctx); ok {
		attrs = append(attrs, slog.String("caller", caller.String()))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", apierror.From(err).Error()))
	}
	c.server.logger.LogAttrs(c.ctx, level, "api call", attrs...)
}

// outgoing returns err as a gRPC status that carries a complete pb.Error. A
// plain gRPC status keeps its own code, because the standard services and old
// clients tell by it what happened.
func outgoing(ctx context.Context, err error) error {
	full := apierror.From(err).Proto(ctx)
	code := apierror.GRPCCode(full.GetCode())
	if plain, ok := status.FromError(err); ok && len(plain.Details()) == 0 {
		code = plain.Code()
	}
	st := status.New(code, full.GetMessage())
	if detailed, detailErr := st.WithDetails(full); detailErr == nil {
		st = detailed
	}
	return st.Err()
}

// serverStream hands the call's context to the handler and checks what it receives.
type serverStream struct {
	grpc.ServerStream
	ctx      context.Context //nolint:containedctx // a gRPC stream hands out its context by a method
	validate func(any) error
}

// Context returns the context of the call.
func (s *serverStream) Context() context.Context { return s.ctx }

// RecvMsg receives the next message; one that breaks the rules is an error.
func (s *serverStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.validate(m)
}

// validate checks req against the rules in the proto files and returns
// INVALID_REQUEST with one detail a violated field.
func (s *server) validate(req any) error {
	msg, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	if s.validatorErr != nil {
		return fmt.Errorf("build the validator of requests: %w", s.validatorErr)
	}
	err := s.validator.Validate(msg)
	if err == nil {
		return nil
	}
	var invalid *protovalidate.ValidationError
	if !errors.As(err, &invalid) || len(invalid.Violations) == 0 {
		return fmt.Errorf("validate %s: %w", msg.ProtoReflect().Descriptor().Name(), err)
	}
	return refusal(invalid)
}

func refusal(invalid *protovalidate.ValidationError) error {
	first := invalid.Violations[0]
	text := violationText(first)
	if field := fieldOf(first); field != "" {
		text = field + ": " + text
	}
	if more := len(invalid.Violations) - 1; more > 0 {
		text += fmt.Sprintf(" (and %d more)", more)
	}
	out := apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "invalid request: %s", text)
	for _, v := range invalid.Violations {
		field := fieldOf(v)
		if field == "" {
			field = "request"
		}
		detail := violationText(v)
		if before := out.Detail(field); before != "" {
			detail = before + "; " + detail
		}
		out = out.With(field, detail)
	}
	return out
}

func fieldOf(v *protovalidate.Violation) string {
	return protovalidate.FieldPathString(v.Proto.GetField())
}

func violationText(v *protovalidate.Violation) string {
	if m := v.Proto.GetMessage(); m != "" {
		return m
	}
	return "breaks the rule " + v.Proto.GetRuleId()
}
