#!/usr/bin/env bash
# Lays out the C++ and CUDA sources as .clang-format says; --check changes nothing and fails where
# they are not. Needs clang-format (pip install clang-format).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  "") how=(-i) ;;
  --check) how=(--dry-run --Werror) ;;
  *) echo "usage: scripts/format.sh [--check]" >&2; exit 2 ;;
esac
find csrc python_tests/cuda_emulation -regextype posix-extended -regex '.*\.(h|cpp|cuh?)' -print0 |
  xargs -0 clang-format "${how[@]}"
