#!/usr/bin/env bash
# Takes the pictures of the status page in docs/images anew, of a job that trains on this machine and loses a rank meanwhile:
#     scripts/screenshots.sh
# Takes some five minutes beside a build. It is the test of the page that takes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh libtorch browser
# shellcheck source=scripts/env.sh
. scripts/env.sh
mkdir -p docs/images
cargo test --workspace --locked --no-run --quiet
ARCFACE_SCREENSHOTS="$PWD/docs/images" CI=1 \
    cargo test --workspace --locked --test status_page -- pictures --nocapture
ls -l docs/images
