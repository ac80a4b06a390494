#!/usr/bin/env bash
# Every check of `make lint`, cheap ones first; it runs all of them and fails at the end if one did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh
tools="$ARCFACE_LINT_TOOLS/bin"
failed=()

check() {
    local name="$1"
    shift
    printf '== %s\n' "$name"
    "$@" || failed+=("$name")
}

lock_file() { cargo metadata --locked --format-version 1 --quiet >/dev/null; }

mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' '*.sbatch' .ci/run)
mapfile -t dockerfiles < <(git ls-files --cached --others --exclude-standard -- '*.Dockerfile')

check format cargo fmt --all --check
check "format of fuzz" cargo fmt --manifest-path fuzz/Cargo.toml --check
check "lock file" lock_file
check shellcheck "$tools/shellcheck" --external-sources "${scripts[@]}"
check Dockerfiles scripts/deploy_tools.sh hadolint "${dockerfiles[@]}"
check YAML scripts/deploy_tools.sh python3 -s -m yamllint --strict --config-file deploy/yamllint.yaml deploy
check spelling "$tools/typos"
check protocol "$tools/buf" lint proto
check clippy cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
RUSTDOCFLAGS="-D warnings" check rustdoc cargo doc --workspace --no-deps --locked --quiet
# Licences, sources and doubled versions of dependencies are checked by tests/tests/dependencies.rs.
echo "skipped: advisories of dependencies (needs a database from the network)"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: failed: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" >&2
    exit 1
fi
echo "lint: all checks passed"
