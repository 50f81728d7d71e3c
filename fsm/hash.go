package fsm

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// What a change in the running hash is about. The numbers are part of the hash:
// they are never used for anything else.
const (
	hashNode       byte = 1
	hashPeer       byte = 2
	hashModule     byte = 3
	hashInstance   byte = 4
	hashProvider   byte = 5
	hashAssignment byte = 6
	hashEvent      byte = 7
	hashDedup      byte = 8
	hashSpec       byte = 9
	hashSession    byte = 10
	hashCluster    byte = 11
	hashDenials    byte = 12
)

const (
	hashPut    byte = 1
	hashDelete byte = 2
)

type digest = [sha256.Size]byte

// chain folds the changes of one command after the other into a running hash.
type chain struct {
	h    hash.Hash
	buf  []byte
	spec *pb.WorkloadSpec
}

func newChain() *chain { return &chain{h: sha256.New()} }

// begin opens a command.
func (c *chain) begin(previous digest, index uint64) {
	c.spec = nil
	c.h.Reset()
	c.buf = append(c.buf[:0], previous[:]...)
	c.buf = binary.BigEndian.AppendUint64(c.buf, index)
	c.h.Write(c.buf)
}

// put notes a record that was written.
func (c *chain) put(kind byte, m proto.Message) {
	c.buf = append(c.buf[:0], kind, hashPut, 0, 0, 0, 0)
	const head = 6
	var err error
	c.buf, err = proto.MarshalOptions{Deterministic: true}.MarshalAppend(c.buf, m)
	must(err)
	binary.BigEndian.PutUint32(c.buf[head-4:head], uint32(len(c.buf)-head))
	c.h.Write(c.buf)
}

// putInstance notes an instance that was written. Its spec, which may hold
// megabytes and never changes, is noted once when it is new: a thousand
// replicas share one spec, and a status report does not touch it.
func (c *chain) putInstance(old, in *pb.Instance) {
	if spec := in.GetSpec(); spec != old.GetSpec() && spec != c.spec {
		c.put(hashSpec, spec)
		c.spec = spec
	}
	bare := shallow(in)
	bare.Spec = nil
	c.put(hashInstance, bare)
}

// remove notes a record that was deleted.
func (c *chain) remove(kind byte, key string) {
	c.buf = append(c.buf[:0], kind, hashDelete)
	c.buf = binary.BigEndian.AppendUint32(c.buf, uint32(len(key)))
	c.buf = append(c.buf, key...)
	c.h.Write(c.buf)
}

// end closes the command and returns the new hash. It does not hold on to the
// memory that a rare large record needed.
func (c *chain) end() digest {
	var sum digest
	c.h.Sum(sum[:0])
	if cap(c.buf) > 1<<20 {
		c.buf = nil
	}
	return sum
}

// shallow returns a copy of m that shares the messages, lists and maps inside
// it. It goes by the descriptor, so that a field added later is never lost, and
// keeps fields this version does not know.
func shallow[M proto.Message](m M) M {
	from := m.ProtoReflect()
	to := from.New()
	for fd, v := range from.Range {
		to.Set(fd, v)
	}
	to.SetUnknown(from.GetUnknown())
	out, _ := to.Interface().(M)
	return out
}
