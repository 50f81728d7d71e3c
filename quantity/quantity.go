// Package quantity reads and writes amounts of memory as people write them in
// manifests and flags: "32MiB", "1GiB" or a plain number of bytes. It is a leaf:
// it imports nothing of wasmatrix.
package quantity

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// ErrSyntax is wrapped by every error of ParseBytes for text that is not an amount.
var ErrSyntax = errors.New("not an amount of memory")

// ErrRange is wrapped by the errors of ParseBytes for an amount that does not fit into 64 bits.
var ErrRange = errors.New("amount of memory out of range")

// units holds the suffixes, largest first. They are powers of 1024 and spelt
// exactly so: "MB" and "mib" are refused rather than guessed at.
var units = [...]struct {
	suffix string
	shift  uint
}{
	{"GiB", 30},
	{"MiB", 20},
	{"KiB", 10},
}

// ParseBytes reads an amount of memory in bytes: a positive decimal number,
// optionally followed by KiB, MiB or GiB without a space. Signs, fractions,
// leading zeros and the empty string are refused. Its errors wrap ErrSyntax or
// ErrRange.
func ParseBytes(s string) (uint64, error) {
	digits, shift := s, uint(0)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			digits, shift = rest, u.shift
			break
		}
	}
	if digits == "" || digits[0] < '1' || digits[0] > '9' {
		return 0, syntaxError(s)
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n > math.MaxUint64>>shift:
		return 0, fmt.Errorf("parse %q: %w", s, ErrRange)
	case err != nil:
		return 0, syntaxError(s)
	}
	return n << shift, nil
}

// FormatBytes writes n so that ParseBytes reads the same number back: with the
// largest unit that divides it, else as plain bytes. Zero is "0", which
// ParseBytes refuses.
func FormatBytes(n uint64) string {
	for _, u := range units {
		if n != 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatUint(n>>u.shift, 10) + u.suffix
		}
	}
	return strconv.FormatUint(n, 10)
}

func syntaxError(s string) error {
	return fmt.Errorf("parse %q: %w: want a number of bytes, or a number with KiB, MiB or GiB", s, ErrSyntax)
}
