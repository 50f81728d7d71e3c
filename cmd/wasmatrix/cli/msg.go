package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	// maxMessage is the largest content of a message.
	maxMessage = 1 << 20
	// maxReplyWait is the longest wait for a reply that a request can ask for.
	maxReplyWait = 10 * time.Minute
	// replySlack is what the way to the provider and back may take besides.
	replySlack = 10 * time.Second
)

// msgFlags say which provider is meant.
type msgFlags struct{ provider string }

func (a *app) newMsg() *cobra.Command {
	var mf msgFlags
	cmd := &cobra.Command{
		Use: "msg", Short: "publish and receive messages of a messaging provider",
		Long: `Publishes and receives messages as a user, through the same path a guest's call
takes. Who listens here gets a copy; the workloads that are subscribed get each
message all the same.`,
		Example: `  wasmatrix msg sub 'orders.>'
  wasmatrix msg pub orders.created -d '{"id":"17","item":"tea","quantity":2}'
  wasmatrix msg request orders.created -d @order.json`,
	}
	cmd.PersistentFlags().StringVar(&mf.provider, "provider", "", "provider (default: the only one of type messaging)")
	cmd.AddCommand(a.newMsgPub(&mf), a.newMsgSub(&mf), a.newMsgRequest(&mf))
	return cmd
}

// messageHeaders reads NAME=VALUE flags; a name may come more than once.
func messageHeaders(texts []string) ([]*pb.MessageHeader, error) {
	var out []*pb.MessageHeader
	for _, text := range texts {
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			return nil, usagef("--header %q: want NAME=VALUE", text)
		}
		out = append(out, &pb.MessageHeader{Name: name, Value: value})
	}
	return out, nil
}

// messageFlags are the content of a message.
type messageFlags struct {
	data    string
	headers []string
}

func (f *messageFlags) bind(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.data, "data", "d", "", "content: TEXT, @FILE or - for standard input")
	cmd.Flags().StringArrayVar(&f.headers, "header", nil, "header field, NAME=VALUE (repeatable)")
}

func (f *messageFlags) read(a *app) ([]byte, []*pb.MessageHeader, error) {
	headers, err := messageHeaders(f.headers)
	if err != nil {
		return nil, nil, err
	}
	payload, err := a.dataFlag("--data", f.data, maxMessage)
	return payload, headers, err
}

// call calls an operation of the chosen provider.
func (m *msgFlags) to(ctx context.Context, c *client.Client, operation string) (to *pb.CallProviderRequest, err error) {
	if m.provider, err = onlyProvider(ctx, c, "msg:publish", m.provider); err != nil {
		return nil, err
	}
	return &pb.CallProviderRequest{ProviderId: m.provider, Capability: "messaging", Operation: operation}, nil
}

func (a *app) newMsgPub(mf *msgFlags) *cobra.Command {
	var content messageFlags
	cmd := &cobra.Command{
		Use: "pub SUBJECT", Aliases: []string{"publish"}, Short: "publish a message", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			payload, headers, err := content.read(a)
			if err != nil {
				return err
			}
			to, err := mf.to(cmd.Context(), c, "publish")
			if err != nil {
				return err
			}
			resp := &pb.MsgPublishResponse{}
			if err := callProvider(cmd.Context(), c, to, &pb.MsgPublishRequest{Subject: args[0], Payload: payload, Headers: headers}, resp); err != nil {
				return err
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) {
				if n := resp.GetSequence(); n > 0 {
					fmt.Fprintf(w, "%s stored, number %d\n", cleanLine(args[0]), n)
					return
				}
				fmt.Fprintf(w, "%s published\n", cleanLine(args[0]))
			}})
		}),
	}
	content.bind(cmd)
	return cmd
}

func (a *app) newMsgRequest(mf *msgFlags) *cobra.Command {
	var content messageFlags
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "request SUBJECT", Aliases: []string{"req"}, Short: "publish a message and print the reply to it", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			if wait < time.Millisecond || wait > maxReplyWait {
				return usagef("--timeout %s: want 1ms to %s", wait, maxReplyWait)
			}
			payload, headers, err := content.read(a)
			if err != nil {
				return err
			}
			to, err := mf.to(cmd.Context(), c, "request")
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), wait+replySlack)
			defer cancel()
			resp := &pb.MsgRequestResponse{}
			req := &pb.MsgRequestRequest{Subject: args[0], Payload: payload, Headers: headers, TimeoutMs: uint32(wait.Milliseconds())}
			if err := callProvider(ctx, c, to, req, resp); err != nil {
				return err
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) { a.raw(w, resp.GetPayload()) }})
		}),
	}
	content.bind(cmd)
	cmd.Flags().DurationVar(&wait, "timeout", 5*time.Second, "how long to wait for the reply")
	return cmd
}

func (a *app) newMsgSub(mf *msgFlags) *cobra.Command {
	var count uint64
	cmd := &cobra.Command{
		Use: "sub SUBJECT", Aliases: []string{"subscribe"}, Short: "print messages as they are published, until Ctrl-C",
		Long: `Prints a copy of each message that is published to the subject from now on; "*"
stands for one token and ">" at the end for the rest. Workloads that are
subscribed get them all the same. Messages that come faster than they can be
printed are left out; how many is told on standard error.`,
		Example: "  wasmatrix msg sub 'orders.>'\n  wasmatrix msg sub orders.stored --count 1 -o json",
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			id, err := onlyProvider(cmd.Context(), c, "msg:subscribe", mf.provider)
			if err != nil {
				return err
			}
			return a.listen(cmd.Context(), c, id, args[0], count)
		}),
	}
	cmd.Flags().Uint64Var(&count, "count", 0, "end after this many messages (default: never)")
	return cmd
}

func (a *app) listen(ctx context.Context, c *client.Client, id, subject string, count uint64) error {
	seen, stands := uint64(0), false
	for m, err := range c.SubscribeMessages(ctx, &pb.SubscribeMessagesRequest{ProviderId: id, Subject: subject}) {
		if err != nil {
			return quietly(err)
		}
		if n := m.GetDropped(); n > 0 {
			fmt.Fprintf(a.env.Stderr, "%s left out: they came too fast\n", plural(int(n), "message"))
		}
		if m.GetMessage() == nil {
			word := "listening"
			if stands {
				word = "messages may be missing: the connection broke; listening again"
			}
			stands = true
			fmt.Fprintf(a.env.Stderr, "%s to %s on %s\n", word, cleanLine(subject), id)
			continue
		}
		if err := a.printLine(m.GetMessage(), m.GetMessage().GetSubject(), messageLine(m.GetMessage())); err != nil {
			return err
		}
		if seen++; seen == count {
			return nil
		}
	}
	return nil
}

func messageLine(m *pb.Message) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s | %s", cleanLine(m.GetSubject()), cleanLine(string(m.GetPayload())))
	for _, h := range m.GetHeaders() {
		fmt.Fprintf(&b, " %s=%s", cleanLine(h.GetName()), cleanLine(h.GetValue()))
	}
	return b.String()
}
