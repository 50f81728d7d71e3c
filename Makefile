# wasmatrix: `make help` lists what there is.
SHELL := /bin/bash
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/wasmatrix/wasmatrix/cmd/wasmatrix/node.Version=$(VERSION)
BIN := build/wasmatrix
EMBEDDED_INIT := cmd/wasmatrix/node/guestinit/init.gz
REACTORS := $(addprefix build/guests/,hello.wasm greeter.wasm orders.wasm)
GUESTS := $(REACTORS) build/guests/wordcount.wasm
GUEST_SOURCES := $(shell find guest/go -name '*.go' -not -name '*_test.go' 2>/dev/null) guest/go/go.mod
TOOLS := build/tools
BUF := $(TOOLS)/buf
GOLANGCI := $(TOOLS)/golangci-lint
VALIDATE_PROTO := build/proto-deps/buf/validate/validate.proto
# The version of the API that wire compatibility is checked against: the last release, else the commit before.
BREAKING_AGAINST ?= $(shell git describe --tags --abbrev=0 2>/dev/null || git rev-parse -q --verify HEAD~1)
export CGO_ENABLED ?= 0

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: build guests ## three nodes as real processes, a guest, a killed leader: see it work
	$(GO) run ./test/demo -binary $(BIN) -guests build/guests

# Packages whose tests need the built binary, or are a lane of their own.
LANES := /test/e2e|/test/capability|/test/microvm|/test/corruption|/test/chaos|/test/sim
ON_BINARY := WASMATRIX_BINARY=$(CURDIR)/$(BIN) WASMATRIX_GUESTS=$(CURDIR)/build/guests

.PHONY: build
build: microvm-init ## build the binary into build/wasmatrix
	$(GO) build -trimpath -tags guestinit -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/wasmatrix

# What the binary embeds. The same sources and the same Go make the same bytes.
.PHONY: microvm-init
microvm-init: ## build the init of virtual machines into build/wasmatrix-microvm-init
	GOOS=linux GOARCH=amd64 CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o $(BIN)-microvm-init ./runtime/microvm/init
	@if [ ! -e $(EMBEDDED_INIT) ] || [ $(BIN)-microvm-init -nt $(EMBEDDED_INIT) ]; then gzip -9 -n -c $(BIN)-microvm-init > $(EMBEDDED_INIT); fi

.PHONY: guests
guests: $(GUESTS) ## build the example guests into build/guests

$(REACTORS): build/guests/%.wasm: $(GUEST_SOURCES)
	@mkdir -p $(@D)
	cd guest/go && GOOS=wasip1 GOARCH=wasm $(GO) build -trimpath -ldflags '-s -w' -buildmode=c-shared -o ../../$@ ./examples/$*

build/guests/wordcount.wasm: $(GUEST_SOURCES)
	@mkdir -p $(@D)
	cd guest/go && GOOS=wasip1 GOARCH=wasm $(GO) build -trimpath -ldflags '-s -w' -o ../../$@ ./examples/wordcount

.PHONY: test
test: ## everything: set-up, lint, generated code, unit tests with -race, end-to-end tests
	scripts/test.sh

.PHONY: check
check: build guests ## the fast lane: vet, unit tests without -race
	$(GO) vet ./...
	$(GO) test -short $$($(GO) list ./... | grep -Ev '$(LANES)')

.PHONY: race
race: guests ## unit tests with the race detector
	CGO_ENABLED=1 $(GO) test -race -timeout 20m $$($(GO) list ./... | grep -Ev '$(LANES)')

.PHONY: e2e
e2e: build guests ## end-to-end tests on real processes
	$(ON_BINARY) $(GO) test -v -count=1 -timeout 30m ./test/e2e ./test/docs

.PHONY: sim
SEEDS ?= 5
FROM ?= 1
HOURS ?= 0
sim: ## simulated clusters under faults: SEEDS=200 FROM=1 HOURS=100 of virtual time in all
	$(GO) test -v -count=1 -timeout 0 ./test/sim -run 'TestSim$$' -args -seeds $(SEEDS) -from $(FROM) -hours $(HOURS)

.PHONY: planted
planted: ## the simulation must find every planted bug
	$(GO) test -v -count=1 -timeout 30m -tags planted ./test/sim -run TestPlanted

.PHONY: chaos
ROUNDS ?= 4
chaos: build guests ## histories of real processes under faults, checked for linearizability: ROUNDS=50
	$(ON_BINARY) $(GO) test -v -count=1 -timeout 0 ./test/chaos -args -rounds $(ROUNDS)

.PHONY: capability
capability: build guests ## providers stopped, updated, drained and killed under load, revocations, messages: ROUNDS=50 MESSAGES=100000
	$(if $(MESSAGES),WASMATRIX_MESSAGES=$(MESSAGES)) WASMATRIX_REVOKE_ROUNDS=$(ROUNDS) \
	  $(ON_BINARY) $(GO) test -v -count=1 -timeout 60m ./test/capability

# What runs only in virtual machines, and tests of e2e and capability that run there again. All are emulated.
IN_MICROVM := WASM_RUNTIME_BACKEND=microvm WASMATRIX_NODELOSS_ROUNDS=1 WASMATRIX_NODELOSS_PAUSES=10s

.PHONY: microvm
microvm: build guests ## instances in emulated virtual machines
	$(IN_MICROVM) $(ON_BINARY) $(GO) test -v -count=1 -timeout 20m ./test/e2e ./test/microvm ./test/capability \
	  -run '^(TestMicroVM.*|TestOrders|TestGreeter|TestAgentKilled|TestNodeKilled|TestAgentPaused|TestProviderLife)$$' \
	  -skip '^TestProviderLife$$/^(kv_|http_|messaging_|external_on_the_same)'

.PHONY: corruption
FLIPS ?= 200
corruption: build guests ## damaged files, failing and full disks, lost quorum: FLIPS=1000
	$(ON_BINARY) $(GO) test -v -count=1 -timeout 60m ./test/corruption -args -flips $(FLIPS)

.PHONY: failover
failover: build guests ## time from the death of the leader to the next write: ROUNDS=100
	WASMATRIX_FAILOVER_ROUNDS=$(ROUNDS) WASMATRIX_TRANSFER_ROUNDS=$(ROUNDS) $(ON_BINARY) \
	  $(GO) test -v -count=1 -timeout 0 ./test/e2e -run 'TestLeaderKills$$|TestTransfersUnderLoad'

.PHONY: node-loss
node-loss: build guests ## time until a lost node's instances serve elsewhere, and overlapping effects: ROUNDS=50
	WASMATRIX_NODELOSS_ROUNDS=$(ROUNDS) $(ON_BINARY) \
	  $(GO) test -v -count=1 -timeout 0 ./test/e2e -run 'TestNodeKilled|TestNodeCutOff|TestAgentPaused|TestAgentKilled'

.PHONY: soak
SOAK ?= 10m
soak: build guests ## no election without a reason while every processor is busy: SOAK=10m
	WASMATRIX_SOAK=$(SOAK) $(ON_BINARY) $(GO) test -v -count=1 -timeout 0 ./test/e2e -run TestNoElectionWithoutAReason

.PHONY: lint
lint: $(GOLANGCI) ## golangci-lint, import walls, buf lint
	$(GOLANGCI) run ./...
	$(MAKE) --no-print-directory $(BUF) $(VALIDATE_PROTO)
	$(BUF) lint

.PHONY: fmt
fmt: $(GOLANGCI) ## format the Go code
	$(GOLANGCI) fmt ./...

.PHONY: proto
proto: $(BUF) $(VALIDATE_PROTO) ## generate Go code and docs/api.md from the .proto files
	$(BUF) lint
	$(BUF) generate
	$(BUF) build -o build/api.binpb --as-file-descriptor-set
	$(GO) run ./scripts/apidoc -in build/api.binpb -out docs/api.md

.PHONY: proto-check
proto-check: proto ## fail when generated code is stale or the API breaks compatibility
	@git diff --exit-code --stat -- proto docs/api.md || { echo "generated files are stale: run 'make proto' and commit"; exit 1; }
	@if [ -n "$(BREAKING_AGAINST)" ]; then \
	  rm -rf build/breaking && mkdir -p build/breaking/build && \
	  git archive $(BREAKING_AGAINST) buf.yaml proto | tar -x -C build/breaking && cp -r build/proto-deps build/breaking/build/ && \
	  $(BUF) build build/breaking -o build/breaking.binpb && $(BUF) build -o build/current.binpb && \
	  $(BUF) breaking build/current.binpb --against build/breaking.binpb --config '{"version":"v2","breaking":{"use":["WIRE_JSON"]}}'; fi

.PHONY: bench
bench: build guests ## the figures of docs/benchmarks.md
	scripts/bench.sh

.PHONY: fuzz
FUZZTIME ?= 20s
fuzz: ## run every fuzz target for FUZZTIME
	scripts/fuzz.sh $(FUZZTIME)

.PHONY: cover
cover: guests ## unit test coverage into build/cover.html
	$(GO) test -coverprofile=build/cover.out ./... && $(GO) tool cover -html=build/cover.out -o build/cover.html

.PHONY: cross
cross: ## build for the other platforms
	GOOS=linux GOARCH=arm64 $(GO) build -o /dev/null ./cmd/wasmatrix
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null ./cmd/wasmatrix

.PHONY: clean
clean: ## remove everything that was built
	rm -rf build $(EMBEDDED_INIT)

$(BUF): tools/buf/go.mod tools/protoc-gen/go.mod
	@mkdir -p $(TOOLS)
	$(GO) build -modfile=tools/protoc-gen/go.mod -o $(TOOLS)/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	$(GO) build -modfile=tools/buf/go.mod -o $(TOOLS)/ github.com/bufbuild/buf/cmd/buf

$(GOLANGCI): tools/golangci-lint/go.mod
	@mkdir -p $(TOOLS)
	$(GO) build -modfile=tools/golangci-lint/go.mod -o $(TOOLS)/ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

# The rules of protovalidate come from its Go module at a pinned version.
$(VALIDATE_PROTO):
	@mkdir -p $(@D)
	cp -f "$$($(GO) mod download -json github.com/bufbuild/protovalidate@v1.2.2 | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')/proto/protovalidate/buf/validate/validate.proto" $@
	chmod u+w $@
