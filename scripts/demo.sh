#!/usr/bin/env bash
# The README's first command, in the current Python environment: the package with its extra "demo",
# and the demo itself, shortened.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
pip install ".[demo]"
oodk info
oodk demo --quick --out "$out" --quiet
