#!/usr/bin/env bash
# Runs a tool of those that check deploy/ (scripts/setup.sh deploy): helm, docker-compose, hadolint, or Python with
# PyYAML, yamllint and the schemas of Kubernetes' API:
#     scripts/deploy_tools.sh helm lint deploy/helm/arcface
# Exit code 69 if they have not been fetched.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/env.sh
. "$here/env.sh"
if [ ! -f "$ARCFACE_DEPLOY_TOOLS/.requirements" ]; then
    echo "deploy_tools: none in $ARCFACE_DEPLOY_TOOLS: run scripts/setup.sh deploy" >&2
    exit 69
fi
export PATH="$ARCFACE_DEPLOY_TOOLS/bin:$PATH" PYTHONPATH="$ARCFACE_DEPLOY_TOOLS" PYTHONDONTWRITEBYTECODE=1
exec "$@"
