package quantity_test

import (
	"errors"
	"math"
	"testing"

	"github.com/wasmatrix/wasmatrix/quantity"
)

func TestParseBytesReadsWhatPeopleWrite(t *testing.T) {
	for in, want := range map[string]uint64{
		"1":                    1,
		"65536":                65536,
		"1KiB":                 1024,
		"32MiB":                32 << 20,
		"4GiB":                 4 << 30,
		"18446744073709551615": math.MaxUint64,
		"17179869183GiB":       17179869183 << 30,
	} {
		got, err := quantity.ParseBytes(in)
		if err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseBytesRefusesWhatIsNoAmount(t *testing.T) {
	for in, want := range map[string]error{
		"":                     quantity.ErrSyntax,
		"0":                    quantity.ErrSyntax,
		"0MiB":                 quantity.ErrSyntax,
		"01":                   quantity.ErrSyntax,
		"+1":                   quantity.ErrSyntax,
		"-1":                   quantity.ErrSyntax,
		"1.5GiB":               quantity.ErrSyntax,
		"1 MiB":                quantity.ErrSyntax,
		"MiB":                  quantity.ErrSyntax,
		"1MB":                  quantity.ErrSyntax,
		"1mib":                 quantity.ErrSyntax,
		"1TiB":                 quantity.ErrSyntax,
		"1_000":                quantity.ErrSyntax,
		"0x10":                 quantity.ErrSyntax,
		"18446744073709551616": quantity.ErrRange,
		"17179869184GiB":       quantity.ErrRange,
	} {
		if got, err := quantity.ParseBytes(in); !errors.Is(err, want) || got != 0 {
			t.Errorf("ParseBytes(%q) = %d, %v; want 0 and %v", in, got, err, want)
		}
	}
}

func TestFormatBytesUsesTheLargestUnitThatDivides(t *testing.T) {
	for in, want := range map[uint64]string{
		0:             "0",
		1:             "1",
		1023:          "1023",
		1024:          "1KiB",
		1025:          "1025",
		1536 << 10:    "1536KiB",
		64 << 20:      "64MiB",
		5 << 30:       "5GiB",
		(5 << 30) + 1: "5368709121",
	} {
		if got := quantity.FormatBytes(in); got != want {
			t.Errorf("FormatBytes(%d) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"1", "32MiB", "17179869184GiB", "0", "MiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := quantity.ParseBytes(s)
		if err != nil {
			return
		}
		if back, err := quantity.ParseBytes(quantity.FormatBytes(n)); err != nil || back != n {
			t.Errorf("%q is %d, its format %q reads as %d, %v", s, n, quantity.FormatBytes(n), back, err)
		}
	})
}
