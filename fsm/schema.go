package fsm

import (
	"encoding/binary"
	"fmt"

	"github.com/hashicorp/go-memdb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	tableNodes       = "nodes"
	tablePeers       = "peers"
	tableModules     = "modules"
	tableInstances   = "instances"
	tableProviders   = "providers"
	tableAssignments = "assignments"
	tableEvents      = "events"
	tableDedup       = "dedup"
	tableSessions    = "sessions"
	tableLoads       = "loads"
)

const (
	indexID       = "id"
	indexPrefix   = "id_prefix"
	indexName     = "name"
	indexNode     = "node"
	indexUnplaced = "unplaced"
	indexProvider = "provider"
	indexOrder    = "order"
	indexSession  = "session"
	indexExpiry   = "expiry"
)

// terminator ends a string in an index key, so that "a" is no prefix of "ab".
// checkID keeps it out of every id.
const terminator = "\x00"

// load counts the instances that take room on a node. It is derived from the
// instances and lives in a table so that a View sees counts of its own index.
type load struct {
	node      string
	instances int
}

// textIndex indexes records of type T by a string; a record for which value
// reports false is left out.
type textIndex[T any] struct {
	value func(T) (string, bool)
}

// FromObject implements memdb.SingleIndexer.
func (x textIndex[T]) FromObject(raw any) (bool, []byte, error) {
	rec, ok := raw.(T)
	if !ok {
		return false, nil, fmt.Errorf("a %T is in the table of another type", raw)
	}
	v, ok := x.value(rec)
	if !ok {
		return false, nil, nil
	}
	return true, []byte(v + terminator), nil
}

// FromArgs implements memdb.Indexer; the arguments are the parts of a key.
func (x textIndex[T]) FromArgs(args ...any) ([]byte, error) {
	var key []byte
	for _, arg := range args {
		part, ok := arg.(string)
		if !ok {
			return nil, fmt.Errorf("a part of a key is a %T, not a string", arg)
		}
		key = append(append(key, part...), terminator...)
	}
	return key, nil
}

// PrefixFromArgs implements memdb.PrefixIndexer; the argument is the prefix.
func (x textIndex[T]) PrefixFromArgs(args ...any) ([]byte, error) {
	if len(args) != 1 {
		return nil, fmt.Errorf("a prefix has one part, not %d", len(args))
	}
	prefix, ok := args[0].(string)
	if !ok {
		return nil, fmt.Errorf("a prefix is a %T, not a string", args[0])
	}
	return []byte(prefix), nil
}

// numberIndex indexes records of type T by a number, in numeric order; a record
// for which skip, which may be nil, reports true is left out.
type numberIndex[T any] struct {
	value func(T) uint64
	skip  func(T) bool
}

// FromObject implements memdb.SingleIndexer.
func (x numberIndex[T]) FromObject(raw any) (bool, []byte, error) {
	rec, ok := raw.(T)
	if !ok || x.skip != nil && x.skip(rec) {
		return false, nil, wrongType(ok, raw)
	}
	return true, binary.BigEndian.AppendUint64(nil, x.value(rec)), nil
}

// FromArgs implements memdb.Indexer; the argument is the number.
func (x numberIndex[T]) FromArgs(args ...any) ([]byte, error) {
	if len(args) != 1 {
		return nil, fmt.Errorf("a number has one part, not %d", len(args))
	}
	n, ok := args[0].(uint64)
	if !ok {
		return nil, fmt.Errorf("a number is a %T, not a uint64", args[0])
	}
	return binary.BigEndian.AppendUint64(nil, n), nil
}

// unique is the index by which every record of a table is found.
func unique(indexer memdb.Indexer) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: indexID, Unique: true, Indexer: indexer}
}

// uniqueSome is an index that leaves records out.
func uniqueSome(name string, indexer memdb.Indexer) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: name, Unique: true, AllowMissing: true, Indexer: indexer}
}

// wrongType is the error of an indexer that was given a record of another type.
func wrongType(ok bool, raw any) error {
	if ok {
		return nil
	}
	return fmt.Errorf("a %T is in the table of another type", raw)
}

// some is an index that leaves records out and holds several under one key.
func some(name string, indexer memdb.Indexer) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: name, AllowMissing: true, Indexer: indexer}
}

func byText[T any](value func(T) string) memdb.Indexer {
	return textIndex[T]{value: func(rec T) (string, bool) {
		v := value(rec)
		return v, v != ""
	}}
}

func tableOf(name string, indexes ...*memdb.IndexSchema) *memdb.TableSchema {
	t := &memdb.TableSchema{Name: name, Indexes: map[string]*memdb.IndexSchema{}}
	for _, x := range indexes {
		t.Indexes[x.Name] = x
	}
	return t
}

func assignmentKey(instanceID, providerID string) string {
	return instanceID + terminator + providerID
}

func schema() *memdb.DBSchema {
	tables := []*memdb.TableSchema{
		tableOf(tableNodes, unique(byText((*pb.Node).GetId))),
		tableOf(tablePeers, unique(byText((*pb.Peer).GetId))),
		tableOf(tableModules, unique(byText((*pb.Module).GetDigest))),
		tableOf(
			tableInstances,
			unique(byText((*pb.Instance).GetId)),
			some(indexName, byText((*pb.Instance).GetName)),
			some(indexNode, textIndex[*pb.Instance]{value: func(in *pb.Instance) (string, bool) {
				return in.GetPlacement().GetNodeId(), Placed(in)
			}}),
			some(indexUnplaced, textIndex[*pb.Instance]{value: func(in *pb.Instance) (string, bool) {
				return in.GetId(), Unplaced(in)
			}}),
		),
		tableOf(
			tableProviders,
			unique(byText(func(p *pb.Provider) string { return replicaKey(p.GetId(), p.GetReplica()) })),
			some(indexNode, byText(func(p *pb.Provider) string { return p.GetPlacement().GetNodeId() })),
			some(indexUnplaced, textIndex[*pb.Provider]{value: func(p *pb.Provider) (string, bool) {
				return p.GetId(), ProviderUnplaced(p)
			}}),
		),
		tableOf(
			tableAssignments,
			unique(byText(func(a *pb.CapabilityAssignment) string {
				return assignmentKey(a.GetInstanceId(), a.GetProviderId())
			})),
			some(indexProvider, byText((*pb.CapabilityAssignment).GetProviderId)),
		),
		tableOf(tableEvents, unique(numberIndex[*pb.Event]{value: (*pb.Event).GetSequence})),
		tableOf(
			tableDedup,
			unique(byText((*pb.DedupRecord).GetRequestId)),
			uniqueSome(indexOrder, numberIndex[*pb.DedupRecord]{
				value: func(d *pb.DedupRecord) uint64 { return d.GetResult().GetIndex() },
				skip:  func(d *pb.DedupRecord) bool { return d.GetSessionId() != "" },
			}),
			uniqueSome(indexSession, sessionIndex{}),
		),
		tableOf(
			tableSessions,
			unique(byText((*pb.ClientSession).GetId)),
			some(indexOrder, numberIndex[*pb.ClientSession]{value: func(s *pb.ClientSession) uint64 {
				return nanos(s.GetActiveAt())
			}}),
			some(indexExpiry, numberIndex[*pb.ClientSession]{value: expiryOf}),
		),
		tableOf(tableLoads, unique(byText(func(l *load) string { return l.node }))),
	}
	s := &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{}}
	for _, t := range tables {
		s.Tables[t.Name] = t
	}
	return s
}

// must stops the program on an error of go-memdb or of encoding a valid message.
// Such an error means that the schema above and the code disagree; no input can
// cause it, and going on would let this peer's state differ from the others'.
func must(err error) {
	if err != nil {
		panic(fmt.Errorf("fsm: defect in the state tables: %w", err))
	}
}

// first returns the first record of a table with the given key.
func first[T any](txn *memdb.Txn, table, index string, args ...any) (T, bool) {
	raw, err := txn.First(table, index, args...)
	must(err)
	rec, ok := raw.(T)
	return rec, ok
}

// list returns the records with the given key in the order of the index and
// adds what would change that answer to ws, which may be nil.
func list[T any](txn *memdb.Txn, ws memdb.WatchSet, table, index string, args ...any) []T {
	it, err := txn.Get(table, index, args...)
	must(err)
	if ws != nil {
		ws.Add(it.WatchCh())
	}
	return collect[T](it, 0)
}

// collect returns at most limit records of it; 0 means all.
func collect[T any](it memdb.ResultIterator, limit int) []T {
	var out []T
	for raw := it.Next(); raw != nil; raw = it.Next() {
		if rec, ok := raw.(T); ok {
			out = append(out, rec)
		}
		if limit > 0 && len(out) == limit {
			break
		}
	}
	return out
}
