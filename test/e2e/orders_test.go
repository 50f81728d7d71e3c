package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// ordersManifest is that of the example, with the module where this build has it.
func ordersManifest(t *testing.T, c *harness.Cluster) string {
	t.Helper()
	const example = "../../guest/go/examples/orders/orders.yaml"
	raw, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	const module = "module: ../../../../build/guests/orders.wasm"
	if !strings.Contains(text, module) {
		t.Fatalf("%s does not say %q", example, module)
	}
	path := filepath.Join(t.TempDir(), "orders.yaml")
	text = strings.Replace(text, module, "module: "+filepath.Join(c.Guests, "orders.wasm"), 1)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func anOrder(n int) string { return fmt.Sprintf(`{"id":"%03d","item":"tea","quantity":%d}`, n, n+1) }

// TestOrders runs the example on two nodes with the providers on a third: a
// subscription by the manifest, messages to either replica, keys, and messages back.
func TestOrders(t *testing.T) {
	c := harness.Start(t, dev.Options{Nodes: 3, Adjust: func(i int, cfg *node.Config) {
		if i == 1 {
			cfg.Limits.Memory = "1MiB" // the providers' node has no room for instances
		}
	}})
	apply := c.CLI("apply", "-f", ordersManifest(t, c), "-o", "json", "--wait-timeout", "3m")
	if apply.Code != 0 || !strings.Contains(apply.Stdout, `"n2"`) || !strings.Contains(apply.Stdout, `"n3"`) {
		t.Fatalf("apply: %+v, want one replica on n2 and one on n3", apply)
	}
	if out := c.CLI("provider", "get", "bus"); !strings.Contains(out.Stdout, "SUBSCRIPTIONS") || strings.Count(out.Stdout, "orders.created\n") != 2 {
		t.Errorf("the subscriptions of the manifest are not shown: %+v", out)
	}

	announced := make(chan harness.Output, 1)
	go func() { announced <- c.CLI("msg", "sub", "orders.stored", "--count", "3") }()
	orders := 0
	var heard harness.Output
	err := harness.Until(c.Context(30*time.Second), "msg sub to hear of three orders", func(context.Context) error {
		select {
		case heard = <-announced:
			return nil
		default:
		}
		// Its subscription stands at some time or other: what was before is not heard.
		if out := c.CLI("msg", "pub", "orders.created", "-d", anOrder(orders)); out.Code != 0 || out.Stdout != "orders.created published\n" {
			t.Fatalf("pub: %+v", out)
		}
		orders++
		return errors.New("not yet")
	})
	if err != nil {
		t.Fatal(err)
	}
	if heard.Code != 0 || strings.Count(heard.Stdout, "\n") != 3 || !strings.HasPrefix(heard.Stdout, `orders.stored | {"id":"`) {
		t.Errorf("msg sub: %+v", heard)
	}

	// A request is answered by whichever replica takes it, and a second time alike.
	for range 6 {
		want := anOrder(orders)
		for range 2 {
			if out := c.CLI("msg", "request", "orders.created", "-d", want); out.Code != 0 || out.Stdout != want {
				t.Fatalf("request: %+v", out)
			}
		}
		orders++
	}
	for _, bad := range []string{"nonsense", strings.Replace(anOrder(0), "tea", "salt", 1)} {
		if out := c.CLI("msg", "request", "orders.created", "-d", bad); out.Code != 4 || !strings.Contains(out.Stderr, "refused") {
			t.Errorf("an order that must be rejected: %+v", out)
		}
	}
	if out := c.CLI("msg", "request", "orders.nobody", "-d", "x"); out.Code != 7 || !strings.Contains(out.Stderr, "nobody listens") {
		t.Errorf("a request to nobody: %+v", out)
	}

	var want strings.Builder
	for n := range orders {
		want.WriteString(anOrder(n) + "\n")
	}
	err = harness.Until(c.Context(30*time.Second), "all orders to be in the book", func(ctx context.Context) error {
		resp, err := c.Client.Invoke(ctx, &pb.InvokeRequest{Target: "orders"})
		if err == nil && string(resp.GetPayload()) != want.String() {
			err = fmt.Errorf("%d orders were sent, the book is\n%s", orders, resp.GetPayload())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if out := c.CLI("kv", "list", "orders/", "--bucket", "orders", "-o", "name"); strings.Count(out.Stdout, "\n") != orders {
		t.Errorf("%d orders were sent, the keys are %+v", orders, out)
	}

	// A subscription counts only while a permission covers it.
	if out := c.CLI("revoke", "orders", "msg:subscribe:orders.created"); out.Code != 0 {
		t.Fatalf("revoke: %+v", out)
	}
	err = harness.Until(c.Context(10*time.Second), "the subscription to end", func(context.Context) error {
		if out := c.CLI("msg", "request", "orders.created", "-d", anOrder(orders), "--timeout", "1s"); out.Code != 7 {
			return fmt.Errorf("a request gave %+v", out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if out := c.CLI("grant", "orders", "msg:subscribe:orders.*"); out.Code != 0 {
		t.Fatalf("grant: %+v", out)
	}
	err = harness.Until(c.Context(10*time.Second), "the subscription to stand again", func(context.Context) error {
		if out := c.CLI("msg", "request", "orders.created", "-d", anOrder(orders), "--timeout", "1s"); out.Code != 0 {
			return fmt.Errorf("a request gave %+v", out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
