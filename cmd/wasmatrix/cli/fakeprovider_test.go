package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func (f *fake) provider(id string) *pb.Provider {
	for _, p := range f.providers {
		if p.GetId() == id {
			return p
		}
	}
	return nil
}

// setProvider changes all replicas of a provider, right after it has answered.
func (f *fake) setProvider(id string, running bool, state pb.ProviderState) (*pb.Provider, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.provider(id)
	if p == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", id)
	}
	answer, _ := proto.Clone(p).(*pb.Provider)
	go f.change(pb.EventKind_EVENT_KIND_PROVIDER_STARTED, "", func() {
		for _, p := range f.providers {
			if p.GetId() == id {
				p.DesiredRunning, p.Status.State, p.Status.SpecVersion = running, state, p.GetSpecVersion()
			}
		}
	})
	return answer, nil
}

func (f *fake) RegisterProvider(_ context.Context, req *pb.RegisterProviderRequest) (*pb.RegisterProviderResponse, error) {
	f.mu.Lock()
	for n := range max(1, req.GetSpec().GetReplicas()) {
		p := newProvider(req.GetSpec().GetId(), req.GetSpec().GetType(), pb.ProviderState_PROVIDER_STATE_PENDING)
		p.Spec.Replicas, p.Replica = req.GetSpec().GetReplicas(), n
		f.providers = append(f.providers, p)
	}
	f.mu.Unlock()
	p, err := f.setProvider(req.GetSpec().GetId(), true, f.opens)
	return &pb.RegisterProviderResponse{Provider: p}, err
}

func (f *fake) UpdateProvider(_ context.Context, req *pb.UpdateProviderRequest) (*pb.UpdateProviderResponse, error) {
	f.mu.Lock()
	p := f.provider(req.GetSpec().GetId())
	p.SpecVersion++
	answer, _ := proto.Clone(p).(*pb.Provider)
	byHand := f.byHand
	f.mu.Unlock()
	if byHand {
		return &pb.UpdateProviderResponse{Provider: answer}, nil
	}
	p, err := f.setProvider(req.GetSpec().GetId(), true, f.opens)
	return &pb.UpdateProviderResponse{Provider: p}, err
}

func (f *fake) StartProvider(_ context.Context, req *pb.StartProviderRequest) (*pb.StartProviderResponse, error) {
	p, err := f.setProvider(req.GetProviderId(), true, f.opens)
	return &pb.StartProviderResponse{Provider: p}, err
}

func (f *fake) StopProvider(_ context.Context, req *pb.StopProviderRequest) (*pb.StopProviderResponse, error) {
	f.mu.Lock()
	byHand := f.byHand
	f.mu.Unlock()
	if byHand {
		return &pb.StopProviderResponse{Provider: newProvider(req.GetProviderId(), "kv", pb.ProviderState_PROVIDER_STATE_RUNNING)}, nil
	}
	p, err := f.setProvider(req.GetProviderId(), false, pb.ProviderState_PROVIDER_STATE_STOPPED)
	return &pb.StopProviderResponse{Provider: p}, err
}

func (f *fake) DeregisterProvider(context.Context, *pb.DeregisterProviderRequest) (*pb.DeregisterProviderResponse, error) {
	return &pb.DeregisterProviderResponse{}, nil
}

func (f *fake) GetProvider(_ context.Context, req *pb.GetProviderRequest) (*pb.GetProviderResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.provider(req.GetProviderId())
	if p == nil {
		return nil, apierror.New(pb.ErrorCode_ERROR_CODE_PROVIDER_NOT_FOUND, "no provider has the id %q", req.GetProviderId())
	}
	resp := &pb.GetProviderResponse{Assignments: f.grants}
	for _, p := range f.providers {
		if p.GetId() == req.GetProviderId() {
			replica, _ := proto.Clone(p).(*pb.Provider)
			resp.Replicas = append(resp.Replicas, replica)
		}
	}
	resp.Provider = resp.GetReplicas()[0]
	return resp, nil
}

func (f *fake) ListProviders(context.Context, *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	return &pb.ListProvidersResponse{Providers: f.providers}, nil
}

func newProvider(id, kind string, state pb.ProviderState) *pb.Provider {
	return &pb.Provider{
		Id: id, Spec: &pb.ProviderSpec{Id: id, Type: kind, Config: map[string]string{"a": "1"}}, DesiredRunning: true,
		Placement: &pb.Placement{NodeId: "n2"}, CreatedAt: timestamppb.New(epoch()), SpecVersion: 1,
		Status: &pb.ProviderStatus{State: state, SpecVersion: 1},
	}
}

// CallProvider serves kv in the way of a real provider, and of the others what the
// commands need.
func (f *fake) CallProvider(_ context.Context, req *pb.CallProviderRequest) (*pb.CallProviderResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := f.kvAnswer(req)
	switch req.GetCapability() + " " + req.GetOperation() {
	case "http request":
		in := &pb.HttpRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		answer = &pb.HttpResponse{Status: 418, Body: []byte("tea"), Url: in.GetUrl()}
	case "provider call":
		in := &pb.ProviderCallRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		if in.GetOperation() != "charge" {
			return nil, apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, "no such operation").With("operations", "charge, refund")
		}
		answer = &pb.ProviderCallResponse{Payload: append([]byte(in.GetOperation()+" "), in.GetPayload()...)}
	case "messaging publish":
		in := &pb.MsgPublishRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		f.published = append(f.published, &pb.Message{Subject: in.GetSubject(), Payload: in.GetPayload(), Headers: in.GetHeaders()})
		close(f.changed)
		f.changed = make(chan struct{})
		answer = &pb.MsgPublishResponse{Sequence: f.sequence}
	case "messaging request":
		in := &pb.MsgRequestRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		answer = &pb.MsgRequestResponse{Payload: fmt.Appendf(nil, "%s after %d ms", in.GetPayload(), in.GetTimeoutMs()), Headers: in.GetHeaders()}
	}
	payload, err := proto.Marshal(answer)
	return &pb.CallProviderResponse{Payload: payload}, err
}

// SubscribeMessages sends what is published to the subject from now on.
func (f *fake) SubscribeMessages(req *pb.SubscribeMessagesRequest, stream grpc.ServerStreamingServer[pb.SubscribeMessagesResponse]) error {
	f.mu.Lock()
	next, listening := len(f.published), f.listening
	f.mu.Unlock()
	if err := stream.Send(&pb.SubscribeMessagesResponse{}); err != nil {
		return err
	}
	if listening != nil {
		go listening()
	}
	for {
		f.mu.Lock()
		fresh, changed := f.published[next:], f.changed
		next = len(f.published)
		f.mu.Unlock()
		for n, m := range fresh {
			if req.GetSubject() != m.GetSubject() && req.GetSubject() != ">" {
				continue
			}
			if err := stream.Send(&pb.SubscribeMessagesResponse{Message: m, Dropped: uint64(n / 2)}); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (f *fake) kvAnswer(req *pb.CallProviderRequest) (answer proto.Message) {
	switch req.GetOperation() {
	case "get":
		in := &pb.KvGetRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		value, ok := f.kv[req.GetBucket()+"/"+string(in.GetKey())]
		answer = &pb.KvGetResponse{Found: ok, Value: []byte(value), Version: 3}
	case "set":
		in := &pb.KvSetRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		f.kv[req.GetBucket()+"/"+string(in.GetKey())] = string(in.GetValue())
		answer = &pb.KvSetResponse{Version: in.GetTtlMs() + 1}
	case "cas":
		answer = &pb.KvCasResponse{Swapped: false, Version: 3}
	case "delete":
		in := &pb.KvDeleteRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		_, ok := f.kv[req.GetBucket()+"/"+string(in.GetKey())]
		delete(f.kv, req.GetBucket()+"/"+string(in.GetKey()))
		answer = &pb.KvDeleteResponse{Existed: ok}
	case "list":
		in := &pb.KvListRequest{}
		_ = proto.Unmarshal(req.GetPayload(), in)
		answer = f.kvPage(req.GetBucket(), in)
	}
	return answer
}

// kvPage answers with one key a page.
func (f *fake) kvPage(bucket string, in *pb.KvListRequest) *pb.KvListResponse {
	var keys []string
	for full := range f.kv {
		key, ok := strings.CutPrefix(full, bucket+"/")
		if ok && strings.HasPrefix(key, string(in.GetPrefix())) && key > string(in.GetCursor()) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	resp := &pb.KvListResponse{}
	if len(keys) > 0 {
		resp.Entries = []*pb.KvEntry{{Key: []byte(keys[0]), Value: []byte(f.kv[bucket+"/"+keys[0]]), Version: 3}}
	}
	if len(keys) > 1 {
		resp.NextCursor = []byte(keys[0])
	}
	return resp
}
