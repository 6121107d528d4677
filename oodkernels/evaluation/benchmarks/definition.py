"""Benchmarks as data: which sets they have, where these lie, how images are made ready."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodkernels._files import check_file
from oodkernels._optional import require
from oodkernels.data.arrays import PathLike
from oodkernels.data.images import Preprocess
from oodkernels.data.models import read_class_names

__all__ = ["BENCHMARKS", "Benchmark", "SetDefinition", "read_benchmark"]

_HERE = Path(__file__).parent
BENCHMARKS = tuple(sorted(path.stem for path in _HERE.glob("*.toml")))
"""Names of the benchmarks that the package defines."""

OOD_KINDS = ("near", "far")
_SECTIONS = {
    "id": ("train", "val", "test"),
    "ood": ("val",),
    **dict.fromkeys((*OOD_KINDS, "shifted")),
}
"""Section of the file -> the names it may have; None for any."""
_RESERVED = {"near", "far", "all", "average", "id", "ood", "shifted"}


@dataclass(frozen=True)
class SetDefinition:
    """A set of a benchmark.

    Attributes:
        kind: "id", "ood", "near", "far" or "shifted".
        name: "train", "val" or "test" of ID, "val" of OOD; any of the other kinds.
        path: A folder of images, a list of them, shards, a folder of `oodk extract`, or a file.
        root: What the paths of a list are relative to; None for the list's folder.
        count: Images in it; None where the benchmark does not say.
        resize: Whether its images are resized before they are cut out.
    """

    kind: str
    name: str
    path: str
    root: str | None = None
    count: int | None = None
    resize: bool = True

    @property
    def key(self) -> str:
        """Kind and name: "near/tin"."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is made of.

    Attributes:
        name: Its own.
        sets: Those of ID, of OOD, near, far, and covariate-shifted ID ones.
        classes: Their number, or their names in the order of the model's columns, or "folders":
            those of the training images, sorted; None where nothing says.
        preprocess: How images are made ready; None for the model's own way.
    """

    name: str
    sets: tuple[SetDefinition, ...]
    classes: int | tuple[str, ...] | str | None = None
    preprocess: Preprocess | None = None

    def without(self, keys: tuple[str, ...]) -> Benchmark:
        """The benchmark without some of its sets.

        Raises:
            ValueError: There is no such set, or no OOD set or no ID test set would be left.
        """
        known = [each.key for each in self.sets]
        for key in keys:
            if key not in known:
                raise ValueError(f"{self.name} has no set {key!r}, only {', '.join(known)}")
        rest = tuple(each for each in self.sets if each.key not in keys)
        return _checked(Benchmark(self.name, rest, self.classes, self.preprocess))

    def of(self, *kinds: str) -> list[SetDefinition]:
        """The sets of some kinds."""
        return [each for each in self.sets if each.kind in kinds]


def read_benchmark(source: PathLike) -> Benchmark:
    """A benchmark of the package by its name, or of a TOML file.

    The file has sections ``[id]`` (``test``, and where there are any ``train`` and ``val``),
    ``[ood]`` (``val``), ``[near]``, ``[far]`` and ``[shifted]`` (any names). A set is a path, or a
    table with ``path`` and perhaps ``root``, ``count`` and ``resize = false``. Beside them
    ``name``, ``classes`` and ``[preprocess]`` may be given, see :class:`Benchmark` and
    :class:`oodkernels.data.Preprocess`.

    Args:
        source: A name in :data:`BENCHMARKS`, or a path that ends in .toml.

    Raises:
        ValueError: There is no such benchmark, or the file is not as above.
        OSError: The file cannot be read.
    """
    text = str(source)
    if not text.endswith(".toml"):
        if text not in BENCHMARKS:
            raise ValueError(
                f"there is no benchmark {text!r}, only {', '.join(BENCHMARKS)}; or give a .toml "
                "file of your own"
            )
        return _parsed(_HERE / f"{text}.toml", text)
    return _parsed(check_file("read_benchmark", source), None)


def _parsed(path: Path, name: str | None) -> Benchmark:
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "cli", "a benchmark")
    shown = name or str(path)
    try:
        content = toml.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{shown} must be TOML: {error}") from None
    known = {"name", "classes", "preprocess", *_SECTIONS}
    if unknown := content.keys() - known:
        raise ValueError(f"{shown} has {min(unknown)!r}, there is only {', '.join(sorted(known))}")
    sets = []
    for kind, names in _SECTIONS.items():
        section = content.get(kind, {})
        if not isinstance(section, dict):
            raise ValueError(f"{shown}: {kind} must be a section [{kind}], got {section!r:.80}")
        for key, value in section.items():
            sets.append(_set(f"{shown}: {kind}.{key}", kind, key, names, value))
    options = content.get("preprocess")
    try:
        preprocess = None if options is None else Preprocess(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown}: preprocess: {error}") from None
    own = content.get("name", path.stem)
    if not isinstance(own, str) or not own:
        raise ValueError(f"{shown}: name must be text, got {own!r:.80}")
    classes = _classes(shown, content.get("classes"), path.parent)
    return _checked(Benchmark(own, tuple(sets), classes, preprocess))


def _classes(shown: str, given: Any, folder: Path) -> int | tuple[str, ...] | str | None:
    if given is None or given == "folders":
        return given
    if isinstance(given, str):
        return read_class_names(folder / given)
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        if len(set(given)) == len(given):
            return tuple(given)
    elif type(given) is int and given > 0:
        return given
    raise ValueError(
        f"{shown}: classes must be their number, their names (each once) in the order of the "
        f'model\'s columns, a file with these, or "folders", got {given!r:.80}'
    )


def _set(where: str, kind: str, name: str, names: Any, value: Any) -> SetDefinition:
    if names is not None and name not in names:
        raise ValueError(f"{where}: there is only {', '.join(names)}")
    if not re.fullmatch(r"[\w.+-]+", name) or name.lower() in (_RESERVED if names is None else ()):
        raise ValueError(f"{where}: a set cannot be called {name!r}")
    table = {"path": value} if isinstance(value, str) else value
    types = {"path": str, "root": str, "count": int, "resize": bool}
    if not isinstance(table, Mapping) or "path" not in table:
        raise ValueError(f"{where} must be a path, or a table with one, got {value!r:.80}")
    for key, found in table.items():
        if key not in types:
            raise ValueError(f"{where} has {key!r}, there is only {', '.join(types)}")
        if type(found) is not types[key]:
            raise ValueError(f"{where}: {key} must be {types[key].__name__}, got {found!r:.80}")
    return SetDefinition(kind, name, **table)


def _checked(found: Benchmark) -> Benchmark:
    keys = [each.key for each in found.sets]
    if "id/test" not in keys or not found.of(*OOD_KINDS):
        raise ValueError(f"{found.name} must have id.test and a set in [near] or [far]")
    names = [each.name for each in found.of(*OOD_KINDS, "shifted")]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{found.name} has more than one set {min(twice)!r}")
    return found
