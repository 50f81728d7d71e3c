//go:build linux

package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wasmatrix/wasmatrix/cmd/wasmatrix/dev"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/harness"
)

// fault is one kind of thing that goes wrong.
type fault struct {
	name string
	// holds is the shortest and the longest time that it lasts before it is undone.
	holds [2]time.Duration
	// inject makes it happen; undo, which may be nil, ends it.
	inject func(ctx context.Context, a *arena, r *rand.Rand) (what string, undo func(context.Context) error, err error)
}

const ms = time.Millisecond

// allFaults are the kinds of fault, each to come up in the course of a few rounds.
func allFaults() []fault {
	short, long := [2]time.Duration{200 * ms, 1500 * ms}, [2]time.Duration{1500 * ms, 5 * time.Second}
	return []fault{
		{name: "kill the leader", holds: short, inject: onLeader(kill)},
		{name: "kill a follower", holds: short, inject: onFollower(kill)},
		{name: "kill all", holds: short, inject: killAll},
		{name: "pause the leader", holds: long, inject: onLeader(pauseProcess)},
		{name: "pause one leader after the other", holds: short, inject: pauseLeaders},
		{name: "pause a follower", holds: long, inject: onFollower(pauseProcess)},
		{name: "split the leader off", holds: long, inject: onLeader(splitOff)},
		{name: "cut what the leader sends to the others", holds: long, inject: onLeader(cutSending)},
		{name: "cut what the leader hears from the others", holds: long, inject: onLeader(cutHearing)},
		{name: "cut one link one way", holds: long, inject: onFollower(cutOneLink)},
		{name: "split everybody", holds: short, inject: splitAll},
		{name: "cut the clients from the leader", holds: long, inject: onLeader(cutClients)},
		{name: "slow syncs of the leader", holds: long, inject: onLeader(slowSync)},
		{name: "hanging syncs of the leader", holds: [2]time.Duration{3 * time.Second, 6 * time.Second}, inject: onLeader(hangSync)},
		{name: "failing syncs of the leader", holds: short, inject: onLeader(failSync)},
		{name: "failing syncs of a follower", holds: short, inject: onFollower(failSync)},
		{name: "full disk of the leader", holds: long, inject: onLeader(fillDisk)},
		{name: "full disk of a follower", holds: long, inject: onFollower(fillDisk)},
		{name: "transfers of leadership", holds: short, inject: transfers},
		{name: "rolling restart", holds: short, inject: rollingRestart},
		{name: "replace a peer", holds: short, inject: replacePeer},
		{name: "add a peer and remove the leader", holds: short, inject: addRemove},
		{name: "pause a follower and split the leader off", holds: long, inject: both(onFollower(pauseProcess), onLeader(splitOff))},
		{name: "slow syncs of a follower and kill the leader", holds: short, inject: both(onFollower(slowSync), onLeader(kill))},
		{name: "failing syncs of a follower and pause the leader", holds: short, inject: both(onFollower(failSync), onLeader(pauseProcess))},
		{name: "kill a follower and cut what the leader hears from the others", holds: short, inject: both(onFollower(kill), onLeader(cutHearing))},
	}
}

// injection is a fault at a chosen peer.
type injection func(ctx context.Context, a *arena, r *rand.Rand, n *dev.Node) (undo func(context.Context) error, err error)

type inject = func(context.Context, *arena, *rand.Rand) (string, func(context.Context) error, error)

func onLeader(f injection) inject   { return on(f, true) }
func onFollower(f injection) inject { return on(f, false) }

func on(f injection, leads bool) inject {
	return func(ctx context.Context, a *arena, r *rand.Rand) (string, func(context.Context) error, error) {
		n, err := a.pick(ctx, r, leads)
		if err != nil {
			return "", nil, err
		}
		undo, err := f(ctx, a, r, n)
		return n.Name(), undo, err
	}
}

// both makes one fault after the other, so that they last together.
func both(a, b inject) inject {
	return func(ctx context.Context, ar *arena, r *rand.Rand) (string, func(context.Context) error, error) {
		first, undoFirst, err := a(ctx, ar, r)
		if err != nil {
			return first, undoFirst, err
		}
		second, undoSecond, err := b(ctx, ar, r)
		return first + ", " + second, func(ctx context.Context) error {
			var errs []error
			for _, undo := range []func(context.Context) error{undoSecond, undoFirst} {
				if undo != nil {
					errs = append(errs, undo(ctx))
				}
			}
			return errors.Join(errs...)
		}, err
	}
}

func kill(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return a.start(n), unlessDown(n.KillPeer())
}

// unlessDown forgives that a peer which a disk fault hurt has ended meanwhile.
func unlessDown(err error) error {
	if errors.Is(err, dev.ErrNotRunning) {
		return nil
	}
	return err
}

func killAll(_ context.Context, a *arena, _ *rand.Rand) (string, func(context.Context) error, error) {
	var errs []error
	for _, n := range a.members {
		errs = append(errs, unlessDown(n.SignalPeer(syscall.SIGKILL)))
	}
	for _, n := range a.members {
		<-n.Exited()
	}
	return "all", a.start(a.members...), errors.Join(errs...)
}

func pauseProcess(_ context.Context, _ *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return func(context.Context) error { return unlessDown(n.SignalPeer(syscall.SIGCONT)) }, unlessDown(n.SignalPeer(syscall.SIGSTOP))
}

// pauseLeaders pauses a leader for just so long that another is elected, and does
// so again: one that goes on believes for a moment that it still leads.
func pauseLeaders(ctx context.Context, a *arena, r *rand.Rand) (string, func(context.Context) error, error) {
	said := ""
	for range 4 {
		n, err := a.pick(ctx, r, true)
		if err != nil {
			return said, nil, err
		}
		said += " " + n.Name()
		if err := unlessDown(n.SignalPeer(syscall.SIGSTOP)); err != nil {
			return said, nil, err
		}
		pause.For(ctx, 700*ms+time.Duration(r.Int64N(int64(800*ms))))
		if err := unlessDown(n.SignalPeer(syscall.SIGCONT)); err != nil {
			return said, nil, err
		}
		pause.For(ctx, 300*ms)
	}
	return said[1:], nil, nil
}

func heal(a *arena) func(context.Context) error {
	return func(context.Context) error { return a.net.Heal() }
}

func splitOff(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return heal(a), a.net.Split([]int{a.host(n)}, a.hosts(a.others(n)))
}

func cutSending(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	var errs []error
	for _, other := range a.others(n) {
		errs = append(errs, a.net.Cut(a.host(n), a.host(other)))
	}
	return heal(a), errors.Join(errs...)
}

func cutHearing(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	var errs []error
	for _, other := range a.others(n) {
		errs = append(errs, a.net.Cut(a.host(other), a.host(n)))
	}
	return heal(a), errors.Join(errs...)
}

func cutOneLink(_ context.Context, a *arena, r *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	others := a.others(n)
	return heal(a), a.net.Cut(a.host(n), a.host(others[r.IntN(len(others))]))
}

func splitAll(_ context.Context, a *arena, _ *rand.Rand) (string, func(context.Context) error, error) {
	var errs []error
	for _, n := range a.members {
		errs = append(errs, a.net.Split([]int{a.host(n)}, a.hosts(a.others(n))))
	}
	return "all", heal(a), errors.Join(errs...)
}

func cutClients(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return heal(a), a.net.CutClients(a.host(n))
}

func trace(a *arena, n *dev.Node, what string) (func(context.Context) error, error) {
	a.hurt[n.Name()] = true
	pid, err := n.PID()
	if err != nil {
		return nil, unlessDown(err)
	}
	tr, err := harness.Inject(pid, what)
	if err != nil {
		if _, down := n.PID(); down != nil {
			return nil, unlessDown(down)
		}
		return nil, err
	}
	return func(context.Context) error { return tr.Stop() }, nil
}

func slowSync(_ context.Context, a *arena, r *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return trace(a, n, fmt.Sprintf("fsync,fdatasync:delay_enter=%d", 20_000+r.IntN(300_000)))
}

func hangSync(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return trace(a, n, "fsync,fdatasync:delay_enter=20000000")
}

func failSync(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	return trace(a, n, "fsync,fdatasync:error=EIO")
}

// fillDisk leaves no byte on the disk of a peer.
func fillDisk(_ context.Context, a *arena, _ *rand.Rand, n *dev.Node) (func(context.Context) error, error) {
	a.hurt[n.Name()] = true
	path := filepath.Join(filepath.Dir(n.Config.DataDir), "filler")
	undo := func(context.Context) error { return os.Remove(path) }
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4096, 1} {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, io.ErrShortWrite) {
			return undo, err
		}
		err = nil
	}
	return undo, nil
}

func transfers(ctx context.Context, a *arena, r *rand.Rand) (string, func(context.Context) error, error) {
	for range 5 {
		n, err := a.pick(ctx, r, false)
		if err != nil {
			return "", nil, err
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		// It may be refused: an election may just go on.
		_, _ = a.clients[0].TransferLeadership(call, &pb.TransferLeadershipRequest{PeerId: n.Name()})
		cancel()
	}
	return "five times", nil, nil
}

func rollingRestart(ctx context.Context, a *arena, _ *rand.Rand) (string, func(context.Context) error, error) {
	for _, n := range a.members {
		if err := n.Stop(ctx); err != nil {
			return "", nil, err
		}
		if err := n.Start(); err != nil {
			return "", nil, err
		}
		err := harness.Until(ctx, n.Name()+" to follow again", func(ctx context.Context) error {
			if err := a.revive(ctx); err != nil {
				return err
			}
			status, err := a.status(ctx, n)
			if err == nil && status.LeaderId == "" {
				err = errors.New("it knows no leader")
			}
			return err
		})
		if err != nil {
			return "", nil, err
		}
	}
	return "one after the other", nil, nil
}

// replacePeer loses a peer with its disk and puts a new one in its place.
func replacePeer(ctx context.Context, a *arena, r *rand.Rand) (string, func(context.Context) error, error) {
	n, err := a.pick(ctx, r, r.IntN(2) == 0)
	if err != nil {
		return "", nil, err
	}
	if err := unlessDown(n.KillPeer()); err != nil {
		return "", nil, err
	}
	if err := a.remove(ctx, n); err != nil {
		return "", nil, err
	}
	added, err := a.join(ctx)
	if err != nil {
		return "", nil, err
	}
	return n.Name() + " by " + added.Name(), nil, nil
}

func addRemove(ctx context.Context, a *arena, _ *rand.Rand) (string, func(context.Context) error, error) {
	added, err := a.join(ctx)
	if err != nil {
		return "", nil, err
	}
	leader, _, err := a.leader(ctx)
	if err != nil {
		return "", nil, err
	}
	return added.Name() + " for " + leader.Name(), nil, a.remove(ctx, leader)
}
