package dispatch

import (
	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	"github.com/wasmatrix/wasmatrix/fsm"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// maxMessageBytes bounds one message, well below what gRPC lets through (16 MiB).
const maxMessageBytes = 8 << 20

// session computes the stream of one node. It belongs to one goroutine.
type session struct {
	self     holder
	reader   *reader
	sent     set
	sequence uint64
}

func newSession(self holder, dirs *directories) *session {
	return &session{self: self, reader: newReader(dirs)}
}

// next moves the session to view and returns the messages that are due: at first
// the full set, then the difference to what was returned before, if any.
func (s *session) next(view fsm.View) []*pb.WatchAssignmentsResponse {
	if !s.reader.refresh(view) {
		return nil
	}
	s.reader.round++
	now := collect(s.reader, s.self)
	s.reader.collected()
	changes := difference(s.sent, now)
	complete := s.sent == nil
	s.sent = now
	if len(changes) == 0 && !complete {
		return nil
	}
	return s.pack(changes, complete, view.Index())
}

// watch makes ws fire when next may return something.
func (s *session) watch(ws memdb.WatchSet) {
	s.reader.watch(ws)
	node, known := s.reader.view.Node(s.self.node)
	s.reader.dirs.nodes.watch(ws, s.self.node, node, known)
}

// pack puts changes into as few messages as their size allows.
func (s *session) pack(changes []*pb.AssignmentChange, complete bool, index uint64) []*pb.WatchAssignmentsResponse {
	var out []*pb.WatchAssignmentsResponse
	for first := true; first || len(changes) > 0; first = false {
		n, size := 0, 0
		for n < len(changes) {
			size += proto.Size(changes[n])
			if n > 0 && size > maxMessageBytes {
				break
			}
			n++
		}
		message := &pb.WatchAssignmentsResponse{
			Complete: complete, AppliesTo: s.sequence, ResultsIn: s.sequence + 1,
			Changes: changes[:n], Index: index, More: complete && n < len(changes),
		}
		s.sequence++
		changes = changes[n:]
		out = append(out, message)
	}
	return out
}
