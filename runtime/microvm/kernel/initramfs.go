package kernel

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
)

// ModuleDir is where the initramfs holds the modules, in files whose names sort
// in the order of loading.
const ModuleDir = "/modules"

const (
	modeDir    = 0o040755
	modeDevice = 0o020600
	modeFile   = 0o100644
	modeInit   = 0o100755
)

// Initramfs packs init and modules into an archive of the format newc, which the
// kernel unpacks into its root file system. The same input gives the same bytes.
func Initramfs(init []byte, modules []string) ([]byte, error) {
	var a archive
	for _, dir := range []string{"dev", "proc", "tmp", ModuleDir[1:]} {
		a.add(entry{name: dir, mode: modeDir})
	}
	a.add(entry{name: "dev/console", mode: modeDevice, major: 5, minor: 1})
	a.add(entry{name: "init", mode: modeInit, content: init})
	for n, file := range modules {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("packing the kernel's modules: %w", err)
		}
		a.add(entry{name: fmt.Sprintf("%s/%02d-%s", ModuleDir[1:], n, filepath.Base(file)), mode: modeFile, content: content})
	}
	a.add(entry{name: "TRAILER!!!"})
	return a.out.Bytes(), nil
}

type entry struct {
	name         string
	mode         int
	major, minor int
	content      []byte
}

type archive struct {
	out   bytes.Buffer
	inode int
}

// add appends one entry: a header of 13 hexadecimal fields, name and content,
// each padded to 4 bytes (Documentation/driver-api/early-userspace/buffer-format.rst).
func (a *archive) add(e entry) {
	a.inode++
	fmt.Fprintf(&a.out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, e.mode, 0, 0, 1, 0, len(e.content), 0, 0, e.major, e.minor, len(e.name)+1, 0)
	a.out.WriteString(e.name)
	a.out.WriteByte(0)
	a.pad()
	a.out.Write(e.content)
	a.pad()
}

func (a *archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}
