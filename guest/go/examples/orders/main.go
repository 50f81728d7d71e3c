// Orders keeps a book of orders. A message on orders.created is an order; it is
// stored under orders/<id> and then announced on orders.stored. A call lists the
// book, one order a line.
//
// A message may be delivered more than once, to any replica, and a replica may
// end between any two steps. So the order's id decides: the first order of an id
// is stored, the same order again is only announced again, and another order
// with an id that is taken is rejected.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/invoke"
	"github.com/wasmatrix/wasmatrix/guest/go/message"
)

const (
	prefix  = "orders/"
	stored  = "orders.stored"
	maxItem = 200
	// maxID keeps ids within what a key may have.
	maxID = 64
)

// order is what customers send.
type order struct {
	ID       string `json:"id"`
	Item     string `json:"item"`
	Quantity int    `json:"quantity"`
}

func init() {
	message.Handle(take)
	invoke.Handle(list)
}

func main() {}

// take handles one message on orders.created.
func take(m *message.Message) error {
	o, err := parse(m.Payload)
	if err != nil {
		wasmatrix.Logger().Warn("rejected", "subject", m.Subject, "reason", err.Error())
		return message.Reject("malformed order: %w", err)
	}
	record, err := json.Marshal(o)
	if err != nil {
		return message.Reject("order %s: %w", o.ID, err)
	}
	if err := store(o.ID, record); err != nil {
		return err
	}
	var bus wasmatrix.Messaging
	if _, err := bus.Publish(stored, record); err != nil {
		// The order is in the book; with the next delivery it is announced.
		return fmt.Errorf("announce order %s: %w", o.ID, err)
	}
	wasmatrix.Logger().Info("stored", "order", o.ID, "delivery", m.Delivery)
	m.Reply(record)
	return nil
}

// store writes an order once.
func store(id string, record []byte) error {
	var kv wasmatrix.KV
	done, _, err := kv.CompareAndSet(prefix+id, 0, record, 0)
	if err != nil || done {
		return err
	}
	there, _, err := kv.Get(prefix + id)
	if errors.Is(err, wasmatrix.ErrNotFound) {
		return fmt.Errorf("order %s: it was there and is not any more", id) // again
	}
	if err != nil {
		return err
	}
	if !bytes.Equal(there, record) {
		return message.Reject("order %s: another order has this id", id)
	}
	return nil
}

func parse(payload []byte) (o order, err error) {
	strict := json.NewDecoder(bytes.NewReader(payload))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&o); err != nil {
		return o, err
	}
	switch {
	case strict.More():
		return o, errors.New("more than one order in a message")
	case o.ID == "" || len(o.ID) > maxID || strings.ContainsAny(o.ID, "/ \t\n"):
		return o, fmt.Errorf("id %q: want 1 to %d bytes without slashes and spaces", o.ID, maxID)
	case o.Item == "" || len(o.Item) > maxItem:
		return o, fmt.Errorf("item: want 1 to %d bytes", maxItem)
	case o.Quantity < 1:
		return o, fmt.Errorf("quantity %d: want 1 or more", o.Quantity)
	}
	return o, nil
}

// list answers with all orders, each as JSON on a line of its own.
func list(invoke.Request) (invoke.Response, error) {
	var kv wasmatrix.KV
	resp := invoke.Response{ContentType: "application/jsonl"}
	opt := wasmatrix.ListOptions{Limit: 1000}
	for {
		page, err := kv.List(prefix, opt)
		if err != nil {
			return invoke.Response{}, fmt.Errorf("list the orders: %w", err)
		}
		for _, e := range page.Entries {
			resp.Payload = append(append(resp.Payload, e.Value...), '\n')
		}
		if opt.Cursor = page.Cursor; len(opt.Cursor) == 0 {
			return resp, nil
		}
	}
}
