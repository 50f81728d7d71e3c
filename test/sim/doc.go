// Package sim runs whole clusters in simulated time and breaks them on purpose,
// to see whether the promises of docs/design hold: I1 to I10, linearizable
// registers, and that everything is well again some time after everything healed.
//
// # What is real and what is not
//
// A World lives in one bubble of testing/synctest. In it run the real
// cluster.Peer with its guards, control, dispatch and schedule, put together as
// a node's is (cluster/plane); the real agent with the real key-value
// provider (worker.go); the real client (workload.go); and between them real gRPC
// with real mutual TLS. Simulated are:
//
//   - the network (network.go, conn.go): each direction between two machines may be
//     cut, held, slow, or lose, repeat and delay what is sent;
//   - the transport of Raft (transport.go), message by message: an answer may come
//     late, twice, or when nobody waits for it any more;
//   - the peers' disks (disk.go): a crash keeps of the writes that were not
//     acknowledged all, some or nothing; writes may be slow, fail or hang; a bit may flip;
//   - the gossip (members.go), which is slow and never lies;
//   - the clocks of the machines (clock.go), which drift within what leases allow for
//     and are wrong by up to a minute;
//   - guests (guests.go): each calls its providers from its start to its very end;
//   - modules, which every peer has.
//
// A pause of a machine holds everything it sends and gets, and delivers it late.
// Its goroutines go on meanwhile: nothing can stop them in a bubble. An agent's
// files are real ones, in memory where the system has a directory for that; a
// crash leaves the next process a copy of them.
//
// # What goes wrong, and what is checked
//
// faults.go and damage.go hold the faults, profile.go the kinds of world: how
// large, how fast, and how likely each fault is. After each round everything heals
// and must converge.
//
// The oracle (oracle.go) is a state machine of its own. It applies every command at
// the moment when the first peer does, and all peers are compared with it. Checks
// (checks.go) are made the moment something happens: a provider accepts a write, a
// guest starts or is stopped, a lease is renewed or ends. Histories of the registers
// are checked by porcupine (history.go).
//
// # Running it
//
//	go test ./test/sim                                   one short round for each of a few seeds
//	go test ./test/sim -run TestSim -v -timeout 0 -seeds 200 -hours 100
//	go test ./test/sim -run 'TestSeed$' -v -profile full -from 17 -round 5m [-show]
//	go test -tags planted ./test/sim -run TestPlanted -v
//
// TestSim and TestPlanted run each seed in a child process of this test binary
// (runner.go): a crash or a hang of one is an outcome like every other.
//
// # What a seed fixes
//
// A seed fixes the schedule of faults, the workload, the clocks, and the dice of
// network and disks. It does not fix the order in which goroutines run, nor the
// random numbers that hashicorp/raft, gRPC and the product draw themselves. So the
// same seed gives the same kind of trouble at the same time, and not the same
// messages. With one thread for each world, which is how children run, 17 of 20
// repetitions of five seeds that had found a planted bug found it again; the others
// need another try or a neighbouring seed. The report of a violation therefore holds
// the last events, and not only the seed.
package sim
