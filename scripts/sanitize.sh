#!/usr/bin/env bash
# Builds the CPU ops with sanitizers and runs the tests that call them.
#
#   scripts/sanitize.sh asan|tsan [pytest arguments]
#
# asan  AddressSanitizer and UndefinedBehaviorSanitizer
# tsan  ThreadSanitizer
#
# Runs in the current Python environment (with the package's extra "test"), into build/<mode>; the
# installed oodkernels is left as it is. Test files are named as they are in python_tests/. Without
# arguments: every test of the ops except those of torch.compile and the like, which are about Python,
# and of the memory that is used; with tsan also except those of torch.distributed. The first report
# ends the run. Needs GCC. OODK_CPU_CAPABILITY=baseline|avx2|avx512 chooses the kernels.
#
# Only _C is instrumented; torch, libgomp and Python are not. ThreadSanitizer cannot see how libgomp
# starts and joins threads, so csrc/cpu/parallel.h tells it: without that it would report every
# parallel loop. scripts/tsan.supp leaves out what it sees of the other libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
shift || true
case $mode in
  asan)
    sanitizers=address,undefined
    # libstdc++ too, or a C++ exception finds no handler under a Python that does not link it.
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
    # Python and torch keep memory until the process ends.
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1
    export UBSAN_OPTIONS=print_stacktrace=1
    ;;
  tsan)
    sanitizers=thread
    preload=$(gcc -print-file-name=libtsan.so)
    # _C has no mutex; what Python and torch do with theirs as they end is not ours.
    export TSAN_OPTIONS=halt_on_error=1:report_mutex_bugs=0:suppressions=$PWD/scripts/tsan.supp
    ;;
  *)
    echo "usage: scripts/sanitize.sh asan|tsan [pytest arguments]" >&2
    exit 2
    ;;
esac
if [[ $preload != */* ]]; then
  echo "sanitize.sh needs GCC with its sanitizers (libasan, libtsan)" >&2
  exit 2
fi

site=$PWD/build/$mode/site
# With the build's tools in the environment a second run compiles only what has changed.
isolation=()
python -c "import cmake, ninja, pybind11, scikit_build_core" 2>/dev/null &&
  isolation=(--no-build-isolation)
export CC=gcc CXX=g++
python -m pip install --quiet --no-deps --upgrade --target "$site" "${isolation[@]}" \
  --config-settings=build-dir="build/$mode" --config-settings=install.strip=false \
  --config-settings=cmake.define.OODK_SANITIZE=$sanitizers \
  --config-settings=cmake.define.OODK_CUDA=OFF .

if (($#)); then
  tests=("$@")
else
  left_out="compile or inductor or export or opcheck or fake or autocast or extra_memory"
  left_out+=" or memory_that_is_not_there" # the sanitizers need terabytes of addresses
  [[ $mode == tsan ]] && left_out+=" or distributed" # torch's own threads, not instrumented
  tests=(-q ops cluster/test_kmeans.py cluster/test_kmeans_numbers.py nn/test_losses.py
    -k "not ($left_out)")
fi
# ThreadSanitizer's shadow memory wants addresses that are not randomised, where that is allowed.
fixed=()
setarch "$(uname -m)" -R true 2>/dev/null && fixed=(setarch "$(uname -m)" -R)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} MKL_NUM_THREADS=1
cd python_tests
# --capture=sys: the sanitizers' reports go past Python to the terminal.
PYTHONPATH=$site LD_PRELOAD=$preload "${fixed[@]}" \
  python -m pytest -p no:cacheprovider --capture=sys "${tests[@]}"
