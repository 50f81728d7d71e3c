package provider

import "github.com/wasmatrix/wasmatrix/permission"

// InstanceRecord is where an instance runs.
type InstanceRecord struct {
	// ID is the instance's id, Name the workload's name.
	ID, Name string
	// Node is the id of the node it is placed on, NodeEpoch that node's epoch at
	// the time of the placement; 0 means not known.
	Node      string
	NodeEpoch uint64
	// Generation counts the instance's placements, from 1.
	Generation uint64
	// Created is the Raft index at which the instance was accepted; 0 means not known.
	Created uint64
}

func (r *InstanceRecord) mark() Mark { return Mark{Created: r.Created, Generation: r.Generation} }

// ProviderRecord is where one replica of a provider runs.
type ProviderRecord struct { //nolint:revive // named like InstanceRecord and NodeRecord
	// ID is the provider's id.
	ID string
	// Replica tells the replicas of one provider apart, from 0. No two of them are
	// on the same node.
	Replica uint32
	// Type is "kv", "http", "messaging" or "external".
	Type string
	// Node is the id of the node it is placed on; empty when it is on none.
	Node string
	// Generation counts the provider's placements.
	Generation uint64
	// Running is true when the provider takes calls, as far as is known here. On
	// the provider's own node its Host decides instead.
	Running bool
	// State is the provider's state in one word, for messages: "stopped".
	State string
}

// Assignment lets one instance use one provider.
type Assignment struct {
	// Instance and Provider are the two ids.
	Instance, Provider string
	// Permissions are what the instance may do.
	Permissions permission.Set
	// Bucket is the key-value bucket that the instance sees.
	Bucket string
	// Subscriptions are the subjects that the instance is subscribed to at a
	// messaging provider. One counts only while a permission covers it.
	Subscriptions []string
}

// NodeRecord is where a node's agent listens.
type NodeRecord struct {
	// ID is the node's id.
	ID string
	// AgentAddress is host:port of its agent.
	AgentAddress string
}

// Records is everything that a Directory knows.
type Records struct {
	Instances   []InstanceRecord
	Providers   []ProviderRecord
	Assignments []Assignment
	Nodes       []NodeRecord
}
