// Package messaging is the messaging capability: publish, request and reply, and
// subscriptions that deliver each message to one running replica of a workload.
//
// Two drivers stand below one code path over a NATS connection: embedded, the
// default, runs a NATS server inside the process that nothing else can reach, and
// nats connects to an external one.
//
// # Parts
//
//	Kind      reads requests, tells the permission they need, opens providers
//	service   publish and request: the effect is inside the fence (gate)
//	link      the connection, the embedded server, the stream, and how a subject
//	          of a guest is written on the wire
//	hub       one subscription per workload and subject, as the node's records say
//	subscription
//	          takes messages within its bound, picks a replica, does what the
//	          guest's answer says
//
// # Promises
//
// Plain: at most once up to the handler, in memory only. Durable (JetStream): a
// message that was acknowledged to its publisher is delivered at least once to each
// workload that was subscribed when it was stored. Neither promises an order.
//
// The package never imports agent, runtime, cluster or fsm.
package messaging
