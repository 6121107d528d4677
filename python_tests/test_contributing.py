"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oodkernels

ROOT = Path(__file__).parents[1]
STEP = re.compile(
    r"(Write|In)\s`([^`]+)`(?:,\sbelow\s`([^`]+)`)?:\n\n```\w+\n(.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources."""
    left_out = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "dist", "site")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)


def follow(recipe: str, tree: Path) -> None:
    """Do what the recipe of this title says."""
    (part,) = re.findall(rf"^## {recipe}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    steps = STEP.findall(part)
    assert len(steps) >= 4
    for verb, name, anchor, block in steps:
        path = tree / name
        if verb == "Write":
            assert not path.exists(), f"{name} is there"
            path.write_text(block)
            continue
        lines = path.read_text().splitlines(keepends=True)
        at = [i for i, line in enumerate(lines) if line.rstrip("\n") == anchor]
        assert len(at) == 1, f"{name} has {len(at)} lines {anchor!r}"
        lines.insert(at[0] + 1, block)
        path.write_text("".join(lines))


def run(tree: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def lint(tree: Path) -> None:
    if importlib.util.find_spec("ruff") is not None:
        run(tree, "-m", "ruff", "check", "--fix", ".")
        run(tree, "-m", "ruff", "format", "--check", ".")


COMMON = ("-q", "-p", "no:cacheprovider", "python_tests/test_rooms.py")
DOCS = ("python_tests/test_docs.py::test_api_covers_every_public_name",)


def test_a_new_detector_and_a_new_objective(tree: Path) -> None:
    pytest.importorskip("lightning_fabric")
    follow("A new detector", tree)
    follow("A new objective", tree)
    for path in Path(oodkernels.__file__).parent.glob("_C*.so"):  # as it is installed
        shutil.copy(path, tree / "oodkernels")
    tests = ("python_tests/detectors/test_margin.py", "python_tests/detectors/test_detectors.py")
    names = "margin or focal or registry or rooms or api"
    focal = "python_tests/training/test_focal.py"
    run(tree, "-m", "pytest", *COMMON, *DOCS, *tests, focal, "-k", names)
    lint(tree)


OTHERS = re.compile(r"\n  csrc/cpu/(?!capability|margin)[\w/]+\.cpp\b")


@pytest.mark.slow
def test_a_new_op(tree: Path) -> None:
    """The extension is built anew for the CPU, with the kernels of this op alone."""
    follow("A new op", tree)  # whether or not it can be built here
    for module in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(module)
    import pybind11
    import torch

    (tree / "CMakeLists.txt").write_text(OTHERS.sub("", (tree / "CMakeLists.txt").read_text()))
    build = tree / "build"
    cmake = [
        "-m", "cmake", "-S", ".", "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DOODK_CUDA=OFF", f"-DSKBUILD_PROJECT_VERSION={oodkernels.__version__}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DOODK_TORCH_DIR={Path(torch.__file__).parent}",
    ]  # fmt: skip
    run(tree, *cmake)
    run(tree, "-m", "cmake", "--build", str(build))
    for path in build.glob("_C*.so"):
        shutil.copy(path, tree / "oodkernels")
    tests = ("python_tests/ops/test_ops.py", "-k", "logit_margin or has_a_row or rooms or api")
    run(tree, "-m", "pytest", *COMMON, *DOCS, *tests)
    lint(tree)
