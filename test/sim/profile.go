package sim

import "time"

// Profile is a kind of world: how large, how fast, and what goes wrong in it.
type Profile struct {
	// Name is for people and for the flag -profile.
	Name string
	// Peers and Workers are how many machines of each kind there are.
	Peers, Workers int
	// Heartbeat is the peers' heartbeat timeout. A longer one than the default
	// makes virtual time cheaper; all other timers of Raft keep their ratio to it.
	Heartbeat time.Duration
	// SnapshotEvery is after how many log entries a peer takes a snapshot.
	SnapshotEvery uint64
	// Clients is how many clients there are, Pace how long each rests between two
	// operations, on average.
	// Readers are further clients that only read, so that no write holds them up.
	Clients int
	Readers int
	Pace    time.Duration
	// GuestEvery is how often a guest calls a provider, on average.
	GuestEvery time.Duration
	// Round is how long faults go on until everything heals and is checked.
	Round time.Duration
	// Calm is the pause between two faults, on average; Overlap is how likely the
	// next one does not wait for the end of the one before. Lasts is how long a
	// fault lasts on average, besides the first second.
	Calm    time.Duration
	Lasts   time.Duration
	Overlap float64
	// Drains says how often nodes are drained besides, in percent of what is done to what runs.
	Drains int
	// Faults are the kinds of fault and how likely each is.
	Faults map[string]int
}

// everything is what can go wrong, in a balance that finds most.
var everything = map[string]int{
	faultCrashPeer: 6, faultCrashLeader: 4, faultCrashAll: 1, faultRestartPeer: 2, faultTransfer: 3,
	faultPartition: 5, faultIsolateLeader: 4, faultOneWay: 5, faultPausePeer: 4, faultPauseLeader: 3,
	faultStorm: 5, faultLate: 4, faultSlow: 3,
	faultSlowDisk: 3, faultHangingDisk: 2, faultFailingDisk: 2, faultWipe: 2, faultFlip: 2, faultReplace: 2, faultClock: 2,
	faultCrashWorker: 5, faultRestartWorker: 3, faultPauseWorker: 5, faultCutWorker: 5, faultCutControl: 4, faultCutWorkers: 3,
}

func (p Profile) withDefaults() Profile {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if p.Peers == 0 {
		p.Peers = 3
	}
	def(&p.Heartbeat, 500*time.Millisecond)
	def(&p.Pace, 400*time.Millisecond)
	def(&p.GuestEvery, time.Second)
	def(&p.Round, 5*time.Minute)
	def(&p.Calm, 8*time.Second)
	def(&p.Lasts, 8*time.Second)
	if p.SnapshotEvery == 0 {
		p.SnapshotEvery = 200
	}
	if p.Clients == 0 {
		p.Clients = 4
	}
	if p.Faults == nil {
		p.Faults = everything
	}
	return p
}

// Profiles are the kinds of world that the long run goes through in turn.
func Profiles() []Profile {
	return []Profile{
		{Name: "control", Peers: 3, Overlap: 0.3},
		{Name: "full", Peers: 3, Workers: 3, Overlap: 0.3},
		{Name: "five", Peers: 5, Workers: 2, Overlap: 0.5},
		{Name: "leases", Peers: 3, Workers: 3, Calm: 6 * time.Second, Pace: time.Second, GuestEvery: 400 * time.Millisecond, Faults: map[string]int{
			faultCrashWorker: 4, faultRestartWorker: 3, faultPauseWorker: 6, faultCutWorker: 6, faultCutWorkers: 4, faultCutControl: 4,
			faultCrashLeader: 3, faultTransfer: 3, faultIsolateLeader: 3, faultPauseLeader: 3, faultClock: 1,
			faultLateRenewals: 2, faultLateCalls: 2, faultLateWorker: 2,
		}},
		{Name: "losses", Peers: 3, Workers: 3, Calm: 25 * time.Second, Faults: map[string]int{faultCrashWorker: 3, faultTransfer: 1, faultCutWorker: 1}},
		{Name: "disks", Peers: 3, Calm: 5 * time.Second, Pace: 200 * time.Millisecond, Faults: map[string]int{
			faultCrashPeer: 5, faultCrashLeader: 6, faultCrashAll: 5, faultSlowDisk: 3, faultHangingDisk: 2, faultFailingDisk: 3,
			faultWipe: 3, faultFlip: 3, faultReplace: 3, faultRestartPeer: 2,
		}},
	}
}

// scenarios are worlds that stress one part each: where a bug of that part shows
// soonest.
func scenarios() []Profile {
	const often = 2 * time.Second
	return []Profile{
		{Name: "isolation", Clients: 3, Readers: 6, Pace: 100 * time.Millisecond, Calm: often, Lasts: 3 * time.Second, Faults: map[string]int{
			faultLateLease: 4, faultIsolateLeader: 1,
		}},
		{Name: "repeats", Clients: 6, Pace: 100 * time.Millisecond, Calm: often, Lasts: 6 * time.Second, Faults: map[string]int{
			faultCutAnswers: 4, faultIsolateLeader: 1, faultCrashLeader: 1, faultPauseLeader: 1,
		}},
		{Name: "restarts", Pace: 100 * time.Millisecond, SnapshotEvery: 40, Calm: often, Lasts: often, Faults: map[string]int{
			faultCrashPeer: 3, faultRestartPeer: 2, faultWipe: 1,
		}},
		{Name: "flips", Pace: 200 * time.Millisecond, Calm: often, Lasts: often, Faults: map[string]int{faultFlip: 1}},
		{Name: "power", Pace: 50 * time.Millisecond, Calm: often, Lasts: often, Faults: map[string]int{faultPowerCut: 3, faultCrashAll: 1}},
		{Name: "replacements", Pace: 200 * time.Millisecond, Calm: often, Lasts: often, Faults: map[string]int{faultReplace: 1}},
		{Name: "amnesia", Pace: 100 * time.Millisecond, Calm: often, Lasts: 4 * time.Second, Faults: map[string]int{faultForget: 1}},
		{Name: "drains", Workers: 3, Pace: 200 * time.Millisecond, Calm: 10 * time.Second, Drains: 8, Faults: map[string]int{
			faultTransfer: 1, faultCrashPeer: 1,
		}},
		{Name: "cuts", Workers: 3, Pace: 500 * time.Millisecond, GuestEvery: 200 * time.Millisecond, Calm: often, Faults: map[string]int{
			faultCutWorker: 3, faultCutControl: 1,
		}},
		{Name: "elections", Workers: 3, Pace: time.Second, Calm: 6 * time.Second, Faults: map[string]int{
			faultCrashLeader: 2, faultTransfer: 2,
		}},
		{Name: "pauses", Workers: 3, Pace: time.Second, GuestEvery: 300 * time.Millisecond, Calm: often, Faults: map[string]int{
			faultPauseWorker: 1, faultLateWorker: 3,
		}},
		{Name: "renewals", Workers: 3, Pace: 500 * time.Millisecond, GuestEvery: 100 * time.Millisecond, Calm: often, Lasts: 6 * time.Second, Faults: map[string]int{
			faultLateRenewals: 1,
		}},
		{Name: "calls", Workers: 3, Pace: 500 * time.Millisecond, GuestEvery: 100 * time.Millisecond, Calm: often, Lasts: 4 * time.Second, Faults: map[string]int{
			faultLateCalls: 1,
		}},
	}
}

// ProfileOf returns the profile of that name.
func ProfileOf(name string) (Profile, bool) {
	for _, p := range append(Profiles(), scenarios()...) {
		if p.Name == name {
			return p, true
		}
	}
	return Profile{}, false
}
