"""Completes the API pages as they are built: no public name of a room is missing."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
MARK = "<!-- the rest -->"


@functools.cache
def public_names() -> dict[str, list[str]]:
    """``__all__`` of each module that has one, without the command line and the demo."""
    found = {}
    for path in sorted((ROOT / "oodkernels").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module.split(".")[1:2] in (["cli"], ["demo"]):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[module] = ast.literal_eval(node.value)
    return found


def missing(text: str, rooms: list[str]) -> list[str]:
    """Public names of rooms that no directive in ``text`` shows.

    A directive shows all of a module's ``__all__``, and so those names of modules in it; or one
    name.
    """
    names = public_names()
    shown: dict[str, set[str]] = {}
    for path in DIRECTIVE.findall(text):
        module, _, name = path.rpartition(".")
        shown.setdefault(path if path in names else module, set()).update(names.get(path, [name]))
    return [
        f"{module}.{name}"
        for module, public in names.items()
        if any(f"{module}.".startswith(f"{room}.") for room in rooms)
        for name in public
        if not any(name in shown[s] for s in shown if f"{module}.".startswith(f"{s}."))
    ]


def complete(text: str) -> str:
    """A page with directives for what its rooms have beside those that it shows."""
    rest = missing(text, DIRECTIVE.findall(text))
    heading = "## Beneath\n\nWhat the modules of this room share.\n\n" if rest else ""
    return text.replace(MARK, heading + "\n\n".join(f"::: {path}" for path in rest))


def on_pre_build(**_: Any) -> None:
    """Called by mkdocs before each build: what is served is built again as it is edited."""
    public_names.cache_clear()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return complete(markdown) if MARK in markdown else markdown
