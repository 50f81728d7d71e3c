package kv_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// The rights on the server that docs/kv.md asks for are enough for every operation.
func TestDocumentedRightsAreEnough(t *testing.T) {
	password := file(t, "s3cret")
	r := redisServer(t, "--appendonly", "no")
	err := redisClient(t, r).Do(t.Context(), "acl", "setuser", "u", "on", ">s3cret", "~wasmatrix:*",
		"+@hash", "+@sortedset", "+@set", "+@string", "+@scripting", "+@connection", "+time", "+config|get").Err()
	if err != nil {
		t.Fatal(err)
	}
	n := natsServer(t, `authorization { users: [{ user: u, password: s3cret, permissions: {
		publish: ["$JS.API.>", "$WASMATRIX.KV.wasmatrix.>"], subscribe: ["_INBOX.>"] } }] }`)
	for driver, address := range map[string]string{"redis": r.address, "nats": n.address} {
		t.Run(driver, func(t *testing.T) {
			p := open(t, nil, provider.Config{ID: "kv", Driver: driver, Settings: map[string]string{
				"url": driver + "://" + address, "username": "u", "password_file": password,
			}})
			defer p.Close()
			key := []byte("k")
			steps := []struct {
				operation         string
				request, response proto.Message
			}{
				{"get", &pb.KvGetRequest{Key: key}, &pb.KvGetResponse{}},
				{"set", &pb.KvSetRequest{Key: key, Value: make([]byte, 1<<20), TtlMs: 60000}, &pb.KvSetResponse{}},
				{"cas", &pb.KvCasRequest{Key: []byte("l"), Value: key}, &pb.KvCasResponse{}},
				{"get", &pb.KvGetRequest{Key: key}, &pb.KvGetResponse{}},
				{"list", &pb.KvListRequest{}, &pb.KvListResponse{}},
				{"delete", &pb.KvDeleteRequest{Key: key}, &pb.KvDeleteResponse{}},
			}
			for _, s := range steps {
				if err := invoke(t.Context(), p, s.operation, s.request, s.response); err != nil {
					t.Errorf("%s: %v", s.operation, err)
				}
			}
		})
	}
}
