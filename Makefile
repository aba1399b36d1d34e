# What people type daily. Each target is the plain commands that stand under it.
.DEFAULT_GOAL := help
.PHONY: help tools kube build demo demo-k8s test soak fuzz bench figures sim kernels gpu-kit fmt lint

# A run that counts may not skip a test for want of a tool.
export MILLRACE_REQUIRE_TOOLS = 1

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | expand -t 12

tools: ## fetch nats-server, SeaweedFS, SmolLM2 and the CUDA compiler into ~/.cache/millrace
	scripts/tools
	scripts/cuda

kube: ## build etcd, Kubernetes and helm from Go modules into ~/.cache/millrace
	scripts/kube

build: ## the programs, optimised, with kernels for GPUs, in target/release
	cargo build --release --locked --workspace --bins

demo: ## 64 prompts, or those of DOCS=my.jsonl, on this machine's CPU; with WAIT=1 then OpenAI's API until Ctrl-C
	@echo "demo 1/3: broker, S3 server and model, 150 MB once"
	scripts/tools
	@echo "demo 2/3: worker and command line, some 400 crates once: about 3 minutes on 2 cores"
	cargo build --locked --no-default-features -p millrace-worker -p millrace-gateway -p millrace-tests \
		--bin millrace-worker --bin millrace --bin millrace-gateway --bin millrace-demo
	@echo "demo 3/3: the run"
	target/debug/millrace-demo $(if $(DOCS),--prompts "$(DOCS)") $(if $(WAIT),--wait)

demo-k8s: kube ## control plane, chart, 200 jobs from zero to zero, then a new revision under load
	scripts/tools
	cargo build --locked --workspace --bins
	target/debug/millrace-demo-k8s

test: ## all tests that take a few minutes, with real processes
	@echo "test 1/4: broker, S3 server, model, OpenAI client and CUDA compiler"
	scripts/tools test
	scripts/cuda
	@echo "test 2/4: Kubernetes, etcd and helm from their Go modules, once: about 5 minutes on 2 cores"
	scripts/kube
	@echo "test 3/4: programs and tests"
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --no-run
	@echo "test 4/4: the run"
	cargo test --locked --workspace --no-fail-fast

soak: tools kube build ## the long runs: 2000 jobs, 3 workers and 200 kills; 500 models under one operator
	MILLRACE_SOAK=1 bash -o pipefail -c 'cargo test --release --locked --workspace --test crash --test kube_operator \
		-- --nocapture 2>&1 | tee target/soak.log'
	target/release/millrace-figures --soak target/soak.log --write docs/figures

fuzz: ## each reader of outside input for MILLRACE_FUZZ_S seconds (60), guided by coverage
	scripts/fuzz

bench: build ## measure this machine: every figure with its bar; fails where one is missed
	scripts/tools bench
	target/release/millrace-figures

figures: build ## the same, kept as a result file; makes docs/figures.md of all of them
	scripts/tools bench
	target/release/millrace-figures --write docs/figures

sim: build ## real traffic through the autoscaler and its rivals; writes plots and figures
	target/release/millrace-sim --plots sim/assets --figures target/sim-figures.json
	target/release/millrace-figures --sim target/sim-figures.json --write docs/figures

kernels: tools ## compile the CUDA kernels; registers, shared memory and spills of each
	cargo run --locked -p millrace-kernels --features cuda --example resources

gpu-kit: tools ## worker, GPU tests and benchmarks for a CUDA host, in one archive
	scripts/gpu-kit

fmt: ## format the code
	cargo fmt --all

lint: ## clippy and rustdoc, warnings denied
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
