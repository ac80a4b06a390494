#!/usr/bin/env bash
# Runs Python with the packages of the tests (scripts/setup.sh python) and nothing installed elsewhere:
#     scripts/python.sh FILE.py [ARGUMENT]...
# Exit code 69 if the packages have not been fetched.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/env.sh
. "$here/env.sh"
if [ ! -f "$ARCFACE_PYTHON_PACKAGES/.requirements" ]; then
    echo "python: no packages in $ARCFACE_PYTHON_PACKAGES: run scripts/setup.sh python" >&2
    exit 69
fi
PYTHONPATH="$ARCFACE_PYTHON_PACKAGES:$ARCFACE_PYTHON_TORCH" PYTHONDONTWRITEBYTECODE=1 exec python3 -s "$@"
