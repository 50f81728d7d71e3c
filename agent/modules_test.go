package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
)

func testStore(t *testing.T, n *network) *moduleStore {
	t.Helper()
	s := &moduleStore{
		dir: filepath.Join(t.TempDir(), "modules"), log: slog.New(slog.DiscardHandler),
		peers: n.addresses, conn: n.dial, fetched: func(error) {}, command: map[string]bool{},
	}
	if err := s.prepare(); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAModuleIsFetchedOnceAndKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		p := n.peer("p1")
		digest := p.add(modulestest.Command())
		s := testStore(t, n)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if m, err := s.get(t.Context(), digest); err != nil || !m.command {
					t.Errorf("get = %+v, %v", m, err)
				}
			})
		}
		wg.Wait()
		if got := p.count("FetchModule"); got != 1 {
			t.Fatalf("fetched %d times", got)
		}
		if _, err := testStore2(s).get(t.Context(), digest); err != nil || p.count("FetchModule") != 1 {
			t.Fatalf("another process fetched it again: %v", err)
		}
	})
}

// testStore2 is the store of another process on the same disk.
func testStore2(s *moduleStore) *moduleStore {
	return &moduleStore{dir: s.dir, log: s.log, peers: s.peers, conn: s.conn, fetched: s.fetched, command: map[string]bool{}}
}

func TestADamagedModuleIsFetchedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		p := n.peer("p1")
		digest := p.add(testModule)
		s := testStore(t, n)
		m, err := s.get(t.Context(), digest)
		if err != nil {
			t.Fatal(err)
		}
		bad := append([]byte(nil), testModule...)
		bad[len(bad)/2] ^= 1
		for _, content := range [][]byte{bad, testModule[:10], nil} {
			if err := os.WriteFile(m.path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.get(t.Context(), digest); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(m.path); err != nil || string(got) != string(testModule) {
				t.Fatalf("the file holds %d bytes, %v", len(got), err)
			}
		}
	})
}

func TestALyingOrAbsentPeerIsPassedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		liar, empty, away, good := n.peer("p1"), n.peer("p2"), n.peer("p3"), n.peer("p4")
		digest := good.add(testModule)
		liar.modules[digest] = []byte("\x00asm something else")
		away.isolate(false)
		s := testStore(t, n)
		if _, err := s.get(t.Context(), digest); err != nil {
			t.Fatal(err)
		}
		if liar.count("FetchModule") != 1 || empty.count("FetchModule") != 1 {
			t.Fatal("not all were asked")
		}
		if left, _ := filepath.Glob(filepath.Join(s.dir, "*")); len(left) != 1 {
			t.Fatalf("the directory holds %v", left)
		}
	})
}

func TestModuleFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		p := n.peer("p1")
		digest := p.add(testModule)
		clear(p.modules)
		s := testStore(t, n)
		if _, err := s.get(t.Context(), digest); !errors.Is(err, errModuleMissing) {
			t.Errorf("a module that no peer has: %v", err)
		}
		p.isolate(false)
		if _, err := s.get(t.Context(), digest); !errors.Is(err, errModuleUnreachable) {
			t.Errorf("a peer that is away: %v", err)
		}
		if _, err := s.get(t.Context(), "sha256:../../etc/passwd"); !errors.Is(err, errModuleMissing) {
			t.Errorf("no digest: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.get(ctx, digest); err == nil {
			t.Error("a call that was given up succeeded")
		}
		synctest.Wait()
		if left, _ := filepath.Glob(filepath.Join(s.dir, "*")); len(left) != 0 {
			t.Errorf("the directory holds %v", left)
		}
	})
}

func TestAnEndlessModuleIsCutOff(t *testing.T) {
	n := newNetwork(t)
	s := testStore(t, n)
	written := 0
	_, err := s.store("", func(to io.Writer) error {
		for {
			k, err := to.Write(make([]byte, 1<<20))
			if written += k; err != nil {
				return err
			}
		}
	})
	if !errors.Is(err, errModuleDamaged) || written > maxModuleBytes {
		t.Fatalf("%d bytes were written: %v", written, err)
	}
}

func TestUnfinishedTransfersAreCleanedUp(t *testing.T) {
	s := testStore(t, newNetwork(t))
	left := filepath.Join(s.dir, "module.tmp-123")
	if err := os.WriteFile(left, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.prepare(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("it is still there: %v", err)
	}
}
