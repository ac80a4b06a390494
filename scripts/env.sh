# shellcheck shell=sh
# Where the build finds libtorch and where the tests find their Python packages. Source it to call cargo by hand:
#     . scripts/env.sh && cargo test -p arcface-worker
# It only sets variables; `scripts/setup.sh` fetches what they name.
#
#   ARCFACE_CACHE     where downloads are unpacked; default $XDG_CACHE_HOME/arcface, else ~/.cache/arcface
#   ARCFACE_LIBTORCH  another libtorch 2.11 (with lib/ and include/) instead of the fetched one
#   ARCFACE_NVRTC     another libnvrtc.so that compiles the CUDA kernels in the tests

ARCFACE_CACHE="${ARCFACE_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/arcface}"
# torch-sys reads LIBTORCH at build time; the worker's build script makes LIBTORCH/lib its run path.
LIBTORCH="${ARCFACE_LIBTORCH:-$ARCFACE_CACHE/libtorch-2.11.0}"
# Compiled Python packages fit one minor version of Python, so each has a folder of its own.
ARCFACE_PYTHON_PACKAGES="$ARCFACE_CACHE/python-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)"
# PyTorch for the tests, on the libtorch above.
ARCFACE_PYTHON_TORCH="$ARCFACE_CACHE/python-torch-2.11.0"
# The compiler of the CUDA kernels, for tests.
ARCFACE_NVRTC="${ARCFACE_NVRTC:-$ARCFACE_CACHE/nvrtc-12.9.86/lib/libnvrtc.so.12}"
# Command-line tools of `make lint`, which ship as Python wheels.
ARCFACE_LINT_TOOLS="$ARCFACE_CACHE/lint-tools"
# Tools that check deploy/, likewise; some of them are compiled for this Python.
ARCFACE_DEPLOY_TOOLS="$ARCFACE_CACHE/deploy-tools${ARCFACE_PYTHON_PACKAGES##*/python}"
# What checks the status page, likewise.
ARCFACE_BROWSER_TOOLS="$ARCFACE_CACHE/browser-tools"
export ARCFACE_CACHE LIBTORCH ARCFACE_PYTHON_PACKAGES ARCFACE_PYTHON_TORCH ARCFACE_LINT_TOOLS ARCFACE_DEPLOY_TOOLS \
    ARCFACE_BROWSER_TOOLS ARCFACE_NVRTC
