"""What the README and the docs show must run as it stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    scope: dict[str, Any] = {}
    for language, example in EXAMPLE.findall(page.read_text()):
        if language == "python":
            exec(example, scope)
        elif "pip install" not in example:
            oodk = f'oodk() {{ "{sys.executable}" -m oodkernels "$@"; }}\nset -e\n'
            done = subprocess.run(
                ["bash", "-c", oodk + example], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} == listed


def public_names() -> dict[str, list[str]]:
    """``__all__`` of each module that has one, without the command line and the demo."""
    found = {}
    for path in sorted((ROOT / "oodkernels").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module.split(".")[1:2] in (["cli"], ["demo"]):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[module] = ast.literal_eval(node.value)
    return found


def test_api_covers_every_public_name() -> None:
    """A page shows all of a module's ``__all__``, those of modules in it too, or one name."""
    names = public_names()
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown: dict[str, set[str]] = {}
    for path in re.findall(r"^::: (\S+)$", pages, re.MULTILINE):
        module, _, name = path.rpartition(".")
        shown.setdefault(path if path in names else module, set()).update(names.get(path, [name]))
    everything = set().union(*shown.values())
    missing = [
        f"{module}.{name}"
        for module, public in names.items()
        for name in public
        if name != "__version__"
        and not (
            name in everything
            if module == "oodkernels"
            else any(name in shown[s] for s in shown if f"{module}.".startswith(f"{s}."))
        )
    ]
    assert not missing, "in no page of docs/api: " + ", ".join(missing)


def test_figures_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
