package client_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestContextSurvivesSaveAndLoad(t *testing.T) {
	w := newWorld(t)
	b, err := w.ca.Issue(identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := b.Save(filepath.Join(dir, "tls")); err != nil {
		t.Fatal(err)
	}
	p := w.peer(t, "n1")
	for name, c := range map[string]client.Context{
		"files":  {Name: "dev", Cluster: "dev", Addresses: []string{p.address}, TLSDir: filepath.Join(dir, "tls")},
		"inline": {Name: "dev", Cluster: "dev", Addresses: []string{p.address}, TLS: &client.ContextTLS{Certificate: string(b.Certificate), Key: string(b.Key), CA: string(b.CA)}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "contexts", name+".yaml")
			for range 2 {
				if err := client.SaveContext(path, c); err != nil {
					t.Fatal(err)
				}
			}
			got, err := client.LoadContext(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c, got); diff != "" {
				t.Error(diff)
			}
			info, err := os.Stat(path)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			t.Setenv(client.ContextVariable, path)
			cl, err := client.Open("")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cl.Close() }()
			if _, err := cl.ListNodes(t.Context(), &pb.ListNodesRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
	entries, err := os.ReadDir(filepath.Join(dir, "contexts"))
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v: temporary files stayed", entries, err)
	}
}

func TestLoadContextRefusesWhatItDoesNotUnderstand(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) string {
		path := filepath.Join(dir, "c.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := client.LoadContext(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
	for text, want := range map[string]string{
		"name: x\nadresses: [a]\n": "adresses",
		"name: x\n":                "names no address",
		"":                         "names no address",
		"- a\n":                    "load context",
	} {
		if _, err := client.LoadContext(write(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
	got, err := client.LoadContext(write("addresses: ['127.0.0.1:1']\ntls_dir: tls\n"))
	if err != nil || got.TLSDir != filepath.Join(dir, "tls") {
		t.Errorf("relative tls_dir: got %q, %v", got.TLSDir, err)
	}
}

func TestContextIdentityIsChecked(t *testing.T) {
	w := newWorld(t)
	b, err := w.ca.Issue(identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	inline := &client.ContextTLS{Certificate: string(b.Certificate), Key: string(b.Key), CA: string(b.CA)}
	if _, err := (client.Context{Cluster: "prod", TLS: inline}).Identity(); !errors.Is(err, identity.ErrWrongCluster) {
		t.Errorf("another cluster: got %v", err)
	}
	if _, err := (client.Context{TLS: inline, TLSDir: "x"}).Identity(); err == nil {
		t.Error("both tls and tls_dir were accepted")
	}
	if _, err := (client.Context{}).Identity(); err == nil {
		t.Error("a context without a certificate was accepted")
	}
}

func TestContextPath(t *testing.T) {
	tests := []struct {
		name, named string
		env         map[string]string
		want        string
	}{
		{name: "default", env: map[string]string{"HOME": "/h"}, want: "/h/.config/wasmatrix/contexts/default.yaml"},
		{name: "default with XDG", env: map[string]string{"HOME": "/h", "XDG_CONFIG_HOME": "/x"}, want: "/x/wasmatrix/contexts/default.yaml"},
		{name: "XDG must be absolute", env: map[string]string{"HOME": "/h", "XDG_CONFIG_HOME": "x"}, want: "/h/.config/wasmatrix/contexts/default.yaml"},
		{name: "variable", env: map[string]string{"HOME": "/h", "WASMATRIX_CONTEXT": "/c.yaml"}, want: "/c.yaml"},
		{name: "variable with a name", env: map[string]string{"HOME": "/h", "WASMATRIX_CONTEXT": "prod"}, want: "/h/.config/wasmatrix/contexts/prod.yaml"},
		{name: "named wins", named: "./a", env: map[string]string{"HOME": "/h", "WASMATRIX_CONTEXT": "prod"}, want: "./a"},
		{name: "file in this directory", named: "a.yaml", want: "a.yaml"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			getenv := func(key string) string { return tt.env[key] }
			if got, err := client.ContextPath(tt.named, getenv); err != nil || got != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
	if _, err := client.ContextPath("", func(string) string { return "" }); err == nil {
		t.Error("no HOME and no XDG_CONFIG_HOME: no error")
	}
	got, err := client.DefaultContextPath(func(key string) string {
		return map[string]string{"HOME": "/h", "WASMATRIX_CONTEXT": "/other"}[key]
	})
	if err != nil || got != "/h/.config/wasmatrix/contexts/default.yaml" {
		t.Errorf("DefaultContextPath: got %q, %v", got, err)
	}
}
