package control

import (
	"slices"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/guestabi/modulestest"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

func TestQueryInstanceTellsStateAssignmentsAndUsage(t *testing.T) {
	p := newPeer(t)
	agent := &fakeAgent{usage: &pb.ResourceUsage{MemoryBytes: 4096, Invocations: 7}}
	p.addNode("n1", agent)
	p.addProvider("store", "kv")
	id := p.start("web", 1)[0]
	if _, err := p.client.AssignCapability(asAlice(t.Context()), &pb.AssignCapabilityRequest{
		Target: id, Grant: &pb.CapabilityGrant{Provider: "store", Permissions: []string{"kv:read"}},
	}); err != nil {
		t.Fatal(err)
	}
	query := func(target string) *pb.QueryInstanceResponse {
		t.Helper()
		resp, err := p.client.QueryInstance(asAlice(t.Context()), &pb.QueryInstanceRequest{Target: target})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if resp := query("web"); resp.GetInstance().GetId() != id || resp.GetInstance().GetStatus().GetUsage() != nil ||
		len(resp.GetAssignments()) != 1 || resp.GetIndex() != p.state.View().Index() {
		t.Errorf("pending: %v", resp)
	}
	p.run(id, "n1")
	resp := query(id[:len(id)-2])
	if resp.GetInstance().GetStatus().GetUsage().GetInvocations() != 7 {
		t.Errorf("running: usage is %v", resp.GetInstance().GetStatus().GetUsage())
	}
	if resp.GetInstance().GetSpec().GetName() != "web" || resp.GetInstance().GetPlacement().GetNodeId() != "n1" {
		t.Errorf("with the usage something got lost: %v", resp.GetInstance())
	}
	if p.instance(id).GetStatus().GetUsage() != nil {
		t.Error("the usage got into the registry")
	}
	agent.mu.Lock()
	agent.hang = true
	agent.mu.Unlock()
	if resp := query(id); resp.GetInstance().GetStatus().GetState() != pb.InstanceState_INSTANCE_STATE_RUNNING ||
		resp.GetInstance().GetStatus().GetUsage() != nil {
		t.Errorf("with an agent that hangs: %v", resp.GetInstance().GetStatus())
	}
}

func TestQueryInstanceWantsOneInstance(t *testing.T) {
	p := newPeer(t)
	web := p.start("web", 2)
	_, err := p.client.QueryInstance(asAlice(t.Context()), &pb.QueryInstanceRequest{Target: "web"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
	for _, id := range web {
		if !strings.Contains(apierror.From(err).Detail("matches"), id) {
			t.Errorf("the error does not name %s: %v", id, err)
		}
	}
	_, err = p.client.Explain(asAlice(t.Context()), &pb.ExplainRequest{Target: "web"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
	_, err = p.client.QueryInstance(asAlice(t.Context()), &pb.QueryInstanceRequest{Target: "nothing"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INSTANCE_NOT_FOUND)
}

func TestExplainTellsEveryNode(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	p.addNode("n2", &fakeAgent{})
	id := p.start("web", 1)[0]
	resp, err := p.client.Explain(asAlice(t.Context()), &pb.ExplainRequest{Target: "web"})
	if err != nil || resp.GetInstance().GetId() != id || len(resp.GetNodes()) != 2 || resp.GetIndex() == 0 {
		t.Errorf("Explain = %v, %v", resp, err)
	}
}

func TestListInstancesInPages(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	web, job := p.start("web", 7), p.start("job", 5)
	slices.Sort(web)
	slices.Sort(job)
	for _, id := range web[:3] {
		p.run(id, "n1")
	}
	p.place(web[3], "n1")
	p.run(job[0], "n1")
	all := append(slices.Clone(job), web...)
	running := []pb.InstanceState{pb.InstanceState_INSTANCE_STATE_RUNNING}
	for name, test := range map[string]struct {
		req  *pb.ListInstancesRequest
		want []string
	}{
		"all":                     {&pb.ListInstancesRequest{}, all},
		"by name":                 {&pb.ListInstancesRequest{Name: "web"}, web},
		"by node":                 {&pb.ListInstancesRequest{NodeId: "n1"}, append(slices.Clone(job[:1]), web[:4]...)},
		"by state":                {&pb.ListInstancesRequest{States: running}, append(slices.Clone(job[:1]), web[:3]...)},
		"by name, node and state": {&pb.ListInstancesRequest{Name: "web", NodeId: "n1", States: running}, web[:3]},
		"nothing":                 {&pb.ListInstancesRequest{Name: "other"}, nil},
	} {
		for _, size := range []uint32{0, 1, 2, 3, 12, 100} {
			var got []string
			req := test.req
			req.PageSize, req.PageToken = size, ""
			for pages := 0; ; pages++ {
				resp, err := p.client.ListInstances(asAlice(t.Context()), req)
				if err != nil {
					t.Fatal(err)
				}
				if size > 0 && len(resp.GetInstances()) > int(size) || pages > len(all) {
					t.Fatalf("%s in pages of %d: page %d has %d", name, size, pages, len(resp.GetInstances()))
				}
				got = append(got, ids(resp.GetInstances())...)
				if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
					break
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%s in pages of %d: %v, want %v", name, size, got, test.want)
			}
		}
	}
	_, err := p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{PageToken: "made up"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_INVALID_REQUEST)
}

func TestAPageGoesOnWhereTheLastOneEndedEvenIfThatInstanceIsGone(t *testing.T) {
	p := newPeer(t)
	web := p.start("web", 4)
	slices.Sort(web)
	first, err := p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{PageSize: 2})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.RemoveInstance(asAlice(t.Context()), &pb.RemoveInstanceRequest{Target: web[1], Force: true}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "web"} {
		rest, err := p.client.ListInstances(asAlice(t.Context()), &pb.ListInstancesRequest{Name: name, PageToken: first.GetNextPageToken()})
		if err != nil || !slices.Equal(ids(rest.GetInstances()), web[2:]) {
			t.Errorf("the rest is %v, %v; want %v", ids(rest.GetInstances()), err, web[2:])
		}
	}
}

func TestListModulesAndNodes(t *testing.T) {
	p := newPeer(t)
	p.addModule(modulestest.Reactor())
	p.addModule(modulestest.Command())
	p.addNode("n1", &fakeAgent{})
	p.addNode("n2", &fakeAgent{})
	p.run(p.start("web", 1)[0], "n2")
	ms, err := p.client.ListModules(asAlice(t.Context()), &pb.ListModulesRequest{})
	if err != nil || len(ms.GetModules()) != 2 || ms.GetModules()[0].GetDigest() > ms.GetModules()[1].GetDigest() {
		t.Errorf("ListModules = %v, %v", ms, err)
	}
	ns, err := p.client.ListNodes(asAlice(t.Context()), &pb.ListNodesRequest{Read: &pb.ReadOptions{MinIndex: p.state.View().Index()}})
	if err != nil || len(ns.GetNodes()) != 2 || ns.GetInstanceCounts()["n1"] != 0 || ns.GetInstanceCounts()["n2"] != 1 {
		t.Errorf("ListNodes = %v, %v", ns, err)
	}
}

func TestDrainAndUndrainANode(t *testing.T) {
	p := newPeer(t)
	p.addNode("n1", &fakeAgent{})
	drained, err := p.client.DrainNode(asAlice(t.Context()), &pb.DrainNodeRequest{NodeId: "n1"})
	if err != nil || !drained.GetNode().GetDraining() || drained.GetIndex() == 0 {
		t.Errorf("DrainNode = %v, %v", drained, err)
	}
	back, err := p.client.UndrainNode(asAlice(t.Context()), &pb.UndrainNodeRequest{NodeId: "n1"})
	if err != nil || back.GetNode().GetDraining() {
		t.Errorf("UndrainNode = %v, %v", back, err)
	}
	_, err = p.client.DrainNode(asAlice(t.Context()), &pb.DrainNodeRequest{NodeId: "n9"})
	wantCode(t, err, pb.ErrorCode_ERROR_CODE_NODE_NOT_FOUND)
}
