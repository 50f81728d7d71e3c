//go:build !wasip1

package wasmatrix

import (
	"bytes"
	"errors"
	"testing"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/wasmatrix/wasmatrix/guest/go/internal/wire"
)

// answering stands in for the host: it gives every call the same answer, in the
// way of a host that has more to say than the guest has room for.
func answering(t *testing.T, status Code, answer []byte) (hostCall, *[]byte) {
	t.Helper()
	asked := &[]byte{}
	before := resultRead
	t.Cleanup(func() { resultRead = before })
	resultRead = func(out unsafe.Pointer, outCap uint32) uint32 {
		return uint32(copy(unsafe.Slice((*byte)(out), outCap), answer))
	}
	return func(in unsafe.Pointer, inLen uint32, out unsafe.Pointer, outCap uint32) uint64 {
		*asked = bytes.Clone(unsafe.Slice((*byte)(in), inLen))
		if len(answer) <= int(outCap) {
			copy(unsafe.Slice((*byte)(out), outCap), answer)
		}
		return uint64(status)<<32 | uint64(len(answer))
	}, asked
}

func TestAnswersOfEverySizeAreRead(t *testing.T) {
	before := providerCall
	t.Cleanup(func() { providerCall = before })
	for _, size := range []int{0, 1, minBuffer - 3, minBuffer, 3 << 20} {
		want := bytes.Repeat([]byte{7}, size)
		host, asked := answering(t, 0, wire.AppendBytes(nil, 1, want))
		providerCall = host
		got, err := External{Provider: "p"}.Call("op", []byte("in"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
		var fields []string
		if err := wire.Fields(*asked, func(_ protowire.Number, v wire.Value) { fields = append(fields, string(v.Bytes)) }); err != nil || len(fields) != 3 {
			t.Errorf("the host was asked for %q, %v", fields, err)
		}
	}
}

func TestFailuresCarryCodeTextAndDetails(t *testing.T) {
	before := kvGet
	t.Cleanup(func() { kvGet = before })
	encoded := wire.AppendPair(wire.AppendPair(wire.AppendString(nil, 2, "gone"), 3, "a", "1"), 3, "b", "2")
	kvGet, _ = answering(t, Unavailable, encoded)
	_, _, err := KV{}.Get("k")
	var own *Error
	if !errors.As(err, &own) || own.Code != Unavailable || own.Error() != "gone" || own.Details["a"] != "1" || own.Details["b"] != "2" {
		t.Errorf("got %#v", err)
	}
	kvGet, _ = answering(t, Timeout, []byte{0xff})
	if _, _, err := (KV{}).Get("k"); CodeOf(err) != Timeout || err.Error() != "capability call failed with code 10" {
		t.Errorf("a failure without a text: %v", err)
	}
	kvGet, _ = answering(t, 0, []byte{0xff})
	if _, _, err := (KV{}).Get("k"); !errors.Is(err, wire.ErrMalformed) || CodeOf(err) != 0 {
		t.Errorf("a malformed answer: %v", err)
	}
	kvGet, _ = answering(t, 0, nil)
	if _, _, err := (KV{}).Get("k"); !errors.Is(err, ErrNotFound) {
		t.Errorf("an empty answer: %v", err)
	}
}
