# What a developer types. The logic is in scripts/; .ci/run runs the same targets.

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster test-clients test-deploy image lint fmt clippy doc proto deps bench soak tools ci clean

# Arguments for the programs that `make test` and `make bench` run: make test ARGS='--test wire'
ARGS ?=
# How long `make soak` publishes, and the seed of its faults; made up when there is none.
FOR ?= 2m
SEED ?=
# What `make image` calls what it builds.
IMAGE ?= fetch-proxy

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: ## See it work, then try it by hand; DEMO_EXIT=1 ends after the summary
	@scripts/demo

test: ## Run all tests, with real servers
	@scripts/tools check
	scripts/with-tools cargo test --locked $(ARGS)

test-clients: ## Run the workers of every language that is here; ARGS='python nak' for some
	@scripts/tools check
	scripts/with-tools cargo test --locked --test clients -- $(ARGS)

lint: fmt clippy doc proto deps ## Check everything that needs no run

fmt: ## Is the code formatted?
	cargo fmt --all --check

clippy: ## Does clippy find nothing?
	cargo clippy --locked --workspace --all-targets -- -D warnings

doc: ## Do the docs build, with every link?
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items

proto: ## Is the contract in order and formatted?
	buf=$$(scripts/tools buf) && $$buf lint && $$buf format --diff --exit-code

deps: ## Are licences and sources of all dependencies in order?
	deny=$$(scripts/tools cargo-deny) && $$deny --locked --log-level error check licenses bans sources

test-cluster: ## Three replicas, three NATS servers, 50,000 messages, and trouble
	@scripts/tools check
	scripts/with-tools cargo test --locked --test cluster -- --nocapture --test-threads 1

test-deploy: ## Check what is in deploy/, with the image and a rolling update in small
	@scripts/tools check
	scripts/with-tools scripts/with-deploy-tools cargo test --locked --test deploy $(ARGS)

image: ## Build the image IMAGE=fetch-proxy with docker, podman or buildah
	@scripts/image $(IMAGE)

bench: ## Measure throughput, latency and memory; takes some minutes
	@scripts/tools check
	scripts/with-tools cargo bench --locked --bench throughput -- $(ARGS)
	cargo bench --locked --bench lease_table

soak: ## Faults at random for FOR=2m, and books that must balance; SEED=1 for the same again
	@scripts/tools check
	scripts/with-tools cargo bench --locked --bench soak -- --for $(FOR) $(if $(SEED),--seed $(SEED))

tools: ## Fetch the pinned tools into .tools
	@scripts/tools check nats-server grpcurl buf

ci: ## Run what CI runs
	@.ci/run

clean: ## Remove what was built; .tools stays
	cargo clean
