#!/usr/bin/env bash
# The measurement behind `make bench`: what training is made of, with the release build, to docs/benchmarks/training.{json,md}.
#     scripts/bench.sh [--again] [--list] [ROW]...
# BENCH_QUICK=1: tiny sizes, once each, to target/bench/quick. ARCFACE_WORKER: another program. See bench/training.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -sB bench/training.py --worker "${ARCFACE_WORKER:-target/release/arcface-worker}" "$@"
