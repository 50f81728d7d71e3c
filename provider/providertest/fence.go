package providertest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// as makes one call as a generation of an instance.
func (f *fixture) as(instance string, m provider.Mark, operation string, request proto.Message) error {
	payload, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	_, err = f.p.Invoke(f.Context(), provider.Call{
		Instance: instance, Name: "n", Generation: m.Generation, Created: m.Created,
		Bucket: f.bucket, Operation: operation, Payload: payload,
	})
	return err
}

// requests are one request of each operation, under a key.
func requests(key string) map[string]proto.Message {
	k := []byte(key)
	return map[string]proto.Message{
		"get": &pb.KvGetRequest{Key: k}, "list": &pb.KvListRequest{Prefix: k}, "set": &pb.KvSetRequest{Key: k},
		"cas": &pb.KvCasRequest{Key: k}, "delete": &pb.KvDeleteRequest{Key: k},
	}
}

func testGenerations(t *testing.T, f *fixture) {
	for operation, request := range requests("k") {
		mover, other := "mover-"+operation, "other-"+operation
		steps := []struct {
			what     string
			instance string
			mark     provider.Mark
			let      bool
		}{
			{"the first", mover, provider.Mark{Created: 10, Generation: 2}, true},
			{"again", mover, provider.Mark{Created: 10, Generation: 2}, true},
			{"an older one", mover, provider.Mark{Created: 10, Generation: 1}, false},
			{"a newer one", mover, provider.Mark{Created: 10, Generation: 5}, true},
			{"the first after it", mover, provider.Mark{Created: 10, Generation: 2}, false},
			{"one in between", mover, provider.Mark{Created: 10, Generation: 4}, false},
			{"the newer one again", mover, provider.Mark{Created: 10, Generation: 5}, true},
			{"another instance", other, provider.Mark{Created: 11, Generation: 1}, true},
			{"a later instance of the same id", mover, provider.Mark{Created: 20, Generation: 1}, true},
			{"the instance before it", mover, provider.Mark{Created: 10, Generation: 6}, false},
			{"a user", "", provider.Mark{}, true},
		}
		for _, s := range steps {
			err := f.as(s.instance, s.mark, operation, request)
			if s.let && err != nil || !s.let && !errors.Is(err, provider.ErrDenied) {
				t.Errorf("%s: %s: let in %t wanted, got %v", operation, s.what, s.let, err)
			}
		}
	}
}

// testGenerationsRace lets generations write at the same time. The versions show
// the order in which they were let in: it must never go back.
func testGenerationsRace(t *testing.T, f *fixture) {
	const generations, writes = 4, 100
	var wg sync.WaitGroup
	for g := range generations {
		wg.Go(func() {
			for n := range writes {
				key := fmt.Sprintf("effect/%d/%d", g, n)
				err := f.as("racer", provider.Mark{Generation: uint64(g + 1)}, "set", &pb.KvSetRequest{Key: []byte(key), Value: []byte{byte(g)}}) //nolint:gosec // small
				if err != nil && !errors.Is(err, provider.ErrDenied) {
					t.Errorf("%s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	byVersion := map[uint64]byte{}
	for cursor := []byte(nil); ; {
		page := f.list(&pb.KvListRequest{Prefix: []byte("effect/"), Limit: 1000, Cursor: cursor})
		for _, e := range page.GetEntries() {
			byVersion[e.GetVersion()] = e.GetValue()[0]
		}
		if cursor = page.GetNextCursor(); len(cursor) == 0 {
			break
		}
	}
	newest := byte(0)
	for _, v := range slices.Sorted(maps.Keys(byVersion)) {
		g := byVersion[v]
		if g < newest {
			t.Fatalf("generation %d was let in at version %d, after %d", g+1, v, newest+1)
		}
		newest = max(newest, g)
	}
	if newest != generations-1 {
		t.Errorf("the newest generation let in is %d", newest+1)
	}
}
