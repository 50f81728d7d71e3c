package guest

import (
	"encoding/binary"
	"fmt"
	goruntime "runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wasmatrix/wasmatrix/runtime/microvm/channel"
)

const (
	// tolerance is how far the clock may be off before it is set.
	tolerance = 5 * time.Millisecond
	// headroom is what the kernel and its page tables may need of the memory.
	headroom = 24 << 20
	// scrubbed is how much free memory is scrubbed at most: more than a boot leaves
	// behind. The kernel gives out first what was freed last.
	scrubbed = 96 << 20
	// leastHeap is the least that the Go heap is limited to.
	leastHeap = 48 << 20

	// ioctls of random(4).
	rndAddEntropy  = 0x40085203
	rndReseedCRNG  = 0x5207
	bitsPerByte    = 8
	entropyHeader  = 8
	largestEntropy = 512
)

// vm is the machine that this process is the first of.
type vm struct {
	// random is the descriptor of random(4). It is opened at the boot: opening it takes
	// a clone whose processor is emulated several milliseconds.
	random int
	// budget is what Budget was last told.
	budget atomic.Uint64
}

// newVM opens what a machine needs of its kernel.
func newVM() (*vm, error) {
	random, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/urandom: %w", err)
	}
	return &vm{random: random}, nil
}

// Greet implements Machine.
func (v *vm) Greet(g channel.Greeting) error {
	if err := setTime(g.Now); err != nil {
		return err
	}
	if len(g.Entropy) == 0 || len(g.Entropy) > largestEntropy {
		return fmt.Errorf("%w: %d bytes of entropy", channel.ErrMalformed, len(g.Entropy))
	}
	return v.addEntropy(g.Entropy)
}

// SetTime implements Machine.
func (*vm) SetTime(now time.Time) {
	if off := time.Until(now); off > tolerance || off < -tolerance {
		// The clock was set once, so it can be set again.
		_ = setTime(now)
	}
}

func setTime(now time.Time) error {
	t := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &t); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	return nil
}

// addEntropy mixes entropy into the kernel's pool, counts it, and makes the
// generator start from it at once.
func (v *vm) addEntropy(entropy []byte) error {
	// struct rand_pool_info { int entropy_count; int buf_size; __u32 buf[]; }
	info := make([]byte, entropyHeader+len(entropy))
	binary.NativeEndian.PutUint32(info, uint32(len(entropy)*bitsPerByte))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(entropy)))
	copy(info[entropyHeader:], entropy)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.random), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("seeding random numbers: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.random), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("seeding random numbers: %w", errno)
	}
	return nil
}

// Settle implements Machine.
func (*vm) Settle() {
	goruntime.GC()
	debug.FreeOSMemory()
}

// Scrub implements Machine: it makes the kernel fill free memory with zeros. What
// was there once, such as the archive that it unpacked, would otherwise be kept in
// every template. Of the memory of a large machine the boot has touched little.
func (*vm) Scrub() {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return
	}
	unit := uint64(info.Unit)
	size := min(int64(info.Freeram*unit)-headroom-int64(info.Totalram*unit/16), scrubbed)
	if size <= 0 {
		return
	}
	// The template is only larger where this fails.
	region, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
	if err == nil {
		_ = unix.Munmap(region)
	}
}

// Budget implements Machine. Changing the limit stops all goroutines, so it is not
// done again for what is in force.
func (v *vm) Budget(linear uint64) {
	if v.budget.Swap(linear) == linear {
		return
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return
	}
	total := info.Totalram * uint64(info.Unit)
	debug.SetMemoryLimit(max(int64(total)-int64(linear)-headroom, leastHeap))
}
