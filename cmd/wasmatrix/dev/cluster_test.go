package dev

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node"
)

// Ports of no running node: nothing in these tests serves on them.
const testPortBase = 31400

func create(t *testing.T, o Options) *Cluster {
	t.Helper()
	c, err := Create(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestADirectoryInUseIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	first, err := Create(Options{Nodes: 1, Dir: dir, PortBase: testPortBase})
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "nodes", "n1", "config.yaml")
	before, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Create(Options{Nodes: 1, Dir: dir, PortBase: testPortBase + 1000})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
		t.Fatalf("a second cluster: %v, want one that names this process", err)
	}
	after, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Error("a refused cluster rewrote the configuration of the one that runs")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	create(t, Options{Nodes: 1, Dir: dir, PortBase: testPortBase + 1000})
}

func TestCheckPortsNamesWhatIsTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, text, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	taken, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name          string
		base, metrics int
		says          string
	}{
		{"the metrics port", freeBase(t), taken, "--metrics-port 0"},
		{"a port of the node", taken - 1, 0, "--port-base"},
		{"metrics on a port of the node itself", freeBase(t), freeBase(t) + 1, "--metrics-port"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := create(t, Options{Nodes: 1, Dir: t.TempDir(), PortBase: tc.base, MetricsPort: tc.metrics})
			if err := c.CheckPorts(); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("error %v does not say %q", err, tc.says)
			}
		})
	}
	c := create(t, Options{Nodes: 1, Dir: t.TempDir(), PortBase: freeBase(t)})
	if err := c.CheckPorts(); err != nil {
		t.Errorf("without metrics: %v", err)
	}
}

// freeBase returns a port base that nothing listens on.
func freeBase(t *testing.T) int {
	t.Helper()
	for base := testPortBase; base < testPortBase+1000; base += 10 {
		free := true
		for offset := range node.PortCount {
			l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(base+offset)))
			if err != nil {
				free = false
				break
			}
			_ = l.Close()
		}
		if free {
			return base
		}
	}
	t.Fatal("no free ports")
	return 0
}

func TestMetricsPortsOutOfRange(t *testing.T) {
	for _, port := range []int{-1, 65535} {
		if _, err := Create(Options{Nodes: 2, Dir: t.TempDir(), PortBase: testPortBase, MetricsPort: port}); err == nil {
			t.Errorf("metrics port %d of two nodes is accepted", port)
		}
	}
}

func TestNodesDoNotInheritSettings(t *testing.T) {
	got := nodeEnv([]string{
		"PATH=/bin", "WASMATRIX_PORT_BASE=1", "WASMATRIX_LIFELINE_FD=9", "METRICS_ADDR=x", "WASM_RUNTIME_BACKEND=y", "METRICS_ADDRESS=z",
	})
	if want := []string{"PATH=/bin", "METRICS_ADDRESS=z"}; !slices.Equal(got, want) {
		t.Errorf("environment %q, want %q", got, want)
	}
}

// TestANodeThatEndsShowsItsLog starts a node whose binary fails at once: the
// error has its last words, for the log may be gone with its directory.
func TestANodeThatEndsShowsItsLog(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "failing")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\necho the disk is on fire\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := create(t, Options{Nodes: 1, Dir: t.TempDir(), Binary: binary, PortBase: freeBase(t)})
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	cl, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = c.WaitReady(ctx, cl)
	if err == nil || !strings.Contains(err.Error(), "the disk is on fire") || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatalf("error %v shows neither the log nor the status", err)
	}
}
