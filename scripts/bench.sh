#!/usr/bin/env bash
# A short run of every benchmark, as a test that they run, in the current Python environment.
set -euo pipefail
cd "$(dirname "$0")/.."

pip install --quiet ".[bench]"
OODK_BENCH_QUICK=1 pytest benchmarks --benchmark-only --benchmark-columns=median \
  --benchmark-sort=name -q
