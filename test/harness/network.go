//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// dialTimeout bounds a connection attempt into the network: packets may vanish there.
const dialTimeout = 2 * time.Second

// hubHost is the last part of the address from which the test itself connects.
const hubHost = 254

// Network is a network of the test's own: each host in its own network
// namespace, joined by a bridge in one more. It never touches the interfaces and
// tables of the machine, and the kernel removes all of it with the test's end,
// however that comes. Hosts are numbered from 1.
type Network struct {
	hub   *namespace
	hosts []*namespace

	mu      sync.Mutex
	blocked map[[2]int]bool // from, to
}

// namespace is one network namespace, kept alive by a process that does nothing.
type namespace struct {
	holder *exec.Cmd
	life   io.Closer // closing it ends the holder
	file   *os.File
}

// NewNetwork makes a network of n hosts that all reach each other.
func NewNetwork(t testing.TB, n int) *Network {
	t.Helper()
	NeedRoot(t, "ip", "nsenter", "cat")
	w := &Network{blocked: map[[2]int]bool{}}
	t.Cleanup(func() {
		if err := w.close(); err != nil {
			t.Errorf("take the network down: %v", err)
		}
	})
	if err := w.build(n); err != nil {
		Missing(t, "network namespaces: %v", err)
	}
	return w
}

func (w *Network) build(n int) (err error) {
	if w.hub, err = newNamespace(); err != nil {
		return err
	}
	err = w.hub.ip("link set lo up", "link add br0 type bridge", "link set br0 up", fmt.Sprintf("addr add %s/24 dev br0", w.address(hubHost)))
	for i := 1; i <= n && err == nil; i++ {
		var host *namespace
		if host, err = newNamespace(); err != nil {
			return err
		}
		w.hosts = append(w.hosts, host)
		if err = w.hub.ip(fmt.Sprintf("link add h%d type veth peer name eth0 netns %d", i, host.holder.Process.Pid),
			fmt.Sprintf("link set h%d master br0 up", i)); err != nil {
			return err
		}
		err = host.ip("link set lo up", fmt.Sprintf("addr add %s/24 dev eth0", w.address(i)), "link set eth0 up")
	}
	return err
}

func (w *Network) close() error {
	var errs []error
	for _, ns := range append(w.hosts, w.hub) {
		if ns != nil {
			errs = append(errs, ns.close())
		}
	}
	return errors.Join(errs...)
}

func (w *Network) address(i int) string { return fmt.Sprintf("10.77.0.%d", i) }

// Address returns the address of host i.
func (w *Network) Address(i int) string { return w.address(i) }

// Command returns the command line that runs argv on host i: it replaces itself by argv.
func (w *Network) Command(i int, argv []string) []string {
	return append([]string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", w.hosts[i-1].holder.Process.Pid), "--"}, argv...)
}

// Dial connects to an address in the network, from a place of its own in it.
func (w *Network) Dial(ctx context.Context, address string) (conn net.Conn, err error) {
	err = w.hub.do(func() error {
		conn, err = (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

// Cut drops every packet from one host to another; the other direction stays as it is.
func (w *Network) Cut(from, to int) error {
	return w.change(to, func() { w.blocked[[2]int{from, to}] = true })
}

// CutClients drops what the test itself sends to a host, and with it all its calls.
func (w *Network) CutClients(to int) error { return w.Cut(hubHost, to) }

// Split cuts both directions between each host of a and each of b.
func (w *Network) Split(a, b []int) error {
	for _, x := range a {
		for _, y := range b {
			if err := errors.Join(w.Cut(x, y), w.Cut(y, x)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Heal lets all packets through again.
func (w *Network) Heal() error {
	var errs []error
	for i := range w.hosts {
		errs = append(errs, w.change(i+1, func() {
			for from := range w.blocked {
				if from[1] == i+1 {
					delete(w.blocked, from)
				}
			}
		}))
	}
	return errors.Join(errs...)
}

// change changes what is blocked and lays down the rules of host to anew, at once.
func (w *Network) change(to int, f func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	conn, err := nftables.New(nftables.WithNetNSFd(int(w.hosts[to-1].file.Fd())))
	if err != nil {
		return fmt.Errorf("open nftables of host %d: %w", to, err)
	}
	table := &nftables.Table{Name: "cuts", Family: nftables.TableFamilyIPv4}
	conn.AddTable(table) // deleting one that is not there is an error
	conn.DelTable(table)
	conn.AddTable(table)
	chain := conn.AddChain(&nftables.Chain{
		Name: "in", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	for link := range w.blocked {
		if link[1] == to {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: dropFrom(w.address(link[0]))})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("change the rules of host %d: %w", to, err)
	}
	return nil
}

// dropFrom is the rule that drops packets from an IPv4 address.
func dropFrom(address string) []expr.Any {
	const sourceOffset, addressBytes = 12, 4
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: addressBytes},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: net.ParseIP(address).To4()},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

func newNamespace() (*namespace, error) {
	// cat reads from a pipe that only this process holds: it ends with this process.
	holder := exec.Command("cat")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Setpgid: true}
	life, err := holder.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := holder.Start(); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	ns := &namespace{holder: holder, life: life}
	if ns.file, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid)); err != nil {
		return nil, errors.Join(err, ns.close())
	}
	return ns, nil
}

// ip runs ip(8) in the namespace, once for each line.
func (n *namespace) ip(lines ...string) error {
	for _, line := range lines {
		argv := append([]string{"--net=" + fmt.Sprintf("/proc/%d/ns/net", n.holder.Process.Pid), "--", "ip"}, strings.Fields(line)...)
		if out, err := exec.Command("nsenter", argv...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// do runs f in the namespace; a socket that f opens stays in it.
func (n *namespace) do(f func() error) error {
	done := make(chan error)
	go func() {
		// The thread never leaves the namespace: it ends with this goroutine.
		runtime.LockOSThread()
		err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (n *namespace) close() error {
	err := errors.Join(n.life.Close(), n.holder.Wait())
	if n.file != nil {
		err = errors.Join(err, n.file.Close())
	}
	return err
}
