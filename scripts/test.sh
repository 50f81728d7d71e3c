#!/usr/bin/env bash
# Everything that must hold before a change lands, with the set-up it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
step() { printf '\n== %s (at %ds)\n' "$1" $((SECONDS - started)); }

step "set-up"
scripts/setup.sh
command -v go >/dev/null || { echo "Go is missing: install it from https://go.dev/dl/" >&2; exit 1; }
go version

step "generated code is fresh, the API is compatible"
make --no-print-directory proto-check

step "build, other platforms, guests"
make --no-print-directory build guests cross

step "lint and import walls"
make --no-print-directory lint

step "unit tests with the race detector"
make --no-print-directory race

# The specification's tests with and without metering, real Go guests and the
# isolation of compilation take minutes under the race detector and are skipped there.
step "unit tests of the runtime without the race detector"
go test -count=1 ./runtime/wasm/...

step "guest SDK"
(cd guest/go && go vet ./... && go test ./...)

step "end-to-end tests on the built binary"
make --no-print-directory e2e

step "capabilities: providers stopped, updated, drained and killed under load, revocations, messages"
make --no-print-directory capability

step "instances in virtual machines, emulated"
make --no-print-directory microvm

step "damaged files, failing and full disks, lost quorum"
make --no-print-directory corruption

step "simulated clusters under faults, and whether the simulation finds planted bugs"
make --no-print-directory sim planted

step "histories of real processes under faults"
make --no-print-directory chaos

step "the demo"
make --no-print-directory demo

step "all passed"
