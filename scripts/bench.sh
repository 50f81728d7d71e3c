#!/usr/bin/env bash
# The figures of docs/benchmarks.md: a cluster of real processes, then the parts
# side by side with their bare counterparts in the same run.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "== cluster of three real nodes"
go run ./test/bench -binary build/wasmatrix -guests build/guests
for pkg in ./runtime/wasm ./provider/... ./permission ./fsm ./cluster ./rpc; do
  echo "== $pkg"
  go test -run '^$' -bench . -benchmem "$pkg" | grep -E '^(Benchmark|pkg)' || true
done
