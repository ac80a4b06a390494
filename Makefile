# Every target first fetches what is missing (scripts/setup.sh) and builds against the libtorch that it put into the
# cache. Variables: ARCFACE_CACHE, ARCFACE_LIBTORCH (scripts/env.sh), ARCFACE_GOLDEN (golden data), CARGO_FLAGS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
CARGO_FLAGS ?=
# The paths are evaluated per recipe, after the set-up has run: Python itself may be among what it installs.
ENV := . scripts/env.sh;

.PHONY: help setup build demo test chaos golden onnx bench lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## Fetch what the build needs: compiler, pip, libtorch
	@scripts/setup.sh libtorch

build: setup ## Build target/release/arcface-coordinator and arcface-worker
	@$(ENV) ARCFACE_COMMIT="$$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)" \
		$(CARGO) build --release --locked $(CARGO_FLAGS)

demo: build ## Train on synthetic identities with a coordinator and two workers on this machine (PROMETHEUS=1: recorded)
	@PROMETHEUS="$(PROMETHEUS)" scripts/demo.sh

test: setup ## Run all tests: unit, property, golden and cluster
	@scripts/setup.sh python nvrtc etcd prometheus browser deploy
	@# Builds the binaries too, which the cluster tests start: the whole workspace at once, because another choice of
	@# packages has other features and compiles everything again.
	@$(ENV) $(CARGO) test --workspace --locked $(CARGO_FLAGS)
	@# Shows that the proofs of the control plane find the faults that they are for (docs/testing.md).
	@$(ENV) $(CARGO) test --package arcface-coordinator --features planted-bugs --locked $(CARGO_FLAGS) \
		--test simulation --test properties planted -- --nocapture

chaos: setup ## Faults again and again, times held against their bars (an hour on a machine that does nothing else)
	@scripts/setup.sh etcd
	@# A chosen test alone would not build the binaries.
	@$(ENV) $(CARGO) test --workspace --locked $(CARGO_FLAGS) --no-run
	@$(ENV) ARCFACE_TRIALS="$${ARCFACE_TRIALS:-20}" ARCFACE_OUTAGE_S="$${ARCFACE_OUTAGE_S:-120}" \
		ARCFACE_SOAK_S="$${ARCFACE_SOAK_S:-600}" CI=1 \
		$(CARGO) test --workspace --locked $(CARGO_FLAGS) \
		--test chaos --test failover --test partition -- --nocapture --test-threads 1

golden: setup ## Run the golden tests alone, on the data in ARCFACE_GOLDEN
	@$(ENV) $(CARGO) test --package arcface-worker --locked $(CARGO_FLAGS) --test 'golden_*' -- --nocapture

onnx: setup ## Export every network as ONNX and compare it with onnxruntime (needs 12 GB of disk and of memory)
	@scripts/setup.sh python
	@$(ENV) ARCFACE_ONNX_NETWORKS="$${ARCFACE_ONNX_NETWORKS:-all}" CI=1 \
		$(CARGO) test --package arcface-worker --locked $(CARGO_FLAGS) --test onnx_runtime -- --nocapture

bench: build ## Measure what training is made of into docs/benchmarks/training.md (ROWS='head-*', AGAIN=1, BENCH_QUICK=1)
	@scripts/bench.sh $(if $(AGAIN),--again) $(ROWS)

lint: setup ## Check format, clippy, docs, lock file, protocol, scripts, Dockerfiles, YAML and spelling
	@scripts/setup.sh lint deploy
	@scripts/lint.sh

clean: ## Remove build outputs and the demo's work; the cache stays
	@$(CARGO) clean
	@rm -rf work_dirs/demo
