package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/wasmatrix/wasmatrix/identity"
)

// ContextVariable is the environment variable that names the context to use:
// the path of its file, or its name among the contexts of the user.
const ContextVariable = "WASMATRIX_CONTEXT"

const (
	contextSuffix  = ".yaml"
	defaultContext = "default"
)

// Context says which cluster to talk to and as whom. It is kept as a YAML file.
type Context struct {
	// Name is a name for people.
	Name string `yaml:"name"`
	// Cluster is the cluster's name; it must be that of the certificate.
	Cluster string `yaml:"cluster"`
	// Addresses are the API addresses, host:port, of some or all peers.
	Addresses []string `yaml:"addresses"`
	// TLSDir is the directory with node.crt, node.key and ca.crt. In the file it
	// may be relative to the file's own directory.
	TLSDir string `yaml:"tls_dir,omitempty"`
	// TLS holds the same three as text, in place of TLSDir.
	TLS *ContextTLS `yaml:"tls,omitempty"`
}

// ContextTLS is a user's certificate, its key and the authority's certificate, each as PEM.
type ContextTLS struct {
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	CA          string `yaml:"ca"`
}

// Identity loads the certificate of the context and checks it.
func (c Context) Identity() (*identity.Identity, error) {
	id, err := c.load()
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", c.Name, err)
	}
	if c.Cluster != "" && id.Self().Cluster != c.Cluster {
		return nil, fmt.Errorf("context %s is of cluster %s: %w: it is %s", c.Name, c.Cluster, identity.ErrWrongCluster, id.Self())
	}
	return id, nil
}

func (c Context) load() (*identity.Identity, error) {
	switch {
	case c.TLS != nil && c.TLSDir != "":
		return nil, errors.New("it has both tls and tls_dir; keep one")
	case c.TLS != nil:
		return identity.FromBundle(&identity.Bundle{
			Certificate: []byte(c.TLS.Certificate), Key: []byte(c.TLS.Key), CA: []byte(c.TLS.CA),
		})
	case c.TLSDir != "":
		return identity.Load(c.TLSDir)
	default:
		return nil, errors.New("it has neither tls nor tls_dir")
	}
}

// LoadContext reads a context file. It is strict: an unknown key is an error
// with its line. The error of a missing file is an fs.ErrNotExist.
func LoadContext(path string) (Context, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return Context{}, fmt.Errorf("load context: %w", err)
	}
	var c Context
	if err := yaml.NewDecoder(bytes.NewReader(raw), yaml.Strict()).Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Context{}, fmt.Errorf("load context %s: %w", path, err)
	}
	if len(c.Addresses) == 0 {
		return Context{}, fmt.Errorf("load context %s: it names no address", path)
	}
	if c.TLSDir != "" && !filepath.IsAbs(c.TLSDir) {
		c.TLSDir = filepath.Join(filepath.Dir(path), c.TLSDir)
	}
	return c, nil
}

// SaveContext writes a context file, readable by its owner only, and makes its
// directory. The file is replaced as a whole or not at all.
func SaveContext(path string, c Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("save context: %w", err)
		}
	}()
	raw, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".context.*") // made with mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(raw)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(tmp.Name()))
	}
	return err
}

// ContextDir returns the directory of the user's contexts:
// $XDG_CONFIG_HOME/wasmatrix/contexts, or $HOME/.config/wasmatrix/contexts.
func ContextDir(getenv func(string) string) (string, error) {
	if base := getenv("XDG_CONFIG_HOME"); filepath.IsAbs(base) {
		return filepath.Join(base, "wasmatrix", "contexts"), nil
	}
	home := getenv("HOME")
	if home == "" {
		return "", errors.New("find contexts: neither XDG_CONFIG_HOME nor HOME is set")
	}
	return filepath.Join(home, ".config", "wasmatrix", "contexts"), nil
}

// DefaultContextPath returns the path of the context that is used when none is
// named. The file need not exist.
func DefaultContextPath(getenv func(string) string) (string, error) {
	return ContextPath("", func(key string) string {
		if key == ContextVariable {
			return ""
		}
		return getenv(key)
	})
}

// ContextPath returns the path of the context to use: named, else what
// WASMATRIX_CONTEXT names, else the user's default. A name without a path
// separator and without the suffix .yaml stands for the file of that name in
// ContextDir. The file need not exist.
func ContextPath(named string, getenv func(string) string) (string, error) {
	if named == "" {
		named = getenv(ContextVariable)
	}
	if strings.ContainsRune(named, filepath.Separator) || strings.HasSuffix(named, contextSuffix) {
		return named, nil
	}
	if named == "" {
		named = defaultContext
	}
	dir, err := ContextDir(getenv)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, named+contextSuffix), nil
}

// Open makes a client of the context that ContextPath finds for named, which is
// a path, a name, or empty.
func Open(named string) (*Client, error) {
	path, err := ContextPath(named, os.Getenv)
	if err != nil {
		return nil, err
	}
	c, err := LoadContext(path)
	if err != nil {
		return nil, err
	}
	return FromContext(c)
}
