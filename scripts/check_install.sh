#!/usr/bin/env bash
# Installs the package in each way that must work, every time in a fresh virtual environment.
#
#   scripts/check_install.sh [fresh] [preinstalled] [no-isolation] [editable] [newest-torch]
#
# fresh         pip's isolated build, no torch installed before (downloads the newest torch)
# preinstalled  torch $TORCH installed before; fails if a second torch is downloaded
# no-isolation  --no-build-isolation
# editable      --editable
# newest-torch  a wheel built against torch $TORCH passes the tests under the newest torch, and
#               where nvcc was found its _cuda loads there (downloads the newest torch)
#
# Without arguments: preinstalled no-isolation editable, which download no second torch.
set -euo pipefail

TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fresh_environment() { # name -> activates it
  "$PYTHON" -m venv "$work/$1"
  # shellcheck disable=SC1091
  source "$work/$1/bin/activate"
  python -m pip install --quiet --upgrade pip
  cd "$work"
}

works() {
  python - <<'PY'
import torch
import oodkernels

score = torch.ops.oodk.mos_score(torch.zeros(2, 4), torch.tensor([0, 2, 4]))
assert score.tolist() == [-0.5, -0.5], score
print(oodkernels.build_info())
PY
}

check_fresh() {
  fresh_environment fresh
  pip install --quiet "$root"
  works
}

check_preinstalled() {
  fresh_environment preinstalled
  pip install --quiet "torch==$TORCH"
  pip install --verbose "$root" >install.log 2>&1 || { tail -n 50 install.log; return 1; }
  if grep -E "^ *(Collecting|Downloading|Processing|Using cached) torch" install.log; then
    echo "a second torch was fetched" >&2
    return 1
  fi
  works
}

check_no_isolation() {
  fresh_environment no-isolation
  pip install --quiet "torch==$TORCH" numpy pybind11 "scikit-build-core>=0.11" "cmake>=3.30" ninja
  pip install --quiet --no-build-isolation "$root"
  works
}

check_editable() {
  fresh_environment editable
  pip install --quiet "torch==$TORCH"
  cp -r "$root" source
  pip install --quiet --editable ./source
  works
  echo '__version__ = "edited"' >source/oodkernels/_version.py
  python -c "import oodkernels; assert oodkernels.__version__ == 'edited'"
}

check_newest_torch() {
  fresh_environment build
  pip install --quiet "torch==$TORCH"
  pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$root"
  deactivate
  fresh_environment newest
  pip install --quiet torch
  pip install --quiet --no-index --no-deps "$work"/wheel/*.whl
  pip install --quiet hypothesis numpy pytest scikit-learn
  works
  if unzip -l "$work"/wheel/*.whl | grep -q _cuda.*so; then
    python -W error::RuntimeWarning -c \
      "import oodkernels; assert oodkernels.build_info()['cuda'], '_cuda was not loaded'"
  fi
  python -m pytest -q "$root/python_tests/ops/test_ops.py" "$root/python_tests/test_extension.py"
}

for mode in "${@:-preinstalled no-isolation editable}"; do
  for name in $mode; do
    echo "== $name"
    (check_"${name//-/_}")
    echo "== $name: ok"
  done
done
