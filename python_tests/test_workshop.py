"""What surrounds the package agrees with itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
CALLED = re.compile(r"scripts/(\w+\.(?:sh|py))")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("tool", ["clang-format", "mypy", "pre-commit", "ruff"])
def test_tools_have_one_version(tool: str) -> None:
    given = re.findall(rf'"{tool}==([\w.]+)"', PROJECT)
    assert len(given) == 1, f"the extra dev must pin {tool}"
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(rf"\[{tool}==([\w.]+)\]", hooks)) <= set(given)
    assert not re.search(rf"\[{tool}\]", hooks), "pinned in pyproject.toml, not here"


def test_workflows_call_what_ci_calls() -> None:
    """Each script is there, and what .ci/run does is done by a workflow too."""
    ci = set(CALLED.findall((ROOT / ".ci" / "run").read_text()))
    workflows = {
        name
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for name in CALLED.findall(path.read_text())
    }
    hooks = CALLED.findall((ROOT / ".pre-commit-config.yaml").read_text())
    called = ci | workflows | set(hooks)
    assert {name for name in called if not (ROOT / "scripts" / name).exists()} == set()
    assert ci - workflows == {"cuda_resources.py"}  # their machines have no nvcc
    for name in workflows:
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111, f"{name} must be executable"


def test_yaml_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    for path in (*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_the_versions_agree() -> None:
    version = re.search(r'"(.*)"', (ROOT / "oodkernels" / "_version.py").read_text())
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_extras_know_each_other() -> None:
    """An extra that another one, or a message, names is there."""
    extras = set(
        re.findall(r"^([\w-]+) = \[", PROJECT.partition("optional-dependencies]")[2], re.M)
    )
    named = re.findall(r"oodkernels\[([\w,-]+)\]", PROJECT)
    for path in (*(ROOT / ".github").rglob("*.yml"), *(ROOT / "scripts").glob("*.sh")):
        named += re.findall(r'"\.\[([\w,-]+)\]"', path.read_text())
    for path in (*(ROOT / "oodkernels").rglob("*.py"), *(ROOT / "oodk").rglob("*.py")):
        text = path.read_text()
        named += re.findall(r"oodkernels\[([\w,-]+)\]", text)
        named += re.findall(r"\brequire\(\s*\"[\w.]+\",\s*\"([\w-]+)\"", text)
    assert {name for names in named for name in names.split(",")} <= extras


def test_unbuilt_sources_do_not_shadow_the_installed_package(tmp_path: Path) -> None:
    """``python -m pytest`` in a checkout, as well as ``pytest``."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    installed = tmp_path / "site" / "oodkernels.py"
    for file, text in (
        (tmp_path / "oodkernels" / "__init__.py", "raise ImportError('not built')"),
        (installed, "built = True"),
        (tmp_path / "python_tests" / "test_it.py", "import oodkernels\n\n\ndef test(): pass"),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "python_tests"]
    environment = {**os.environ, "PYTHONPATH": str(installed.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
