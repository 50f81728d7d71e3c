// Hello greets the name it is given and counts its visits in a key-value
// provider. Instances of it keep nothing themselves: any replica on any node
// goes on counting where the last one stopped.
package main

import (
	"errors"
	"fmt"
	"strconv"

	wasmatrix "github.com/wasmatrix/wasmatrix/guest/go"
	"github.com/wasmatrix/wasmatrix/guest/go/invoke"
)

func init() { invoke.Handle(greet) }

func main() {}

func greet(req invoke.Request) (invoke.Response, error) {
	name := string(req.Payload)
	if name == "" {
		name = "world"
	}
	visits, err := count("visits/" + name)
	if err != nil {
		return invoke.Response{}, err
	}
	wasmatrix.Logger().Info("greeted", "name", name, "visits", visits)
	return invoke.Response{
		Payload:     fmt.Appendf(nil, "hello, %s: visit %d\n", name, visits),
		ContentType: "text/plain; charset=utf-8",
	}, nil
}

// count adds one to the number under key and returns it. Other replicas count
// at the same time, so it compares and sets until nobody was faster.
func count(key string) (uint64, error) {
	var kv wasmatrix.KV
	for {
		val, version, err := kv.Get(key)
		if err != nil && !errors.Is(err, wasmatrix.ErrNotFound) {
			return 0, fmt.Errorf("read %s: %w", key, err)
		}
		n, _ := strconv.ParseUint(string(val), 10, 64)
		n++
		swapped, _, err := kv.CompareAndSet(key, version, strconv.AppendUint(nil, n, 10), 0)
		if err != nil {
			return 0, fmt.Errorf("write %s: %w", key, err)
		}
		if swapped {
			return n, nil
		}
	}
}
