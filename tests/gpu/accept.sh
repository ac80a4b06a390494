#!/usr/bin/env bash
# Proves a build on a machine with a GPU, in about ten minutes, and writes one JSON file with every figure. Nothing is built or
# fetched: it needs target/release (or --bin DIR), Python 3, and libtorch with its CUDA libraries, which it finds beside
# Python's torch. See accept.py for what is checked; --device cpu tries the script itself where there is no GPU.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/accept.py" "$@"
