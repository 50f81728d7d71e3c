package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/client"
	"github.com/wasmatrix/wasmatrix/internal/pause"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/test/register"
)

const (
	// callTimeout bounds one operation, with all that the client library repeats. A
	// read gives up earlier, at random down to readTimeout, and is made again: so
	// there are young reads on their way to a peer that stands, when it goes on.
	callTimeout = 3 * time.Second
	readTimeout = 200 * time.Millisecond
	// keysAtOnce is how many keys are in use at a time, and keyLife how many
	// operations all of them together see before new ones take their place: a short
	// life keeps the check of a key fast however many unknown outcomes it has.
	keysAtOnce = 8
	keyLife    = 2000
	// meanPause is how long a client rests between two operations, on average.
	meanPause = 4 * time.Millisecond
	// readerPause is how long a reader rests between two reads, on average.
	readerPause = 15 * time.Millisecond
	// valueKey is the setting of a provider that holds the value.
	valueKey = "value"
)

// errOutcome is returned for an answer that the model does not know.
var errOutcome = errors.New("an answer that cannot be")

// reader is what reads one peer, and no other one when that does not answer.
type reader interface {
	GetProvider(ctx context.Context, in *pb.GetProviderRequest, opts ...grpc.CallOption) (*pb.GetProviderResponse, error)
}

// readersAtOnce is how many reads are on their way to each peer.
const readersAtOnce = 3

// load is several clients that work on the same keys.
type load struct {
	history *history
	clients []*client.Client
	readers []reader // a client leaves a peer that does not answer; these do not
	seed    uint64

	started atomic.Int64 // operations, which decides the keys in use
	acked   atomic.Int64 // writes with an answer
	unsure  atomic.Int64 // operations whose outcome is unknown, reads without an answer included

	mu    sync.Mutex
	codes map[string]int // failures by code
	wrong error          // the first answer that cannot be
}

func newLoad(h *history, clients []*client.Client, readers []reader, seed uint64) *load {
	return &load{history: h, clients: clients, readers: readers, seed: seed, codes: map[string]int{}}
}

// run runs all clients until ctx ends; operations under way are finished.
func (l *load) run(ctx context.Context) {
	var wg sync.WaitGroup
	for i, c := range l.clients {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(l.seed, uint64(i)))
			for ctx.Err() == nil {
				in, limit := l.next(random, i), callTimeout
				if in.Kind == register.Get {
					limit = min(callTimeout, readTimeout+time.Duration(random.ExpFloat64()*float64(readTimeout)))
				}
				l.do(context.WithoutCancel(ctx), c, i, in, limit)
				pause.For(ctx, time.Duration(random.ExpFloat64()*float64(meanPause)))
			}
		})
	}
	for i, one := range l.readers {
		for j := range readersAtOnce {
			id := len(l.clients) + i*readersAtOnce + j
			random := rand.New(rand.NewPCG(l.seed, uint64(id)))
			wg.Go(func() {
				for ctx.Err() == nil {
					in := register.Input{Kind: register.Get, Key: key(int(l.started.Load()/keyLife), random.IntN(keysAtOnce))}
					call := l.history.now()
					read, cancel := context.WithTimeout(context.WithoutCancel(ctx), readTimeout)
					out, _ := readAt(read, one, in.Key) // without an answer it says nothing
					cancel()
					l.history.add(id, in, out, call)
					pause.For(ctx, time.Duration(random.ExpFloat64()*float64(readerPause)))
				}
			})
		}
	}
	wg.Wait()
}

// next draws an operation. Values are never used twice in one history.
func (l *load) next(random *rand.Rand, client int) register.Input {
	n := l.started.Add(1)
	in := register.Input{Key: key(int(n/keyLife), random.IntN(keysAtOnce)), Value: uint64(int(n)*len(l.clients) + client)}
	switch p := random.IntN(100); {
	case p < 42:
		in.Kind = register.Get
	case p < 80:
		in.Kind = register.Update
	case p < 92:
		in.Kind = register.Create
	default:
		in.Kind = register.Remove
	}
	return in
}

func key(life, i int) string { return fmt.Sprintf("k%d-%d", life, i) }

// readAll reads every key that was ever used, so that what was lost long ago shows too.
func (l *load) readAll(ctx context.Context) error {
	for life := range int(l.started.Load()/keyLife) + 1 {
		for i := range keysAtOnce {
			before := l.unsure.Load()
			l.do(ctx, l.clients[i%len(l.clients)], i%len(l.clients), register.Input{Kind: register.Get, Key: key(life, i)}, callTimeout)
			if l.unsure.Load() != before {
				return fmt.Errorf("the last read of %s got no answer: %v", key(life, i), l.failures())
			}
		}
	}
	return nil
}

// do makes one call and records it.
func (l *load) do(ctx context.Context, c *client.Client, id int, in register.Input, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	call := l.history.now()
	out, err := perform(ctx, c, in)
	l.history.add(id, in, out, call)
	if err == nil {
		if in.Kind != register.Get {
			l.acked.Add(1)
		}
		return
	}
	l.unsure.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.codes[apierror.CodeOf(err).String()]++
	if errors.Is(err, errOutcome) && l.wrong == nil {
		l.wrong = err
	}
}

// failures returns how many calls failed, by code.
func (l *load) failures() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.codes)
}

// err returns the first answer that no order of operations explains by itself.
func (l *load) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wrong
}

// perform makes one call. An error comes with an unknown outcome.
func perform(ctx context.Context, c *client.Client, in register.Input) (register.Output, error) {
	var err error
	switch in.Kind {
	case register.Get:
		return readAt(ctx, c, in.Key)
	case register.Create:
		_, err = c.RegisterProvider(ctx, &pb.RegisterProviderRequest{Spec: spec(in)})
	case register.Update:
		_, err = c.UpdateProvider(ctx, &pb.UpdateProviderRequest{Spec: spec(in)})
	default:
		_, err = c.DeregisterProvider(ctx, &pb.DeregisterProviderRequest{ProviderId: in.Key})
	}
	switch code := apierror.CodeOf(err); {
	case err == nil:
		return register.Output{}, nil
	case apierror.From(err).Detail(apierror.DetailOutcome) == apierror.OutcomeFailed && passes(code):
		return register.Output{Outcome: register.Failed}, err
	case in.Kind == register.Create && code == pb.ErrorCode_ERROR_CODE_CONFLICT:
		return register.Output{Outcome: register.Exists}, nil
	case in.Kind != register.Create && code == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND:
		return register.Output{Outcome: register.Absent}, nil
	case code == pb.ErrorCode_ERROR_CODE_CONFLICT, code == pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
		code == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, code == pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED:
		err = fmt.Errorf("%w: %s %s: %w", errOutcome, in.Kind, in.Key, err)
	}
	return register.Output{Outcome: register.Unknown}, err
}

// passes reports whether the failure says nothing of the state of the key.
func passes(code pb.ErrorCode) bool {
	return code != pb.ErrorCode_ERROR_CODE_CONFLICT && code != pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND &&
		code != pb.ErrorCode_ERROR_CODE_INVALID_REQUEST && code != pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED
}

// readAt is a linearizable read of one key.
func readAt(ctx context.Context, c reader, key string) (register.Output, error) {
	got, err := c.GetProvider(ctx, &pb.GetProviderRequest{ProviderId: key})
	if apierror.CodeOf(err) == pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND && err != nil {
		return register.Output{Outcome: register.Absent}, nil
	}
	if err != nil {
		return register.Output{Outcome: register.Unknown}, err
	}
	value, err := strconv.ParseUint(got.Provider.Spec.Config[valueKey], 10, 64)
	if err != nil {
		return register.Output{Outcome: register.Unknown}, fmt.Errorf("%w: get %s: %w", errOutcome, key, err)
	}
	return register.Output{Value: value, Version: got.Provider.SpecVersion}, nil
}

// spec is a provider that no node may run: a record in the registry and nothing else.
func spec(in register.Input) *pb.ProviderSpec {
	return &pb.ProviderSpec{
		Id: in.Key, Type: "kv", Driver: "memory", Config: map[string]string{valueKey: strconv.FormatUint(in.Value, 10)},
		Placement: &pb.PlacementRules{Labels: map[string]string{"node": "none-has-this"}},
	}
}
