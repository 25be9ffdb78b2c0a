# What a developer runs. Everything sets itself up: see tests/setup.

.PHONY: help setup demo test soak bench bench-handover check clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    boot a VM on baton-vmm and baton-backend, and show its network at work;'
	@echo '             with VHOST=1 the kernel (vhost-net) moves the frames'
	@echo 'make test    run all the tests'
	@echo 'make soak    kill, stop and starve every process at every step, and run the tests with back-ends that stop for'
	@echo '             moments, SOAK_ROUNDS=N times over'
	@echo 'make bench   all benchmarks, for a machine that does nothing else: bench-handover (some ten minutes) writes'
	@echo '             docs/handover-blackout.md and .svg'
	@echo 'make check   format, lints and documentation'
	@echo 'make setup   only install what these need; they do it themselves'
	@echo 'make clean   remove what was built'

setup:
	@tests/setup

demo: setup
	cargo build --release --workspace --bins
	target/release/demo $(if $(filter 1,$(VHOST)),--vhost)

# All faults at all fault points, with either datapath; then the tests that need no lab, with stops of every back-end for
# up to BATON_JITTER milliseconds (tests/src/jitter.rs). SOAK_ROUNDS times. Those of faults are left out of the latter:
# their back-ends stop by themselves.
soak: setup
	cargo nextest run -p baton-tests --test lab_fault_soak --run-ignored only --profile soak
	for round in $$(seq $${SOAK_ROUNDS:-1}); do \
	    BATON_JITTER=$${BATON_JITTER:-150} cargo nextest run -p baton-tests \
	        -E 'not (binary(/^(lab|bench)_/) | binary(/fault/) | test(/::vhost_net$$/))' || exit; \
	done

test: setup
	cargo build --workspace --bins
	cargo nextest run --workspace
	cargo test --workspace --doc

bench: bench-handover

# How long the network stands still while a session is handed over. With QUICK=1 a little of everything, to see that it
# works: that measures nothing, and writes to target/.
bench-handover: setup
	cargo build --release -p baton-backend --bin baton-backend -p baton-tests --bin bench-handover
	target/release/bench-handover $(if $(filter 1,$(QUICK)),--quick --output target/bench)

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --all-targets --features fault-points -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items

clean:
	cargo clean
