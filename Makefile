# The commands of a developer. The logic is in scripts/. .ci/run runs the same targets.

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster simulate faults fuzz test-clients test-deploy image release lint fmt clippy doc proto deps bench bench-peers soak tools ci clean

# Arguments for the programs that `make test` and `make bench` run: make test ARGS='--test wire'
ARGS ?=
# How long `make soak` publishes, and the seed of its faults. Without a seed, one is chosen at random.
FOR ?= 2m
SEED ?=
# Seeds of the simulation, from FROM=0 on, for SECONDS at most. CONTRIBUTING.md has the rest.
FROM ?=
SECONDS ?=
# A part of the names of the faults that `make faults` puts back.
NAME ?=
SIMULATE = FROM=$(FROM) LIMIT_SECONDS=$(SECONDS) cargo --config .cargo/simulation.toml \
	test --locked --test simulation -- --nocapture --exact seeds
# The name of the image that `make image` builds.
IMAGE ?= fetch-proxy

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: ## Watch it work, then try it by hand; DEMO_EXIT=1 ends after the summary
	@scripts/demo

test: ## Run all tests, with real servers, and SEEDS=2000 simulated clusters
	@scripts/tools check
	$(if $(ARGS)$(filter 0,$(SEEDS)),,SEEDS=$(or $(SEEDS),2000) $(SIMULATE))
	SEEDS= scripts/with-tools cargo test --locked $(ARGS)

test-clients: ## Run the workers of all languages installed here; ARGS='python nak' for some
	@scripts/tools check
	scripts/with-tools cargo test --locked --test clients -- $(ARGS)

lint: fmt clippy doc proto deps ## Check everything that needs no test run

fmt: ## Check that the code is formatted
	cargo fmt --all --check

clippy: ## Check the code with clippy, also the tests that `make test` leaves out
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --test cluster --test clients --test deploy -- -D warnings

doc: ## Check that the docs build, with every link
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items

proto: ## Check the contract with buf, and its format
	buf=$$(scripts/tools buf) && $$buf lint && $$buf format --diff --exit-code

deps: ## Check licences and sources of all dependencies
	deny=$$(scripts/tools cargo-deny) && for manifest in Cargo.toml clients/rust/Cargo.toml; do \
		$$deny --manifest-path $$manifest --config deny.toml --all-features --locked --log-level error \
			check licenses bans sources || exit; \
	done

test-cluster: ## Test three replicas on three NATS servers with 50,000 messages and faults
	@scripts/tools check
	scripts/with-tools cargo test --locked --test cluster -- --nocapture --test-threads 1

simulate: ## Run SEEDS=10000 simulated clusters, FROM=0 on, for SECONDS=300 at most
	@scripts/tools check
	SEEDS=$(or $(SEEDS),10000) $(SIMULATE)

faults: ## Put mended faults back until the simulation finds each; NAME=reset for some, SEEDS=100000 for each
	@scripts/tools check
	@scripts/faults $(NAME)

fuzz: ## Look for input that breaks a parser, SECONDS=60 for each; NAME=policy for one parser
	@scripts/tools check
	@SECONDS_EACH=$(or $(SECONDS),60) scripts/fuzz $(NAME)

test-deploy: ## Test deploy/, with the image and a small rolling update
	@scripts/tools check
	scripts/with-tools scripts/with-deploy-tools cargo test --locked --test deploy $(ARGS)

image: ## Build the image IMAGE=fetch-proxy with docker, podman or buildah
	@scripts/image $(IMAGE)

release: ## Build all artifacts of a release into target/release-VERSION; pushes nothing
	@scripts/release

bench: ## Measure throughput, latency, growth and memory, in a quarter of an hour
	@scripts/tools check
	scripts/with-tools cargo bench --locked --bench throughput -- $(ARGS)
	cargo bench --locked --bench lease_table

bench-peers: ## Compare with the NATS clients of all languages installed here; ARGS='--only go' for some
	@scripts/tools check
	scripts/with-tools cargo bench --locked --bench peers -- $(ARGS)

soak: ## Test with random faults for FOR=2m; SEED=1 repeats the same faults
	@scripts/tools check
	scripts/with-tools cargo bench --locked --bench soak -- --for $(FOR) $(if $(SEED),--seed $(SEED))

tools: ## Fetch the pinned tools into .tools
	@scripts/tools check nats-server grpcurl buf

ci: ## Run the steps of CI
	@.ci/run

clean: ## Remove the build; .tools stays
	cargo clean
