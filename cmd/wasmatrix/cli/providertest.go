package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// probeBucket is where a test of a key-value provider leaves nothing behind.
	probeBucket = "wasmatrix-provider-test"
	// probeTTL lets the provider remove what a test that was cut off leaves.
	probeTTL = time.Minute
	// probeSubject begins the subjects of tests of messaging providers.
	probeSubject = "wasmatrix.provider.test."
	// noOperation is the name of an operation that no external provider has.
	noOperation = "wasmatrix.provider.test"
	// probePatience is how long a published message may take.
	probePatience = 10 * time.Second
)

// probeFlags are what a test needs to be told by type.
type probeFlags struct{ url, operation, data string }

func (a *app) newProviderTest() *cobra.Command {
	var pf probeFlags
	cmd := &cobra.Command{
		Use: "test NAME", Short: "make a round trip through a provider, and tell how long each step took",
		Long: `Uses a provider as a user, on the path that a guest's call takes: of kv it writes,
reads and removes a key in a bucket of its own; of messaging it listens to a
subject of its own and publishes to it; of http it requests --url; of external it
calls --operation, or without it names the operations that there are.`,
		Example: `  wasmatrix provider test kv
  wasmatrix provider test web --url https://example.com/
  wasmatrix provider test billing --operation charge -d '{"cents":1}'`,
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			now, err := c.GetProvider(cmd.Context(), &pb.GetProviderRequest{ProviderId: args[0]})
			if err != nil {
				return err
			}
			p := &providerProbe{app: a, client: c, id: args[0], kind: now.GetProvider().GetSpec().GetType()}
			if err := p.run(cmd.Context(), pf); err != nil {
				return err
			}
			return p.print()
		}),
	}
	f := cmd.Flags()
	f.StringVar(&pf.url, "url", "", "of http: what to request")
	f.StringVar(&pf.operation, "operation", "", "of external: what to call")
	f.StringVarP(&pf.data, "data", "d", "", "of external: the input, TEXT, @FILE or - for standard input")
	return cmd
}

// providerProbe is one test of a provider.
type providerProbe struct {
	app      *app
	client   *client.Client
	id, kind string
	steps    []probeStep
}

// probeStep is one step that went well.
type probeStep struct {
	name, found string
	took        time.Duration
}

// step runs one step and notes how long it took; do returns what to tell of it.
func (p *providerProbe) step(name string, do func() (string, error)) error {
	began := p.app.env.Now()
	found, err := do()
	if err != nil {
		return err
	}
	p.steps = append(p.steps, probeStep{name: name, found: found, took: p.app.env.Now().Sub(began)})
	return nil
}

func (p *providerProbe) run(ctx context.Context, pf probeFlags) error {
	switch p.kind {
	case "kv":
		return p.kv(ctx)
	case "messaging":
		return p.messaging(ctx)
	case "http":
		if pf.url == "" {
			return &usageError{err: errors.New("a provider of type http is tested with a request"), next: "wasmatrix provider test " + p.id + " --url URL"}
		}
		return p.http(ctx, pf.url)
	case "external":
		return p.external(ctx, pf)
	default:
		return usagef("this wasmatrix cannot test a provider of type %q", p.kind)
	}
}

// wrong is a provider that answers and not with what it was given.
func (p *providerProbe) wrong(format string, args ...any) error {
	return fail(exitFailed, verdict("provider %s %s", p.id, fmt.Sprintf(format, args...)).Next("wasmatrix provider get %s", p.id))
}

func (p *providerProbe) kv(ctx context.Context) error {
	key, value := []byte(uuid.NewString()), []byte(uuid.NewString())
	to := func(operation string) *pb.CallProviderRequest {
		return &pb.CallProviderRequest{ProviderId: p.id, Capability: "kv", Operation: operation, Bucket: probeBucket}
	}
	err := p.step("set", func() (string, error) {
		req := &pb.KvSetRequest{Key: key, Value: value, TtlMs: uint64(probeTTL.Milliseconds())}
		return size(uint64(len(value))), callProvider(ctx, p.client, to("set"), req, &pb.KvSetResponse{})
	})
	if err != nil {
		return err
	}
	get := func(there bool) func() (string, error) {
		return func() (string, error) {
			resp := &pb.KvGetResponse{}
			if err := callProvider(ctx, p.client, to("get"), &pb.KvGetRequest{Key: key}, resp); err != nil {
				return "", err
			}
			if resp.GetFound() != there || there && !bytes.Equal(resp.GetValue(), value) {
				return "", p.wrong("gave another value than was set")
			}
			if !there {
				return "gone", nil
			}
			return "the same value", nil
		}
	}
	if err := p.step("get", get(true)); err != nil {
		return err
	}
	err = p.step("delete", func() (string, error) {
		resp := &pb.KvDeleteResponse{}
		if err := callProvider(ctx, p.client, to("delete"), &pb.KvDeleteRequest{Key: key}, resp); err != nil {
			return "", err
		}
		if !resp.GetExisted() {
			return "", p.wrong("did not find the key to delete")
		}
		return "removed", nil
	})
	if err != nil {
		return err
	}
	return p.step("get", get(false))
}

func (p *providerProbe) messaging(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	subject, payload := probeSubject+uuid.NewString(), []byte(uuid.NewString())
	began := p.app.env.Now()
	for m, err := range p.client.SubscribeMessages(ctx, &pb.SubscribeMessagesRequest{ProviderId: p.id, Subject: subject}) {
		switch {
		case err != nil && ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded):
			return apierror.New(pb.ErrorCode_ERROR_CODE_TIMEOUT, "no message came from provider %s within %s", p.id, probePatience).
				Next("wasmatrix provider get %s", p.id)
		case err != nil:
			return err
		case m.GetMessage() == nil:
			p.steps = append(p.steps, probeStep{name: "subscribe", found: subject, took: p.app.env.Now().Sub(began)})
			began = p.app.env.Now()
			err := p.step("publish", func() (string, error) {
				to := &pb.CallProviderRequest{ProviderId: p.id, Capability: "messaging", Operation: "publish"}
				resp := &pb.MsgPublishResponse{}
				err := callProvider(ctx, p.client, to, &pb.MsgPublishRequest{Subject: subject, Payload: payload}, resp)
				if n := resp.GetSequence(); n > 0 {
					return fmt.Sprintf("stored, number %d", n), err
				}
				return size(uint64(len(payload))), err
			})
			if err != nil {
				return err
			}
		case !bytes.Equal(m.GetMessage().GetPayload(), payload):
			return p.wrong("delivered another message than was published")
		default:
			p.steps = append(p.steps, probeStep{name: "receive", found: "the same message", took: p.app.env.Now().Sub(began)})
			return nil
		}
	}
	return apierror.New(pb.ErrorCode_ERROR_CODE_COMMUNICATION_FAILURE, "provider %s ended the subscription", p.id).Next("wasmatrix provider get %s", p.id)
}

func (p *providerProbe) http(ctx context.Context, url string) error {
	return p.step("GET", func() (string, error) {
		to := &pb.CallProviderRequest{ProviderId: p.id, Capability: "http", Operation: "request"}
		resp := &pb.HttpResponse{}
		if err := callProvider(ctx, p.client, to, &pb.HttpRequest{Method: "GET", Url: url}, resp); err != nil {
			return "", err
		}
		return fmt.Sprintf("status %d, %s, %s", resp.GetStatus(), size(uint64(len(resp.GetBody()))), cleanLine(resp.GetUrl())), nil
	})
}

func (p *providerProbe) external(ctx context.Context, pf probeFlags) error {
	input, err := p.app.dataFlag("--data", pf.data, maxPayload)
	if err != nil {
		return err
	}
	call := func(operation string) ([]byte, error) {
		to := &pb.CallProviderRequest{ProviderId: p.id, Capability: "provider", Operation: "call"}
		resp := &pb.ProviderCallResponse{}
		err := callProvider(ctx, p.client, to, &pb.ProviderCallRequest{Provider: p.id, Operation: operation, Payload: input}, resp)
		return resp.GetPayload(), err
	}
	if pf.operation == "" {
		return p.step("operations", func() (string, error) {
			// Asked for one that it has not, it names those that it has.
			_, err := call(noOperation)
			if offered := apierror.From(err).Detail("operations"); err != nil && offered != "" {
				return offered, nil
			}
			return "", err
		})
	}
	return p.step(pf.operation, func() (string, error) {
		out, err := call(pf.operation)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s: %s", size(uint64(len(out))), printable(out)), nil
	})
}

func (p *providerProbe) print() error {
	var list []any
	for _, s := range p.steps {
		list = append(list, map[string]any{"step": s.name, "result": s.found, "microseconds": s.took.Microseconds()})
	}
	m, err := structpb.NewStruct(map[string]any{"provider": p.id, "type": p.kind, "steps": list})
	if err != nil {
		return err
	}
	return p.app.print(result{message: m, names: []string{p.id}, table: func(w io.Writer) {
		t := table{head: []string{"STEP", "TOOK", "RESULT"}}
		for _, s := range p.steps {
			t.row(s.name, fmt.Sprintf("%.1f ms", float64(s.took.Microseconds())/1000), s.found)
		}
		t.write(w)
	}})
}
