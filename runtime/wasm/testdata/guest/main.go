// Package main is a guest for the tests of the executor, built both as a command
// and as a reactor.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sort"
	"strings"
	"time"
)

// work is a computation that uses much of the language and of its runtime.
func work(seed uint32) string {
	type record struct {
		Name   string
		Values []float64
		Tags   map[string]int
	}
	records := make([]record, 200)
	for i := range records {
		seed = seed*1664525 + 1013904223
		records[i] = record{Name: fmt.Sprint("r", seed), Values: []float64{float64(seed) / 3, 1e300 * float64(i)}, Tags: map[string]int{"a": i, "b": int(seed)}}
	}
	sort.Slice(records, func(a, b int) bool { return records[a].Name < records[b].Name })
	encoded, err := json.Marshal(records)
	if err != nil {
		return err.Error()
	}
	done := make(chan [32]byte)
	for n := range 8 {
		go func() { done <- sha256.Sum256([]byte(strings.Repeat(string(encoded), n+1))) }()
	}
	var sum [32]byte
	for range 8 {
		for i, b := range <-done {
			sum[i] ^= b
		}
	}
	runtime.GC()
	return fmt.Sprintf("%x", sum)
}

func main() {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	switch mode := os.Args[1]; mode {
	case "work":
		fmt.Printf("%s %s %s", work(7), in, os.Getenv("COLOUR"))
	case "sleep":
		began := time.Now()
		time.Sleep(20 * time.Millisecond)
		if time.Since(began) < 20*time.Millisecond {
			os.Exit(3)
		}
	case "memory":
		var hold [][]byte
		for {
			block := make([]byte, 1<<20)
			for i := 0; i < len(block); i += 4096 {
				block[i] = 1
			}
			hold = append(hold, block)
		}
	case "spin":
		for {
			seedless()
		}
	case "files":
		_, open := os.Open("/etc/passwd")
		_, list := os.ReadDir("/")
		fmt.Print(open != nil, list != nil, errors.Is(os.WriteFile("/x", nil, 0o600), os.ErrNotExist))
	case "panic":
		panic("out of luck")
	}
}

//go:noinline
func seedless() {}
