package kernel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/kernel"
)

// install puts a kernel without code into a root: its header, its configuration
// and its modules.
func install(t *testing.T, root, release string, files map[string]string) {
	t.Helper()
	image := make([]byte, 0x1000)
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x20e:], 0x400)
	copy(image[0x600:], release+" (somebody) #1 SMP\x00")
	write := func(path, content string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("boot/vmlinuz-"+release, string(image))
	write("boot/config-"+release, "# made by hand\nCONFIG_HZ_250=y\nCONFIG_HZ=1000\n")
	for name, content := range files {
		write("usr/lib/modules/"+release+"/"+name, content)
	}
}

var modules = map[string]string{
	"modules.builtin": "kernel/drivers/virtio/virtio_ring.ko\n",
	"modules.dep": "kernel/a/virtio_console.ko.xz: kernel/a/virtio-mmio.ko.xz kernel/a/virtio.ko.xz\n" +
		"kernel/a/virtio-mmio.ko.xz: kernel/a/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko\nkernel/a/virtio.ko.xz:\n",
}

func TestFindOrdersModulesByTheirNeeds(t *testing.T) {
	root := t.TempDir()
	install(t, root, "6.1.0-2-cloud-amd64", modules)
	k, err := kernel.Find(kernel.Options{Root: root}, "virtio_mmio", "virtio_console")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range k.Modules {
		names = append(names, filepath.Base(m))
	}
	if want := []string{"virtio.ko.xz", "virtio-mmio.ko.xz", "virtio_console.ko.xz"}; !slices.Equal(names, want) {
		t.Fatalf("modules %v, want %v", names, want)
	}
	if k.Release != "6.1.0-2-cloud-amd64" || k.HZ != 1000 {
		t.Fatalf("kernel %+v", k)
	}
}

func TestFindPrefersKernelsForMachinesThenTheNewest(t *testing.T) {
	root := t.TempDir()
	for _, release := range []string{"6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64", "6.12.1-amd64"} {
		install(t, root, release, modules)
	}
	k, err := kernel.Find(kernel.Options{Root: root}, "virtio_mmio")
	if err != nil || k.Release != "6.1.0-10-cloud-amd64" {
		t.Fatalf("%s, %v", k.Release, err)
	}
}

func TestFindSaysWhatIsMissing(t *testing.T) {
	empty, without, broken := t.TempDir(), t.TempDir(), t.TempDir()
	install(t, without, "6.1.0-cloud-amd64", nil)
	install(t, broken, "6.1.0-cloud-amd64", map[string]string{"modules.builtin": "", "modules.dep": ""})
	for root, words := range map[string][]string{
		empty: {kernel.Package}, without: {kernel.Package, "modules are not in"}, broken: {kernel.Package, "no module virtio_mmio"},
	} {
		_, err := kernel.Find(kernel.Options{Root: root}, "virtio_mmio")
		if !errors.Is(err, kernel.ErrNone) {
			t.Fatalf("error %v", err)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not say %q", err, w)
			}
		}
	}
}

func TestInitramfsIsTheSameEachTime(t *testing.T) {
	module := filepath.Join(t.TempDir(), "a.ko")
	if err := os.WriteFile(module, []byte("module"), 0o600); err != nil {
		t.Fatal(err)
	}
	first, err := kernel.Initramfs([]byte("init"), []string{module})
	if err != nil {
		t.Fatal(err)
	}
	second, err := kernel.Initramfs([]byte("init"), []string{module})
	if err != nil || !bytes.Equal(first, second) {
		t.Fatalf("two archives differ: %v", err)
	}
	for _, want := range []string{"070701", "init\x00", "modules/00-a.ko\x00", "TRAILER!!!\x00"} {
		if !bytes.Contains(first, []byte(want)) {
			t.Errorf("the archive has no %q", want)
		}
	}
	if len(first)%4 != 0 {
		t.Errorf("%d bytes are no multiple of four", len(first))
	}
}
