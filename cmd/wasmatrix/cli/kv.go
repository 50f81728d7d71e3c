package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxValue is the largest value that a key-value provider takes.
const maxValue = 1 << 20

// kvFlags say which bucket of which provider is meant.
type kvFlags struct{ provider, bucket string }

func (a *app) newKV() *cobra.Command {
	var kf kvFlags
	cmd := &cobra.Command{
		Use: "kv", Short: "read and write keys of a key-value provider",
		Long: `Reads and writes keys as a user, through the same path a guest's call takes. A
workload's own bucket is named after it.`,
		Example: "  wasmatrix kv put greeting hello --bucket hello\n  wasmatrix kv list --bucket hello",
	}
	cmd.PersistentFlags().StringVar(&kf.provider, "provider", "", "provider (default: the only one of type kv)")
	cmd.PersistentFlags().StringVar(&kf.bucket, "bucket", "default", "bucket")
	cmd.AddCommand(a.newKVGet(&kf), a.newKVPut(&kf), a.newKVDelete(&kf), a.newKVList(&kf))
	return cmd
}

// call calls an operation of the chosen provider.
func (k *kvFlags) call(ctx context.Context, c *client.Client, operation string, req, resp proto.Message) (err error) {
	if k.provider, err = onlyProvider(ctx, c, "kv:read", k.provider); err != nil {
		return err
	}
	return callProvider(ctx, c, &pb.CallProviderRequest{ProviderId: k.provider, Capability: "kv", Operation: operation, Bucket: k.bucket}, req, resp)
}

func (a *app) newKVGet(kf *kvFlags) *cobra.Command {
	return &cobra.Command{
		Use: "get KEY", Short: "print the value of a key; exit code 3 when there is none", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			resp := &pb.KvGetResponse{}
			if err := kf.call(cmd.Context(), c, "get", &pb.KvGetRequest{Key: []byte(args[0])}, resp); err != nil {
				return err
			}
			if !resp.GetFound() {
				return fail(exitNotFound, verdict("there is no key %q", args[0]).
					With("provider", kf.provider).With("bucket", kf.bucket).Next("wasmatrix kv list --provider %s --bucket %s", kf.provider, kf.bucket))
			}
			return a.print(result{message: resp, names: args, table: func(w io.Writer) { a.raw(w, resp.GetValue()) }})
		}),
	}
}

func (a *app) newKVPut(kf *kvFlags) *cobra.Command {
	var ttl time.Duration
	var version uint64
	cmd := &cobra.Command{
		Use: "put KEY TEXT|@FILE|-", Short: "store a value", Args: cobra.ExactArgs(2), Aliases: []string{"set"},
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			value, err := a.dataFlag("the value", args[1], maxValue)
			if err != nil {
				return err
			}
			if ttl < 0 || ttl > 0 && ttl < time.Millisecond {
				return usagef("--ttl %s: want at least 1ms", ttl)
			}
			key, ms := []byte(args[0]), uint64(ttl.Milliseconds())
			if cmd.Flags().Changed("if-version") {
				resp := &pb.KvCasResponse{}
				err := kf.call(cmd.Context(), c, "cas", &pb.KvCasRequest{Key: key, Value: value, ExpectedVersion: version, TtlMs: ms}, resp)
				if err != nil {
					return err
				}
				if !resp.GetSwapped() {
					return apierror.New(pb.ErrorCode_ERROR_CODE_CONFLICT, "key %q is not at version %d", args[0], version).
						With("version", fmt.Sprint(resp.GetVersion())).Next("wasmatrix kv get %s -o json", args[0])
				}
				return a.print(result{message: resp, names: args[:1], table: stored(args[0], resp.GetVersion())})
			}
			resp := &pb.KvSetResponse{}
			if err := kf.call(cmd.Context(), c, "set", &pb.KvSetRequest{Key: key, Value: value, TtlMs: ms}, resp); err != nil {
				return err
			}
			return a.print(result{message: resp, names: args[:1], table: stored(args[0], resp.GetVersion())})
		}),
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "time after which the key vanishes (default: never)")
	cmd.Flags().Uint64Var(&version, "if-version", 0, "store only if the key is at this version; 0: only if it does not exist")
	return cmd
}

func stored(key string, version uint64) func(io.Writer) {
	return func(w io.Writer) { fmt.Fprintf(w, "%s stored, version %d\n", key, version) }
}

func (a *app) newKVDelete(kf *kvFlags) *cobra.Command {
	return &cobra.Command{
		Use: "del KEY...", Aliases: []string{"delete", "rm"}, Short: "remove keys", Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			for _, key := range args {
				resp := &pb.KvDeleteResponse{}
				if err := kf.call(cmd.Context(), c, "delete", &pb.KvDeleteRequest{Key: []byte(key)}, resp); err != nil {
					return err
				}
				line := key + " removed"
				if !resp.GetExisted() {
					line = key + " did not exist"
				}
				if err := a.printLine(resp, key, line); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

func (a *app) newKVList(kf *kvFlags) *cobra.Command {
	var keysOnly bool
	var limit int
	cmd := &cobra.Command{
		Use: "list [PREFIX]", Aliases: []string{"ls"}, Short: "list keys in byte order, all or those with a prefix", Args: cobra.MaximumNArgs(1),
		RunE: a.withClient(func(cmd *cobra.Command, c *client.Client, args []string) error {
			req := &pb.KvListRequest{Limit: pageSize, KeysOnly: keysOnly}
			if len(args) == 1 {
				req.Prefix = []byte(args[0])
			}
			all := &pb.KvListResponse{}
			for {
				page := &pb.KvListResponse{}
				if err := kf.call(cmd.Context(), c, "list", req, page); err != nil {
					return err
				}
				all.Entries = append(all.Entries, page.GetEntries()...)
				req.Cursor = page.GetNextCursor()
				if limit > 0 && len(all.GetEntries()) >= limit {
					all.Entries, all.NextCursor = all.Entries[:limit], req.GetCursor()
					break
				}
				if len(req.GetCursor()) == 0 {
					break
				}
			}
			return a.print(result{message: all, names: keysOf(all), table: func(w io.Writer) { kvTable(w, all, keysOnly) }})
		}),
	}
	cmd.Flags().BoolVar(&keysOnly, "keys-only", false, "leave the values out")
	cmd.Flags().IntVar(&limit, "limit", 0, "list at most this many (default: all)")
	return cmd
}

func keysOf(list *pb.KvListResponse) []string {
	var out []string
	for _, e := range list.GetEntries() {
		out = append(out, string(e.GetKey()))
	}
	return out
}

func kvTable(w io.Writer, list *pb.KvListResponse, keysOnly bool) {
	if len(list.GetEntries()) == 0 {
		fmt.Fprintln(w, "no keys")
		return
	}
	t := table{head: []string{"KEY", "VERSION", "SIZE", "VALUE"}}
	if keysOnly {
		t.head = t.head[:2]
	}
	for _, e := range list.GetEntries() {
		if keysOnly {
			t.row(printable(e.GetKey()), fmt.Sprint(e.GetVersion()))
			continue
		}
		t.row(printable(e.GetKey()), fmt.Sprint(e.GetVersion()), size(uint64(len(e.GetValue()))), printable(e.GetValue()))
	}
	t.write(w)
}

// printable shows the beginning of any bytes on one line.
func printable(data []byte) string {
	const most = 60
	text := fmt.Sprintf("%q", data)
	text = text[1 : len(text)-1]
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most-1]) + "…"
	}
	return text
}
