# What people type daily. Each target is the plain commands that stand under it.
.DEFAULT_GOAL := help
.PHONY: help tools build demo test soak bench fmt lint

# A run that counts may not skip a test for want of a tool.
export MILLRACE_REQUIRE_TOOLS = 1

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 8

tools: ## fetch nats-server, SeaweedFS and SmolLM2 into ~/.cache/millrace
	scripts/tools

build: ## the programs, optimised, in target/release
	cargo build --release --locked --workspace --bins

demo: tools build ## 64 prompts through broker, S3 and worker; ends with a summary
	target/release/millrace-demo

test: tools ## all tests that take a few minutes, with real processes
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --no-fail-fast

soak: tools build ## the long crash run: 2000 jobs, 3 workers, 200 kills
	MILLRACE_SOAK=1 cargo test --release --locked --workspace --test crash -- --nocapture

bench: build ## the README's figures, on this machine, in one table and as JSON
	scripts/tools bench
	target/release/millrace-figures

fmt: ## format the code
	cargo fmt --all

lint: ## clippy and rustdoc, warnings denied
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
