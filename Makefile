# What people and CI run. `make help` lists it. Rust, its packages and everything else: scripts/setup.sh.

# Seconds for each fuzz target.
FUZZ_S ?= 60
# What `make campaign` repeats, and how long it goes on.
SEED ?= 1
FAULTS ?= 50

export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: build test lint fmt unit e2e test-long campaign bench fuzz guest clean help

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 12

build: ## The monitor, with optimisation: target/x86_64-unknown-linux-gnu/release/vmft
	cargo build --release -p vmft --bin vmft

# The images' programs are those that the tests want: they are not built in release mode as well.
test test-long e2e: export VMFT_PROFILE = dev
test: ## All that CI runs; the last line is `N passed, N failed, N skipped`
	@MAKE=$(MAKE) scripts/test.sh lint guest unit e2e

lint: ## Format and clippy, as CI wants them
	cargo fmt --all --check
	rustfmt --edition 2024 --check fuzz/fuzz_targets/*.rs
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --test e2e -- -D warnings

fmt: ## Format everything
	cargo fmt --all
	rustfmt --edition 2024 fuzz/fuzz_targets/*.rs

unit: ## Tests that need neither root nor KVM
	cargo test --workspace --no-fail-fast -- --show-output

e2e: build guest ## End-to-end tests on test hosts, as root
	cargo test --workspace --test e2e --no-fail-fast

test-long: export PROPTEST_CASES ?= 20000
test-long: export VMFT_MODEL ?= long
test-long: export VMFT_REPLAYS ?= 20
test-long: export VMFT_KILLS ?= 30
test-long: export VMFT_COMPUTE_S ?= 600
test-long: export VMFT_COMPUTE_KILLS ?= 20
test-long: export VMFT_INTERRUPTS ?= 1000
test-long: export VMFT_PAGINGS ?= 150
test-long: ## `make test` with more cases and more replays: hours
	@MAKE=$(MAKE) scripts/test.sh lint guest unit e2e

campaign: build guest ## SEED=1 FAULTS=50: faults one after the other on three test hosts, as root
	cargo run -q -p vmft-tests --bin vmft-campaign -- $(SEED) $(FAULTS)

bench: ## Benchmarks
	cargo bench --workspace --bench '*'

fuzz: ## Each fuzz target for FUZZ_S seconds; needs a nightly Rust and cargo-fuzz
	@for target in $$(cargo +nightly fuzz list); do \
		cargo +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_S) || exit 1; \
	done

guest: ## Kernel and initramfs for guests and test hosts, in the cache
	guest-images/build.sh images

clean: ## Remove what was built; the cache stays
	cargo clean
