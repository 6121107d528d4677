"""The compiled modules: what they say of themselves, and each instruction set's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_code

import oodkernels
from oodkernels import _C


def test_build_info() -> None:
    info = oodkernels.build_info()
    assert info["version"] == oodkernels.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"][0] == "baseline"
    assert info["threads"] == torch.get_num_threads()


# What reaches kernels, by file; all else is the same Python on each of them.
KERNELS = {
    "ops/test_ops.py": "reference or strides or gradient_against or special or threads",
    "ops/test_neighbors.py": "products or batch or parts",
    "ops/test_roc.py": "counts_are or counts_beyond or sort_of or sort_where or same_bits or nan",
    "ops/test_histogram.py": "counts or rows or atoms or strided or threads or nan",
    "nn/test_losses.py": "test_one_read",
}


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_capability(capability: str) -> None:
    """Each build of the kernels agrees with the reference, not only the one chosen here."""
    if capability not in _C.available_cpu_capabilities():
        pytest.skip(f"this processor has no {capability}")
    if capability == _C.cpu_capability():
        pytest.skip(f"{capability} is what the tests themselves run on")
    chosen = " or ".join(f"({Path(file).name} and ({tests}))" for file, tests in KERNELS.items())
    code = (
        f"import sys, pytest; from oodkernels import _C; "
        f"assert _C.cpu_capability() == {capability!r}; "
        f"sys.exit(pytest.main([*{list(KERNELS)!r}, '-q', '-x', '-k', {chosen!r}]))"
    )
    result = run_code(code, OODK_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def test_unknown_capability() -> None:
    result = run_code("import oodkernels", OODK_CPU_CAPABILITY="avx1024")
    assert result.returncode != 0
    assert "OODK_CPU_CAPABILITY must be one of baseline" in result.stderr
    assert "avx1024" in result.stderr


def test_importing_registers_the_ops() -> None:
    code = (
        "import torch, oodkernels; "
        "print(torch.ops.oodk.mos_score(torch.zeros(2, 4), torch.tensor([0, 2, 4])).tolist())"
    )
    result = run_code(code)
    assert result.stdout.strip() == "[-0.5, -0.5]", result.stderr
