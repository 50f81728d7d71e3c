package fsm

import (
	"fmt"
	"strconv"

	"github.com/hashicorp/go-memdb"

	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// MaxReplicas is the most replicas that one provider may have.
const MaxReplicas = 16

// The types of providers whose drivers this package tells apart.
const (
	typeKV        = "kv"
	typeHTTP      = "http"
	typeMessaging = "messaging"
	typeExternal  = "external"
)

// Replicas returns how many replicas a provider's spec asks for, 1 by default.
func Replicas(spec *pb.ProviderSpec) uint32 { return max(1, spec.GetReplicas()) }

// ReplicaName names one replica of a provider for people, results and the
// assignment stream: the provider's id, for a replica above 0 followed by a slash
// and the replica.
func ReplicaName(id string, replica uint32) string {
	if replica == 0 {
		return id
	}
	return id + "/" + strconv.FormatUint(uint64(replica), 10)
}

// KeepsState reports whether a provider's data lives on the disk or in the memory
// of the node that hosts it, so that another node would serve other data. It
// holds for a driver that is not known here too: waiting for a node harms less
// than serving other data.
func KeepsState(spec *pb.ProviderSpec) bool {
	switch spec.GetType() {
	case typeKV:
		return spec.GetDriver() != "redis" && spec.GetDriver() != "nats"
	case typeMessaging:
		return spec.GetDriver() != "nats"
	case typeHTTP, typeExternal:
		return false
	default:
		return true
	}
}

// movable reports whether a replica is placed on another node when its own is
// lost: it leaves nothing behind there and is not pinned to it.
func movable(p *pb.Provider) bool {
	return !KeepsState(p.GetSpec()) && p.GetSpec().GetPlacement().GetNode() == ""
}

// replicaKey is the key of a replica in its table: replicas of one provider are
// in the order of their numbers.
func replicaKey(id string, replica uint32) string {
	if id == "" {
		return ""
	}
	return id + terminator + replicaPart(replica)
}

func replicaPart(replica uint32) string { return fmt.Sprintf("%010d", replica) }

// checkReplicas refuses numbers of replicas that could never be placed, or that
// would each serve data of their own.
func checkReplicas(spec *pb.ProviderSpec) *refusal {
	n := Replicas(spec)
	switch {
	case n == 1:
		return nil
	case n > MaxReplicas:
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"provider %q is to have %d replicas, at most %d are allowed", spec.GetId(), n, MaxReplicas).
			with("provider", spec.GetId())
	case KeepsState(spec):
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"provider %q keeps its state on its node, so %d replicas would serve %d different states", spec.GetId(), n, n).
			with("provider", spec.GetId()).
			with("type", spec.GetType()).
			with("driver", spec.GetDriver()).
			next("ask for one replica, or use a driver that keeps its state elsewhere: %s", sharedDrivers(spec.GetType()))
	case spec.GetPlacement().GetNode() != "":
		return refuse(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
			"provider %q is pinned to node %q and each of its %d replicas needs a node of its own",
			spec.GetId(), spec.GetPlacement().GetNode(), n).
			with("provider", spec.GetId()).
			with("node", spec.GetPlacement().GetNode()).
			next("leave the node out, or ask for one replica")
	default:
		return nil
	}
}

// sharedDrivers names the drivers of a type that keep no state on their node.
func sharedDrivers(kind string) string {
	if kind == typeKV {
		return "redis, nats"
	}
	return "nats"
}

// replicasOf returns all replicas of a provider in order.
func replicasOf(txn *memdb.Txn, id string) []*pb.Provider {
	return list[*pb.Provider](txn, nil, tableProviders, indexPrefix, id+terminator)
}
