#!/usr/bin/env bash
# Formats, lint and types, in the current Python environment, which has the package. Installs the
# tools in the versions of the extra "dev".
set -euo pipefail
cd "$(dirname "$0")/.."

grep -Eo '"(clang-format|mypy|ruff)==[^"]+"' pyproject.toml | xargs pip install --quiet
ruff check .
ruff format --check .
scripts/format.sh --check
mypy
