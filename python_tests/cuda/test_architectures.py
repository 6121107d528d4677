"""cmake/Architectures.cmake: what the CUDA ops are built for where nobody has said."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALL = "75-real;80-real;90-real;100-real;120-real;120-virtual"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or not (ROOT / "cmake").is_dir(), reason="no cmake"
)


@pytest.mark.parametrize(
    ("capabilities", "expected", "why"),
    [
        ("9.0", "90-real", "the GPU that is here"),
        ("8.9\n9.0\n8.9", "89-real;90-real", "the GPU that is here"),
        ("23.1", ALL, "nvcc does not know the GPU"),
        ("9.0\n23.1", ALL, "nvcc does not know the GPU"),
        ("NVIDIA-SMI has failed", ALL, "no GPU is here"),
        (None, ALL, "no GPU is here"),
    ],
)
def test_default_architectures(
    capabilities: str | None, expected: str, why: str, tmp_path: Path
) -> None:
    def program(name: str, output: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nprintf '{output}\\n'\n")
        path.chmod(0o755)
        return path

    known = "\\n".join(f"compute_{arch}" for arch in (75, 80, 86, 89, 90, 100, 120))
    nvcc = program("nvcc", known)
    if capabilities is not None:
        program("nvidia-smi", capabilities.replace("\n", "\\n"))
    script = tmp_path / "script.cmake"
    script.write_text(
        f"include({ROOT}/cmake/Architectures.cmake)\n"
        f"oodk_default_architectures({nvcc} found why)\n"
        'message("${found}|${why}")\n'
    )
    cmake = shutil.which("cmake") or ""
    path = os.pathsep.join([str(tmp_path), str(Path(cmake).parent), "/bin"])
    done = subprocess.run(
        [cmake, "-P", str(script)], env={"PATH": path}, capture_output=True, text=True
    )
    found, reason = done.stderr.strip().split("|")
    assert found == expected
    assert why in reason
