package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/identity"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/rpc"
	"github.com/wasmatrix/wasmatrix/test/register"
)

const (
	// operationLimit bounds one operation, with all that the client repeats by itself.
	operationLimit = 6 * time.Second
	// insistence is how often a client repeats a write without an answer at most, with the same request id.
	insistence = 3
	// keys is how many registers a round works on.
	keys = 6
	// setUpLimit bounds each step of preparing a world.
	setUpLimit = time.Minute
)

// workload is what clients do: they write and read registers, whose history must
// be linearizable, and start, stop, restart, remove and drain what runs.
type workload struct {
	world   *World
	user    *identity.Identity
	clients []*client.Client
	pool    *identity.Pool

	history *history
	round   int
	values  uint64
	stop    chan struct{}
	working sync.WaitGroup

	mu sync.Mutex
	// made are workloads and how many instances each was asked for.
	made map[string]int
}

func newWorkload(w *World, ca *identity.CA) *workload {
	l := &workload{world: w, user: issue(ca, identity.Subject{Kind: identity.User, Name: "ann", Role: identity.RoleAdmin}), made: map[string]int{}}
	l.history = newHistory(w)
	addresses := w.peerAddresses()
	for i := range w.profile.Clients + w.profile.Readers {
		from := fmt.Sprintf("c%d", i+1)
		w.net.address(from)
		// Each client begins with another peer.
		order := append(append([]string(nil), addresses[i%len(addresses):]...), addresses[:i%len(addresses)]...)
		c, err := client.New(client.Config{
			Addresses: order, Identity: l.user, Timeout: operationLimit,
			DialOptions: []grpc.DialOption{w.dialer(from)},
		})
		if err != nil {
			panic(err)
		}
		l.clients = append(l.clients, c)
	}
	l.pool = l.user.NewPool(identity.Subject.IsPeer, append(rpc.DialOptions(), w.dialer("c1"))...)
	return l
}

// admin returns a connection of an operator to one peer.
func (l *workload) admin(m *peerMachine) pb.ClusterServiceClient {
	conn, err := l.pool.Conn(m.apiAddress())
	if err != nil {
		panic(err)
	}
	return pb.NewClusterServiceClient(conn)
}

// prepare registers the module and the first workloads.
func (l *workload) prepare() {
	if len(l.world.workers) == 0 || !l.world.whole() {
		return
	}
	c := l.clients[0]
	l.must("upload the module", func(ctx context.Context) error {
		_, err := c.UploadModule(ctx, "guest", bytes.NewReader(guestModule), int64(len(guestModule)))
		return err
	})
}

func (l *workload) must(what string, f func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), setUpLimit)
	defer cancel()
	if err := f(ctx); err != nil {
		l.world.violate("", "%s: %v", what, err)
	}
}

// begin starts the clients' work of one round.
func (l *workload) begin(round int) {
	l.round = round
	l.history.clear()
	l.stop = make(chan struct{})
	for i, c := range l.clients {
		dice := rand.New(rand.NewPCG(l.world.draw(), 0x636c69656e74))
		l.working.Go(func() { l.work(i, c, dice) })
	}
}

// end ends the work of a round; operations under way are finished.
func (l *workload) end() {
	close(l.stop)
	l.working.Wait()
}

// close frees what the clients hold.
func (l *workload) close() {
	for _, c := range l.clients {
		_ = c.Close()
	}
	_ = l.pool.Close()
}

func (l *workload) work(i int, c *client.Client, dice *rand.Rand) {
	for {
		timer := time.NewTimer(time.Duration(dice.ExpFloat64() * float64(l.world.profile.Pace)))
		select {
		case <-l.stop:
			timer.Stop()
			return
		case <-l.world.broken:
			timer.Stop()
			return
		case <-timer.C:
		}
		if len(l.world.workers) > 0 && i < l.world.profile.Clients && dice.IntN(5) == 0 {
			l.operate(c, dice)
		} else {
			l.register(i, c, dice)
		}
	}
}

// register does one operation on a register.
func (l *workload) register(i int, c *client.Client, dice *rand.Rand) {
	in := register.Input{Key: fmt.Sprintf("r%d-%d", l.round, dice.IntN(keys))}
	switch p := dice.IntN(100); {
	case p < 40, i >= l.world.profile.Clients:
		in.Kind = register.Get
	case p < 78:
		in.Kind = register.Update
	case p < 92:
		in.Kind = register.Create
	case p < 97:
		in.Kind = register.Remove
	default:
		l.stale(c, in.Key)
		return
	}
	l.mu.Lock()
	l.values++
	in.Value = l.values
	l.mu.Unlock()
	called := l.history.now()
	out := l.perform(c, in, dice)
	l.history.add(i, in, out, called)
	switch {
	case in.Kind == register.Get:
		l.world.counts.Reads.Add(1)
	case out.Outcome == register.Unknown:
		l.world.counts.Unknown.Add(1)
	case out.Outcome != register.Failed:
		l.world.counts.Acked.Add(1)
	}
}

// stale reads without asking the leader: any past is allowed, nothing else.
func (l *workload) stale(c *client.Client, key string) {
	ctx, cancel := context.WithTimeout(context.Background(), operationLimit)
	defer cancel()
	if _, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: key, Read: &pb.ReadOptions{Stale: true}}); err == nil {
		l.world.counts.Stale.Add(1)
	}
}

// perform makes one operation, and repeats a write without an answer.
func (l *workload) perform(c *client.Client, in register.Input, dice *rand.Rand) register.Output {
	if in.Kind == register.Get {
		return l.read(c, in)
	}
	id := uuid.NewString()
	doubt, attempts := false, dice.IntN(insistence+1)
	for attempt := 0; ; attempt++ {
		index, err := l.write(c, in, id)
		out := outcomeOf(in, err)
		switch {
		case err == nil:
			l.world.oracle.ack(index, id)
			return out
		case out.Outcome == register.Failed && doubt:
			out.Outcome = register.Unknown
			return out
		case out.Outcome != register.Unknown:
			return out
		}
		doubt = true
		if attempt == attempts || !l.world.whole() {
			return out
		}
	}
}

func (l *workload) write(c *client.Client, in register.Input, id string) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), operationLimit)
	defer cancel()
	switch in.Kind {
	case register.Create:
		resp, err := c.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: registerSpec(in), RequestId: id})
		return resp.GetIndex(), err
	case register.Update:
		resp, err := c.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: registerSpec(in), RequestId: id})
		return resp.GetIndex(), err
	default:
		resp, err := c.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: in.Key, RequestId: id})
		return resp.GetIndex(), err
	}
}

const valueKey = "value"

// registerSpec makes a provider that no node can host: its record is a register.
func registerSpec(in register.Input) *pb.ProviderSpec {
	return &pb.ProviderSpec{
		Id: in.Key, Type: "kv", Driver: "memory", Config: map[string]string{valueKey: strconv.FormatUint(in.Value, 10)},
		Placement: &pb.PlacementRules{Node: "nowhere"},
	}
}

// outcomeOf tells what the caller of a write knows.
func outcomeOf(in register.Input, err error) register.Output {
	code := apierror.CodeOf(err)
	switch {
	case err == nil:
		return register.Output{Outcome: register.Done}
	case in.Kind == register.Create && code == pb.ErrorCode_ERROR_CODE_CONFLICT:
		return register.Output{Outcome: register.Exists}
	case in.Kind != register.Create && code == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND:
		return register.Output{Outcome: register.Absent}
	case apierror.From(err).Detail(apierror.DetailOutcome) == apierror.OutcomeFailed:
		return register.Output{Outcome: register.Failed}
	default:
		return register.Output{Outcome: register.Unknown}
	}
}

// read is a linearizable read of one register.
func (l *workload) read(c *client.Client, in register.Input) register.Output {
	ctx, cancel := context.WithTimeout(context.Background(), operationLimit)
	defer cancel()
	got, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: in.Key})
	if err != nil && apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND {
		return register.Output{Outcome: register.Absent}
	}
	if err != nil {
		return register.Output{Outcome: register.Failed}
	}
	value, err := strconv.ParseUint(got.GetProvider().GetSpec().GetConfig()[valueKey], 10, 64)
	if err != nil {
		l.world.violate("linearizable", "a read of %s returned %v", in.Key, got.GetProvider().GetSpec())
	}
	return register.Output{Outcome: register.Done, Value: value, Version: got.GetProvider().GetSpecVersion()}
}

// judge checks the history of the round that is over, and that nothing was made
// more often than it was asked for.
func (l *workload) judge() {
	if !l.world.whole() {
		return
	}
	// What was lost long ago shows only to one who looks.
	for i := range keys {
		in := register.Input{Kind: register.Get, Key: fmt.Sprintf("r%d-%d", l.round, i)}
		called := l.history.now()
		out := l.read(l.clients[0], in)
		if out.Outcome == register.Failed {
			l.world.violate("converge", "register %s cannot be read though everything has healed", in.Key)
		}
		l.history.add(i, in, out, called)
	}
	l.history.judge()
	l.judgeMade()
}

// judgeMade counts instances: a workload that was started twice has too many (I9).
func (l *workload) judgeMade() {
	l.mu.Lock()
	defer l.mu.Unlock()
	view := l.world.oracle.view()
	for name, asked := range l.made {
		if have := len(view.InstancesByName(nil, name)); have > asked {
			l.world.violate("I9", "workload %s has %d instances, %d were asked for once", name, have, asked)
		}
	}
}

// operate does one thing to what runs.
func (l *workload) operate(c *client.Client, dice *rand.Rand) {
	w := l.world
	var names []string
	for _, in := range w.oracle.view().Instances(nil) {
		names = append(names, in.GetId())
	}
	var some string
	if len(names) > 0 {
		some = names[dice.IntN(len(names))]
	}
	p := dice.IntN(100)
	switch {
	case len(names) < 2*len(w.workers) && p < 60:
		l.startInstance(c, dice)
	case some == "":
	case p < 12:
		l.insist(func(ctx context.Context, id string) (uint64, error) {
			resp, err := c.StopInstance(ctx, &pb.StopInstanceRequest{Target: some, RequestId: id})
			return resp.GetIndex(), err
		})
	case p < 24:
		w.mu.Lock()
		w.restarts[some] = time.Now()
		w.mu.Unlock()
		l.insist(func(ctx context.Context, id string) (uint64, error) {
			resp, err := c.RestartInstance(ctx, &pb.RestartInstanceRequest{Target: some, RequestId: id})
			return resp.GetIndex(), err
		})
	case p < 40:
		l.insist(func(ctx context.Context, id string) (uint64, error) {
			resp, err := c.RemoveInstance(ctx, &pb.RemoveInstanceRequest{Target: some, Force: true, RequestId: id})
			return resp.GetIndex(), err
		})
	case p < 46+w.profile.Drains:
		node := w.workerIDs()[dice.IntN(len(w.workers))]
		l.insist(func(ctx context.Context, id string) (uint64, error) {
			resp, err := c.DrainNode(ctx, &pb.DrainNodeRequest{NodeId: node, RequestId: id})
			return resp.GetIndex(), err
		})
	case p < 70:
		for _, node := range w.workerIDs() {
			if n, ok := w.oracle.view().Node(node); ok && n.GetDraining() {
				l.insist(func(ctx context.Context, id string) (uint64, error) {
					resp, err := c.UndrainNode(ctx, &pb.UndrainNodeRequest{NodeId: node, RequestId: id})
					return resp.GetIndex(), err
				})
			}
		}
	}
}

func (l *workload) startInstance(c *client.Client, dice *rand.Rand) {
	w := l.world
	l.mu.Lock()
	l.values++
	name := fmt.Sprintf("app%d", l.values)
	replicas := 1 + dice.IntN(2)
	l.made[name] = replicas
	l.mu.Unlock()
	spec := &pb.WorkloadSpec{
		Name: name, Module: digestOf(guestModule), Replicas: uint32(replicas),
		Restart: &pb.RestartPolicy{Policy: "always", MaxRetries: -1},
	}
	if dice.IntN(2) == 0 {
		spec.OnDisconnect = "stop"
	}
	for _, id := range w.providers {
		spec.Capabilities = append(spec.Capabilities, &pb.CapabilityGrant{Provider: id, Permissions: []string{"kv:read", "kv:write"}})
	}
	l.insist(func(ctx context.Context, id string) (uint64, error) {
		resp, err := c.StartInstance(ctx, &pb.StartInstanceRequest{Spec: spec, RequestId: id})
		return resp.GetIndex(), err
	})
}

// insist makes one write and repeats it while its outcome is unknown.
func (l *workload) insist(write func(ctx context.Context, id string) (uint64, error)) {
	id := uuid.NewString()
	for range insistence + 1 {
		ctx, cancel := context.WithTimeout(context.Background(), operationLimit)
		index, err := write(ctx, id)
		cancel()
		if err == nil {
			l.world.oracle.ack(index, id)
			l.world.counts.Acked.Add(1)
			return
		}
		if apierror.From(err).Detail(apierror.DetailOutcome) != apierror.OutcomeUnknown && !errors.Is(err, context.DeadlineExceeded) {
			return
		}
	}
	l.world.counts.Unknown.Add(1)
}
