.PHONY: test
test: ## all tests
	cargo test --workspace
