package kernel

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Package is the Debian package that brings a small kernel with its modules.
const Package = "linux-image-cloud-amd64"

// ErrNone means that no usable kernel was found. The message says what was looked at.
var ErrNone = errors.New("no usable kernel")

// Options say where to look. Zero values mean where distributions put kernels.
type Options struct {
	// Image is a kernel image; empty means to look for one.
	Image string
	// Modules is the directory with the modules of Image, such as /lib/modules/6.1.0-1-cloud-amd64.
	Modules string
	// Root is put before the paths to look at.
	Root string
}

// Kernel is a kernel that can be booted.
type Kernel struct {
	// Image is the path of the bzImage.
	Image string
	// Release is its version, as uname -r says it.
	Release string
	// Modules are the paths of the wanted modules and of those they depend on, in
	// the order in which they have to be loaded; empty when all are built in.
	Modules []string
	// HZ is the number of ticks per second it was built for.
	HZ int
}

// Find returns the kernel to use: one made for virtual machines rather than
// another, then the newest. wanted are the names of the modules that it must
// bring, unless they are built in.
func Find(o Options, wanted ...string) (Kernel, error) {
	images := []string{o.Image}
	if o.Image == "" {
		images = nil
		for _, pattern := range []string{"/boot/vmlinuz-*", "/usr/lib/modules/*/vmlinuz", "/lib/modules/*/vmlinuz"} {
			// The patterns are well-formed.
			found, _ := filepath.Glob(filepath.Join(o.Root, pattern))
			images = append(images, found...)
		}
	}
	var usable []Kernel
	var problems []string
	for _, image := range images {
		k, err := inspect(image, o, wanted)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		usable = append(usable, k)
	}
	if len(usable) == 0 {
		seen := "none under /boot or /usr/lib/modules"
		if len(problems) > 0 {
			seen = strings.Join(problems, "; ")
		}
		return Kernel{}, fmt.Errorf("%w: %s; install the Debian package %s, or name a kernel and its modules in the configuration", ErrNone, seen, Package)
	}
	slices.SortStableFunc(usable, func(a, b Kernel) int {
		return cmp.Or(-cmp.Compare(rank(a), rank(b)), -compareReleases(a.Release, b.Release))
	})
	return usable[0], nil
}

// rank prefers kernels made for virtual machines: they are smaller and start sooner.
func rank(k Kernel) int {
	for n, word := range []string{"cloud", "kvm", "virtual"} {
		if strings.Contains(k.Release, word) {
			return 3 - n
		}
	}
	return 0
}

// compareReleases compares versions number by number.
func compareReleases(a, b string) int {
	split := func(r rune) bool { return r < '0' || r > '9' }
	x, y := strings.FieldsFunc(a, split), strings.FieldsFunc(b, split)
	for n := range min(len(x), len(y)) {
		if c := cmp.Or(cmp.Compare(len(x[n]), len(y[n])), cmp.Compare(x[n], y[n])); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(x), len(y))
}

func inspect(image string, o Options, wanted []string) (Kernel, error) {
	release, err := releaseOf(image)
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{Image: image, Release: release, HZ: 250}
	if text, err := os.ReadFile(filepath.Join(filepath.Dir(image), "config-"+release)); err == nil {
		k.HZ = ticks(text, k.HZ)
	}
	dirs := []string{o.Modules}
	if o.Modules == "" {
		dirs = []string{filepath.Join(o.Root, "/usr/lib/modules", release), filepath.Join(o.Root, "/lib/modules", release)}
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "modules.builtin")); err == nil {
			k.Modules, err = resolve(dir, wanted)
			return k, err
		}
	}
	return Kernel{}, fmt.Errorf("%s: its modules are not in %s", image, strings.Join(dirs, " or "))
}

// ticks reads CONFIG_HZ of a kernel's configuration.
func ticks(config []byte, otherwise int) int {
	for line := range strings.Lines(string(config)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "CONFIG_HZ="); ok {
			if n, err := strconv.Atoi(v); err == nil && n > 0 {
				return n
			}
		}
	}
	return otherwise
}

// releaseOf reads the version out of the header of a bzImage (the Linux/x86 boot
// protocol: "HdrS" at 0x202, the offset of the version less 0x200 at 0x20e).
func releaseOf(image string) (string, error) {
	f, err := os.Open(image)
	if err != nil {
		return "", fmt.Errorf("opening the kernel: %w", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	b := make([]byte, 0x8000)
	n, _ := f.ReadAt(b, 0) // a short file is told apart below
	b = b[:n]
	if n < 0x250 || string(b[0x202:0x206]) != "HdrS" {
		return "", fmt.Errorf("%s is no bzImage", image)
	}
	at := int(binary.LittleEndian.Uint16(b[0x20e:])) + 0x200
	if at >= n {
		return "", fmt.Errorf("%s: its header names no version", image)
	}
	text, _, _ := bytes.Cut(b[at:], []byte{0})
	fields := strings.Fields(string(text))
	if len(fields) == 0 {
		return "", fmt.Errorf("%s: its header names no version", image)
	}
	return fields[0], nil
}
