#!/usr/bin/env bash
# The documentation, strictly, in the current Python environment, which has the package.
#
#   scripts/docs.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."

site=${1:-site}
grep -Eo '"mkdocs[^"]*"' pyproject.toml | tr -d '"' | xargs pip install --quiet
python benchmarks/tables.py --check
mkdocs build --quiet --strict --site-dir "$site"
