package provider_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/wasmatrix/wasmatrix/provider"
)

func instance(id, node string, generation uint64) provider.InstanceRecord {
	return provider.InstanceRecord{ID: id, Name: id, Node: node, Generation: generation}
}

func wantInstance(t *testing.T, d *provider.Directory, id, node string, generation uint64) {
	t.Helper()
	got, ok := d.Instance(id)
	if ok != (node != "") || ok && (got.Node != node || got.Generation != generation) {
		t.Errorf("instance %s = %+v, %v; want node %q generation %d", id, got, ok, node, generation)
	}
}

func TestDirectoryRefusesLowerGenerations(t *testing.T) {
	d := provider.NewDirectory("n1")
	for _, rec := range []provider.InstanceRecord{instance("i", "n1", 4), instance("i", "n1", 4), instance("i", "n2", 5)} {
		if !d.PutInstance(rec) {
			t.Fatalf("%+v, an equal or higher generation, was refused", rec)
		}
	}
	if d.PutInstance(instance("i", "n1", 4)) {
		t.Error("a lower generation was taken")
	}
	wantInstance(t, d, "i", "n2", 5)
	d.RemoveRemoteInstance("i")
	if d.PutInstance(instance("i", "n1", 4)) {
		t.Error("a lower generation was taken after the instance was removed")
	}
	wantInstance(t, d, "i", "", 0)
	if !d.PutInstance(instance("i", "n1", 6)) {
		t.Error("a higher generation was refused")
	}
}

func TestDirectoryReplaceKeepsTheFence(t *testing.T) {
	d := provider.NewDirectory("n1")
	d.Replace(provider.Records{Instances: []provider.InstanceRecord{
		instance("a", "n1", 5), instance("b", "n1", 5), instance("c", "n1", 5),
	}})
	stale := d.Replace(provider.Records{Instances: []provider.InstanceRecord{
		instance("a", "n2", 4), instance("b", "n2", 6),
	}})
	if !slices.Equal(stale, []string{"a"}) {
		t.Errorf("stale = %v, want a", stale)
	}
	wantInstance(t, d, "a", "n1", 5)
	wantInstance(t, d, "b", "n2", 6)
	wantInstance(t, d, "c", "", 0)
	if stale := d.Replace(provider.Records{Instances: []provider.InstanceRecord{instance("c", "n1", 4)}}); !slices.Equal(stale, []string{"c"}) {
		t.Errorf("stale = %v, want c: its fence must outlive two full sets", stale)
	}
	wantInstance(t, d, "c", "", 0)
}

// An instance that moves is removed here and put there by two changes of one
// difference, in whatever order.
func TestDirectoryMoveWorksInAnyOrder(t *testing.T) {
	d := provider.NewDirectory("n1")
	d.PutInstance(instance("i", "n1", 1))
	d.PutInstance(instance("i", "n2", 2))
	d.RemoveInstance("i")
	wantInstance(t, d, "i", "n2", 2)
	d.PutInstance(instance("i", "n1", 3))
	d.RemoveRemoteInstance("i")
	wantInstance(t, d, "i", "n1", 3)
	d.RemoveInstance("i")
	wantInstance(t, d, "i", "", 0)
}

func TestDirectoryReplaceForgetsWhatIsNotInIt(t *testing.T) {
	d := provider.NewDirectory("n1")
	d.Replace(records(t))
	d.Replace(provider.Records{})
	if _, ok := d.Provider("kv"); ok {
		t.Error("a provider is still known")
	}
	if len(d.Assignments("i")) != 0 {
		t.Error("an assignment is still known")
	}
	if _, ok := d.NodeAddress("n2"); ok {
		t.Error("a node is still known")
	}
}

func TestDirectorySignalsEveryChange(t *testing.T) {
	d := provider.NewDirectory("n1")
	changes := map[string]func(){
		"replace":           func() { d.Replace(records(t)) },
		"put instance":      func() { d.PutInstance(instance("x", "n1", 1)) },
		"remove instance":   func() { d.RemoveInstance("x") },
		"put provider":      func() { d.PutProvider(provider.ProviderRecord{ID: "p"}) },
		"remove provider":   func() { d.RemoveProvider("p") },
		"put assignment":    func() { d.PutAssignment(provider.Assignment{Instance: "x", Provider: "p"}) },
		"remove assignment": func() { d.RemoveAssignment("x", "p") },
		"put node":          func() { d.PutNode(provider.NodeRecord{ID: "n"}) },
		"remove node":       func() { d.RemoveNode("n") },
	}
	for name, change := range changes {
		first, second := d.Changed(), d.Changed()
		select {
		case <-first:
			t.Fatalf("signalled before %s", name)
		default:
		}
		change()
		for _, c := range []<-chan struct{}{first, second} {
			select {
			case <-c:
			default:
				t.Errorf("%s was not signalled", name)
			}
		}
	}
}

func TestDirectoryAssignmentsAgreeWithAModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := provider.NewDirectory("n1")
		model := map[[2]string]string{}
		id := rapid.SampledFrom([]string{"a", "b", "c"})
		rt.Repeat(map[string]func(*rapid.T){
			"put": func(rt *rapid.T) {
				k := [2]string{id.Draw(rt, "instance"), id.Draw(rt, "provider")}
				model[k] = rapid.String().Draw(rt, "bucket")
				d.PutAssignment(provider.Assignment{Instance: k[0], Provider: k[1], Bucket: model[k]})
			},
			"remove": func(rt *rapid.T) {
				k := [2]string{id.Draw(rt, "instance"), id.Draw(rt, "provider")}
				delete(model, k)
				d.RemoveAssignment(k[0], k[1])
			},
			"": func(rt *rapid.T) {
				n := 0
				for _, i := range []string{"a", "b", "c"} {
					list := d.Assignments(i)
					n += len(list)
					for _, a := range list {
						if bucket, ok := model[[2]string{i, a.Provider}]; !ok || bucket != a.Bucket {
							rt.Fatalf("assignment %+v, the model has %v", a, model)
						}
					}
				}
				if n != len(model) {
					rt.Fatalf("%d assignments, the model has %d", n, len(model))
				}
			},
		})
	})
}

// Readers never see half of a Replace: the set is either all of the one or all
// of the other.
func TestDirectoryReplaceIsAtomic(t *testing.T) {
	d := provider.NewDirectory("n1")
	full := func(bucket string) provider.Records {
		return provider.Records{
			Instances:   []provider.InstanceRecord{{ID: "i", Name: bucket, Node: "n1", Generation: 1}},
			Providers:   []provider.ProviderRecord{{ID: "kv", Type: "kv", Node: "n1", State: bucket}},
			Assignments: []provider.Assignment{{Instance: "i", Provider: "kv", Bucket: bucket}},
		}
	}
	d.Replace(full("x"))
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		defer close(stop)
		for n := range 500 {
			d.Replace(full([]string{"x", "y"}[n%2]))
		}
	})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				f := d.Facts("i", "kv", "")
				if f.Candidates != 1 || f.Instance.Name != f.Assignment.Bucket || f.Provider.State != f.Assignment.Bucket {
					t.Errorf("a mixed view: %+v", f)
					return
				}
			}
		})
	}
	wg.Wait()
}

// The memory of fences for instances that are gone is bounded.
func TestDirectoryForgetsTheOldestFences(t *testing.T) {
	d := provider.NewDirectory("n1")
	const many = 3 << 16
	for i := range many {
		d.PutInstance(instance(fmt.Sprint(i), "n1", 9))
		d.RemoveInstance(fmt.Sprint(i))
	}
	if d.PutInstance(instance(fmt.Sprint(many-1), "n1", 8)) {
		t.Error("the fence of the instance that went last is forgotten")
	}
	if !d.PutInstance(instance("0", "n1", 8)) {
		t.Error("the fence of the instance that went first is kept for ever")
	}
}

func BenchmarkDirectoryFacts(b *testing.B) {
	d := provider.NewDirectory("n1")
	var r provider.Records
	for i := range 10000 {
		id := fmt.Sprintf("hello-%05d", i)
		r.Instances = append(r.Instances, instance(id, "n1", 1))
		r.Assignments = append(r.Assignments, provider.Assignment{Instance: id, Provider: "kv", Permissions: set(b, "kv:read")})
	}
	r.Providers = []provider.ProviderRecord{{ID: "kv", Type: "kv", Node: "n1", Running: true}}
	d.Replace(r)
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			d.Facts("hello-05000", "kv", "kv")
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				d.Facts("hello-05000", "kv", "kv")
			}
		})
	})
	b.Run("put", func(b *testing.B) {
		for b.Loop() {
			d.PutInstance(instance("hello-05000", "n1", 1))
		}
	})
}
