package wire

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

func TestFieldsReadWhatAppendWrites(t *testing.T) {
	b := AppendString(nil, 1, "one")
	b = AppendBytes(b, 2, []byte{0, 0xff})
	b = AppendUint(b, 3, 1<<63)
	b = AppendBool(b, 4, true)
	b = AppendPair(b, 5, "", "")
	b = AppendPair(b, 5, "name", "value")
	b = AppendError(b, 6, 11, "no", map[string]string{"b": "2", "a": "1"})
	b = AppendUint(AppendBool(AppendString(AppendBytes(b, 7, nil), 7, ""), 7, false), 7, 0)

	var numbers []protowire.Number
	values := map[protowire.Number]Value{}
	if err := Fields(b, func(n protowire.Number, v Value) { numbers, values[n] = append(numbers, n), v }); err != nil {
		t.Fatal(err)
	}
	if len(numbers) != 7 || values[7].Bytes != nil {
		t.Errorf("fields %v: want 1 to 4, 5 twice and 6; empty values are left out", numbers)
	}
	if string(values[1].Bytes) != "one" || string(values[2].Bytes) != "\x00\xff" || values[3].Number != 1<<63 || values[4].Number != 1 {
		t.Errorf("got %v", values)
	}
	if first, second, err := Pair(values[5].Bytes); first != "name" || second != "value" || err != nil {
		t.Errorf("pair %q %q %v", first, second, err)
	}
	var details []string
	err := Fields(values[6].Bytes, func(n protowire.Number, v Value) {
		if n == 3 {
			key, value, err := Pair(v.Bytes)
			if err != nil {
				t.Error(err)
			}
			details = append(details, key+value)
		}
	})
	if err != nil || len(details) != 2 || details[0] != "a1" || details[1] != "b2" {
		t.Errorf("details %q, %v: want them in order", details, err)
	}
}

func TestFieldsRefuseWhatIsCutOff(t *testing.T) {
	whole := AppendUint(AppendString(nil, 1, "text"), 2, 300)
	text := len(AppendString(nil, 1, "text"))
	for cut := 1; cut < len(whole); cut++ {
		err := Fields(whole[:cut], func(protowire.Number, Value) {})
		if whether := errors.Is(err, ErrMalformed); whether == (cut == text) {
			t.Errorf("%d of %d bytes: %v", cut, len(whole), err)
		}
	}
}

func FuzzFields(f *testing.F) {
	f.Add(AppendError(nil, 5, 1, "x", map[string]string{"k": "v"}))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_ = Fields(b, func(_ protowire.Number, v Value) { _, _, _ = Pair(v.Bytes) })
	})
}
