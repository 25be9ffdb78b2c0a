# The developer's commands. Each first installs what it needs: see tests/setup.

.PHONY: help setup demo test soak bench bench-handover bench-dataplane man check clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    boot a VM on baton-vmm and baton-backend, and show its network at work;'
	@echo '             with VHOST=1 the kernel (vhost-net) moves the frames'
	@echo 'make test    run all the tests'
	@echo 'make soak    inject every fault at every step, then run the tests while back-ends are briefly stopped;'
	@echo '             SOAK_ROUNDS=N repeats both N times'
	@echo 'make bench   run both benchmarks; needs an otherwise idle machine. bench-handover (about ten minutes) writes'
	@echo '             docs/handover-blackout.md and .svg, bench-dataplane (about 20 minutes) docs/performance.md.'
	@echo '             PEER="NAME: PROGRAM ... {sock} ... {tap}; ..." compares further back-ends'
	@echo 'make man     write man pages and shell completions to target/man'
	@echo 'make check   check format, lints and documentation'
	@echo 'make setup   install what these commands need; they also do so themselves'
	@echo 'make clean   remove all build output'

setup:
	@tests/setup

demo: setup
	cargo build --release --workspace --bins
	target/release/demo $(if $(filter 1,$(VHOST)),--vhost)

# Injects all faults at all fault points with either datapath. Then runs the tests that need no lab while every back-end
# is stopped again and again for up to BATON_JITTER milliseconds (tests/src/jitter.rs). Both run SOAK_ROUNDS times. The
# second part leaves out the tests of faults, which stop their back-ends themselves.
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

bench: bench-handover bench-dataplane

# Measures the blackout of a session's hand-over. QUICK=1 only checks that the benchmark works, and writes to target/.
bench-handover: setup
	cargo build --release -p baton-backend --bin baton-backend -p baton-tests --bin bench-handover
	target/release/bench-handover $(if $(filter 1,$(QUICK)),--quick --output target/bench)

# Measures how many frames back-ends move, what these cost, and how long they take. PEER='NAME: PROGRAM ARGUMENTS' adds a
# back-end, with {sock}, {tap} and {pairs} among the arguments; `;` separates several. QUICK=1 as above.
bench-dataplane: setup
	cargo build --release -p baton-backend --bin baton-backend -p baton-tests --bin bench-dataplane --bin reference-backend
	target/release/bench-dataplane $(if $(PEER),--peer='$(PEER)') $(if $(filter 1,$(QUICK)),--quick --output target/bench)

# Man pages and completions come from the command-line definitions.
man:
	cargo run --package baton-manual -- target/man

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --all-targets --features fault-points -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items

clean:
	cargo clean
