"""Storeys of the package: a room imports from those below it, and private names stay at home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import oodkernels

PACKAGE = Path(oodkernels.__file__).parent
COMMANDS = PACKAGE.with_name("oodk")

# From the ground up; rooms of one line do not know each other.
STOREYS = [
    ["_C", "_cuda", "_checks", "_digest", "_files", "_optional", "_ranks", "_version", "_wordnet"],
    ["reference", "_safetensors"],
    ["_extension", "_progress"],
    ["ops"],
    ["cluster"],
    ["groups"],
    ["nn", "metrics"],
    ["metrics.streaming"],
    ["detectors"],
    ["data"],
    ["training", "evaluation"],
    ["deploy"],
    [""],  # oodkernels itself
    ["demo"],
    ["oodk"],  # the command line, beside the package
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
# Modules without a room of their own, which every room may use by their public names.
SHARED = {
    "_checks",
    "_digest",
    "_extension",
    "_files",
    "_optional",
    "_progress",
    "_ranks",
    "_safetensors",
    "_version",
    "_wordnet",
    "_C",
    "_cuda",
}


def room_of(module: str) -> str:
    """The room that a module (its name without ``oodkernels.``) is in."""
    parts = module.split(".")
    return next(room for n in (2, 1) if (room := ".".join(parts[:n])) in LEVEL or n == 1)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of whatever a file imports of the package, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "oodkernels":
            for alias in node.names:
                yield (node.module or "").removeprefix("oodkernels").lstrip("."), alias.name
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "oodkernels":
                    yield alias.name.removeprefix("oodkernels").lstrip("."), ""


def wrong(path: Path) -> Iterator[str]:
    where = path.relative_to(COMMANDS.parent if path.is_relative_to(COMMANDS) else PACKAGE)
    module = ".".join(where.with_suffix("").parts).removesuffix("__init__")
    home = room_of(module.rstrip("."))
    for source, name in imports(path):
        if not source and name in LEVEL:
            source, name = name, ""
        room = room_of(source)
        if room == home:
            continue
        if LEVEL[room] >= LEVEL[home]:
            yield f"{module} imports {source}.{name}: not from below"
        private = [p for p in [*source.split("."), name] if p.startswith("_")]
        if private and source not in SHARED:
            yield f"{module} imports {source}.{name}: private there"


def test_rooms() -> None:
    paths = sorted([*PACKAGE.rglob("*.py"), *COMMANDS.rglob("*.py")])
    found = [line for path in paths for line in wrong(path)]
    assert not found, "\n".join(found)


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> Iterator[str]:
        if node in trail:
            yield " -> ".join([*trail[trail.index(node) :], node])
        elif node not in done:
            for following in sorted(graph.get(node, ())):
                yield from visit(following, [*trail, node])
            done.add(node)

    for node in graph:
        yield from visit(node, [])


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[module] = set()
        for source, name in imports(path):
            if not source and name in ("_C", "_cuda"):  # compiled; no module of Python's
                continue
            for candidate in (f"{source}.{name}", source, f"{source}.__init__"):
                file = PACKAGE / (candidate.strip(".").replace(".", "/") + ".py")
                if candidate.strip(".") and file.exists():
                    graph[module].add(candidate.strip("."))
                    break
    assert not list(circles(graph)), "\n".join(circles(graph))


def test_a_circle_is_seen() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == ["a -> b -> c -> a"]
    assert not list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}))
