#!/usr/bin/env bash
# The README's second command, in the current Python environment: the package with its extra "test",
# and the tests, also those that are marked slow. pytorch-ood and faiss come too, as the parity tests
# hold results against them; pytorch-ood without what it asks for, which the tests do not need.
#
#   scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

pip install --quiet ".[test]"
pip install --quiet faiss-cpu tensorboard
pip install --quiet --no-deps pytorch-ood
# A thread each: the tests of threads start their own.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" pytest -n "${JOBS:-2}" -m "slow or not slow" "$@"
