package main

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// placement says how new a placement of an instance is.
type placement struct{ created, generation uint64 }

func (p placement) before(other placement) bool {
	if p.created != other.created {
		return p.created < other.created
	}
	return p.generation < other.generation
}

// inventory is a store of things that can be reserved.
type inventory struct {
	pb.UnimplementedProviderServiceServer
	delay time.Duration

	mu        sync.Mutex
	available map[string]int
	reserved  map[string]reservation // by request id, so that a repetition finds its answer
	newest    map[string]placement   // by instance
}

type reservation struct {
	Item      string `json:"item"`
	Quantity  int    `json:"quantity"`
	Available int    `json:"available"`
}

func newInventory(delay time.Duration) *inventory {
	return &inventory{
		delay:     delay,
		available: map[string]int{"bolt": 100, "nut": 100},
		reserved:  map[string]reservation{}, newest: map[string]placement{},
	}
}

// Describe tells what there is. Both operations may be carried out twice: a second
// reserve with the same request id reserves nothing.
func (s *inventory) Describe(context.Context, *pb.ProviderServiceDescribeRequest) (*pb.ProviderServiceDescribeResponse, error) {
	return &pb.ProviderServiceDescribeResponse{Version: "inventory 1.0 (go)", Operations: []*pb.ProviderOperation{
		{Name: "stock", Idempotent: true},
		{Name: "reserve", Idempotent: true},
	}}, nil
}

// Invoke carries out one call. Its permissions were checked before it came here.
func (s *inventory) Invoke(ctx context.Context, req *pb.ProviderServiceInvokeRequest) (*pb.ProviderServiceInvokeResponse, error) {
	var in struct {
		RequestID string `json:"request_id"`
		Item      string `json:"item"`
		Quantity  int    `json:"quantity"`
	}
	if err := json.Unmarshal(req.GetPayload(), &in); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the payload is no JSON: %v", err)
	}
	select {
	case <-time.After(s.delay):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err() // nothing was done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.admit(req); err != nil {
		return nil, err
	}
	var out any
	var err error
	switch req.GetOperation() {
	case "stock":
		out = map[string]any{"item": in.Item, "available": s.available[in.Item]}
	case "reserve":
		out, err = s.reserve(in.RequestID, in.Item, in.Quantity)
	default:
		err = status.Errorf(codes.Unimplemented, "operation %q is unknown", req.GetOperation())
	}
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(out)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "encode the answer: %v", err)
	}
	return &pb.ProviderServiceInvokeResponse{Payload: payload}, nil
}

// admit refuses an instance that was replaced by a newer placement. It is called
// in the critical section of the effect; with a database it is the same
// transaction.
func (s *inventory) admit(req *pb.ProviderServiceInvokeRequest) error {
	if req.GetInstanceId() == "" {
		return nil // a user
	}
	now := placement{req.GetCreatedIndex(), req.GetGeneration()}
	if now.before(s.newest[req.GetInstanceId()]) {
		return status.Errorf(codes.PermissionDenied, "generation %d of instance %s was superseded", req.GetGeneration(), req.GetInstanceId())
	}
	s.newest[req.GetInstanceId()] = now
	return nil
}

func (s *inventory) reserve(id, item string, quantity int) (any, error) {
	if id == "" || quantity < 1 {
		return nil, status.Error(codes.InvalidArgument, "a reservation needs a request_id and a quantity of at least 1")
	}
	if done, again := s.reserved[id]; again {
		return done, nil
	}
	if s.available[item] < quantity {
		return nil, status.Errorf(codes.FailedPrecondition, "only %d of %s are left", s.available[item], item)
	}
	s.available[item] -= quantity
	s.reserved[id] = reservation{Item: item, Quantity: quantity, Available: s.available[item]}
	return s.reserved[id], nil
}
