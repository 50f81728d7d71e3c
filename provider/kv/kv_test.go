package kv_test

import (
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wasmatrix/wasmatrix/provider"
	"github.com/wasmatrix/wasmatrix/provider/kv"
	"github.com/wasmatrix/wasmatrix/provider/providertest"
)

func open(t testing.TB, now func() time.Time, cfg provider.Config) provider.Provider {
	t.Helper()
	p, err := kv.New(kv.Options{Now: now}).Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return p
}

func TestMemoryConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{ID: "kv", Driver: "memory"})
	})
}

func TestBboltConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		return open(t, now, provider.Config{
			ID: "kv", Dir: filepath.Join(t.TempDir(), "kv"), Settings: map[string]string{"fsync": "false"},
		})
	})
}

func TestBboltWithSyncConforms(t *testing.T) {
	defer goleak.VerifyNone(t)
	providertest.KV(t, func(t *testing.T, now func() time.Time) provider.Provider {
		if t.Name() == "TestBboltWithSyncConforms/a_random_history_agrees_with_a_model" {
			t.Skip("thousands of syncs; TestBboltConforms runs it without")
		}
		return open(t, now, provider.Config{ID: "kv", Driver: "bbolt", Dir: t.TempDir()})
	})
}
