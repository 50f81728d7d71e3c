// Wordcount is a command: it counts the words of its standard input, prints the
// most frequent ones and ends. It uses plain WASI and no part of the SDK.
package main

import (
	"bufio"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	top := flag.Int("top", 10, "how many words to print")
	flag.Parse()
	counts := map[string]int{}
	in := bufio.NewScanner(os.Stdin)
	in.Split(bufio.ScanWords)
	for in.Scan() {
		word := strings.ToLower(strings.Trim(in.Text(), ".,;:!?\"'()[]"))
		if word != "" {
			counts[word]++
		}
	}
	if err := in.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "read standard input:", err)
		os.Exit(1)
	}
	words := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), strings.Compare(a, b))
	})
	for _, w := range words[:min(*top, len(words))] {
		fmt.Printf("%6d %s\n", counts[w], w)
	}
}
