"""What the README and the docs show must run as it stands."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oodkernels

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLE = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [p for p in (ROOT / "README.md", *DOCS) if EXAMPLE.search(p.read_text())]


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example of a page goes on where the one before it stopped; none installs anything."""
    for name in ("lightning_fabric", "safetensors", "torchmetrics", "typer"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict[str, Any] = {}
    for language, example in EXAMPLE.findall(page.read_text()):
        if language == "python":
            exec(example, scope)
        elif "pip install" not in example:
            run_shell(example)


HEREDOC = re.compile(r"^python - <<'EOF'\n(.*?)^EOF$", re.DOTALL | re.MULTILINE)


def run_shell(example: str) -> None:
    """Python and commands of ``oodk`` alone are run here: each would import torch anew."""
    for i, part in enumerate(HEREDOC.split(example)):
        if i % 2:
            exec(part, {})
        else:
            run_commands(part)


def run_commands(example: str) -> None:
    from typer.testing import CliRunner

    from oodk.app import app

    lines = example.replace("\\\n", "").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    if not re.search("[|<>;&$*]", example) and all(words[0] == "oodk" for words in commands):
        for _, *arguments in commands:
            found = CliRunner().invoke(app, arguments)
            assert found.exit_code == 0, (arguments, found.output)
        return
    oodk = f'oodk() {{ "{sys.executable}" -m oodkernels "$@"; }}\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", oodk + example], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} == listed


def test_api_covers_every_public_name() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    pages = [hooks.complete(page.read_text()) for page in (ROOT / "docs" / "api").glob("*.md")]
    everything = "\n".join(pages)
    shown = {path.rpartition(".")[2] for path in hooks.DIRECTIVE.findall(everything)}
    for module in hooks.DIRECTIVE.findall(everything):
        shown.update(hooks.public_names().get(module, []))
    assert set(oodkernels.__all__) - {"__version__"} <= shown
    rooms = [name for name in hooks.public_names() if name.count(".") == 1]
    assert len(rooms) > 8
    assert hooks.missing(everything, rooms) == []


# What a fragment begins with: "Of SGD." leaves open what is of SGD.
FRAGMENTS = {"As", "By", "For", "From", "In", "Of", "Over", "To", "With", "Without"}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Those of modules, classes and functions, and the texts below attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for before, statement in zip([node, *node.body], node.body, strict=False):
                if (
                    (before is node or isinstance(before, (ast.Assign, ast.AnnAssign)))
                    and isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)
                ):
                    yield statement.lineno, statement.value.value


def test_docstrings_start_with_a_capital_and_a_whole_phrase() -> None:
    wrong = []
    for path in sorted((*(ROOT / "oodkernels").rglob("*.py"), *(ROOT / "oodk").rglob("*.py"))):
        for line, text in docstrings(path):
            words = text.split()
            fragment = len(words) < 2 or words[0] in FRAGMENTS
            if fragment or not re.match(r"[A-Z0-9`(:\"<]", words[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {' '.join(words)[:60]}")
    assert not wrong, "\n".join(wrong)


def test_figures_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
