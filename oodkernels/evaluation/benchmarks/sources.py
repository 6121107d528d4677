"""The sets of a benchmark where they lie: all are looked at before anything is run."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from oodkernels._files import file_digest
from oodkernels.data import FORMATS, ImageFiles, Samples, Shards, open_images, open_samples
from oodkernels.data.arrays import PathLike
from oodkernels.data.images import Transform, class_folders
from oodkernels.data.samples import RECORD
from oodkernels.evaluation.benchmarks.definition import Benchmark, SetDefinition

__all__ = ["MissingDataError", "OpenSet", "open_sets"]

_SHOWN = 3


class MissingDataError(ValueError):
    """Lists, folders or images of a benchmark that are not there.

    Attributes:
        missing: Set -> paths.
    """

    def __init__(self, message: str, missing: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class Identity:
    """What tells a set's data from others: two runs with equal ones measured on the same.

    Neither digest depends on where the data lie, or on how lines of a list end.

    Attributes:
        source: "images", "folder", "shards" or "arrays".
        digest: Of names and labels in their order; of arrays, of their content.
        sizes: Digest of the files' sizes; of arrays, of their content.
        count: Samples; None where only reading on tells it.
        missing: Images that are not there and were left out.
    """

    source: str
    digest: str
    sizes: str
    count: int | None
    missing: int = 0


@dataclass(frozen=True)
class OpenSet:
    """A set that was found.

    Attributes:
        definition: Its place in the benchmark.
        data: Its images, or what was extracted from them.
        identity: Of its data.
        missing: Names of images that are not there, where that is allowed.
        base: What the names of its images are relative to; None where they have no path.
    """

    definition: SetDefinition
    data: ImageFiles | Shards | Samples
    identity: Identity
    missing: tuple[str, ...] = field(default=(), repr=False)
    base: Path | None = None

    def relative(self, name: str) -> str:
        """The name of an image, wherever the data lie."""
        return name if self.base is None else _relative(name, str(self.base))


def open_sets(
    benchmark: Benchmark,
    folder: PathLike,
    transform: Transform | None = None,
    *,
    model_classes: Sequence[str] | None = None,
    other_counts: bool = False,
    skip_bad: bool = False,
) -> dict[str, OpenSet]:
    """All sets of a benchmark, each of which is there, down to every image of it.

    Args:
        benchmark: Which.
        folder: What its paths are relative to.
        transform: PIL image -> tensor; of sets that are not resized, ``benchmark.preprocess``
            without that.
        model_classes: Names of the model's classes in the order of its columns, where known.
        other_counts: Whether sets may have another number of images than the benchmark says.
        skip_bad: Whether images may be missing or unreadable; they are left out.

    Returns:
        Key of a set -> the set.

    Raises:
        MissingDataError: A list, a folder or an image is missing; all are named.
        ValueError: A list has another number of images, or labels that are not the benchmark's
            classes: it is of another benchmark or version.
        OSError: Something cannot be read.
    """
    folder = Path(folder)
    absent: dict[str, list[str]] = {}
    found: dict[str, OpenSet] = {}
    names = _class_names(benchmark, folder)
    for each in benchmark.sets:
        if gone := _gone(each, folder):
            absent[each.key] = gone
    if not absent:
        for each in benchmark.sets:
            own = transform
            if not each.resize and benchmark.preprocess is not None:
                own = replace(benchmark.preprocess, resize=None)
            opened = _open(benchmark, each, folder, own, names, model_classes)
            if not skip_bad and opened.missing:
                absent[each.key] = list(opened.missing)
            found[each.key] = opened
    if absent:
        raise MissingDataError(f"{benchmark.name}: {_told(absent)}", absent)
    for one in found.values():
        _check(benchmark, one, other_counts)
        if isinstance(one.data, (ImageFiles, Shards)):
            one.data.skip_bad = skip_bad
    return found


def _gone(each: SetDefinition, folder: Path) -> list[str]:
    """What must be there before a set can be opened and is not."""
    paths = [] if _is_shards(each) else [folder / each.path]
    if each.root is not None:
        paths.append(folder / each.root)
    return [str(path) for path in paths if not path.exists()]


def _is_shards(each: SetDefinition) -> bool:
    return re.search(r"\.tar(\.gz)?$", each.path) is not None


def _is_extracted(path: Path) -> bool:
    if path.is_dir():
        return (path / RECORD).exists()
    return path.suffix in FORMATS


def _class_names(benchmark: Benchmark, folder: Path) -> Sequence[str] | None:
    if benchmark.classes == "folders":
        train = next((s for s in benchmark.sets if s.key == "id/train"), None)
        path = None if train is None else folder / train.path
        if path is None or not path.is_dir() or _is_extracted(path):
            raise ValueError(
                f'{benchmark.name}: classes must not be "folders" where id.train is no folder of '
                "images"
            )
        return class_folders(path)
    return benchmark.classes if isinstance(benchmark.classes, tuple) else None


def _open(
    benchmark: Benchmark,
    each: SetDefinition,
    folder: Path,
    transform: Transform | None,
    names: Sequence[str] | None,
    model_classes: Sequence[str] | None,
) -> OpenSet:
    path = folder / each.path
    if not _is_shards(each) and _is_extracted(path):
        samples = open_samples(path)
        files = sorted({array.path for array in samples.arrays.values()})
        content = _hash(file_digest(file) for file in files)
        found = Identity("arrays", content, content, samples.num_samples)
        return OpenSet(each, samples, found)
    root = None if each.root is None else folder / each.root
    images = open_images(path, transform, root)
    if isinstance(images, Shards):
        sizes = [f"{Path(s).name} {Path(s).stat().st_size}" for s in images.shards]
        own = _hash(Path(s).name for s in images.shards)
        return OpenSet(each, images, Identity("shards", own, _hash(sizes), None))
    if each.kind in ("id", "shifted"):
        images = _with_classes(benchmark, each, images, names, model_classes)
    else:
        images.labels, images.class_names = [-1] * len(images), None
    base = path if path.is_dir() else (path.parent if root is None else root)
    return _present(each, images, base)


def _with_classes(
    benchmark: Benchmark,
    each: SetDefinition,
    images: ImageFiles,
    names: Sequence[str] | None,
    model_classes: Sequence[str] | None,
) -> ImageFiles:
    """Labels that count the model's classes, which folders tell by their names."""
    if images.class_names is None:
        return images
    known = names if model_classes is None else model_classes
    if known is None:
        raise ValueError(
            f"{benchmark.name}: {each.key} has a folder for each class, and which columns of the "
            "model these are is not known: say classes = [names in the order of the columns], or a "
            'file with these, or classes = "folders" if they are the sorted folders of id.train'
        )
    if names is not None and model_classes is not None and not set(names) <= set(model_classes):
        raise ValueError(
            f"{benchmark.name}: its classes must be among those of the model, and "
            f"{min(set(names) - set(model_classes))!r} is not"
        )
    return images.matched(known, f"{benchmark.name}: {each.key}")


def _present(each: SetDefinition, images: ImageFiles, base: Path) -> OpenSet:
    """The images that are there; every folder is read once."""
    sizes: dict[Path, dict[str, int]] = {}
    kept, missing, lines, weights = [], [], [], []
    for i, path in enumerate(images.paths):
        if path.parent not in sizes:
            sizes[path.parent] = dict(_files(path.parent))
        size = sizes[path.parent].get(path.name)
        if size is None:
            missing.append(str(path))
            continue
        name = _relative(str(path), str(base))
        kept.append(i)
        lines.append(f"{name} {images.labels[i]}")
        weights.append(f"{size}")
    if missing:
        images = copy.copy(images)
        images.paths = [images.paths[i] for i in kept]
        images.labels = [images.labels[i] for i in kept]
    source = "folder" if (images.class_names and not each.root) else "images"
    found = Identity(source, _hash(lines), _hash(weights), len(kept), len(missing))
    return OpenSet(each, images, found, tuple(missing), base)


def _relative(path: str, base: str) -> str:
    """A path as it is in a list, with slashes; of a million paths, almost all lie in the base."""
    start = os.path.join(base, "")
    inside = path.startswith(start) and ".." not in path
    found = path[len(start) :] if inside else os.path.relpath(path, base)
    return found.replace(os.sep, "/")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield entry.name, entry.stat().st_size


def _hash(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def _told(absent: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for key, paths in absent.items():
        more = len(paths) - _SHOWN
        shown = ", ".join(paths[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        parts.append(f"{key} lacks {shown}")
    return "; ".join(parts)


def _check(benchmark: Benchmark, found: OpenSet, other_counts: bool) -> None:
    each, count = found.definition, found.identity.count
    where = f"{benchmark.name}: {each.key}"
    listed = None if count is None else count + found.identity.missing
    if not other_counts and None not in (each.count, listed) and listed != each.count:
        raise ValueError(
            f"{where} must have {each.count} images, got {listed}: it is another version of the "
            "list, or of another benchmark (--other-counts goes on all the same)"
        )
    if count == 0:
        raise ValueError(f"{where} has no images that are there")
    if not isinstance(found.data, ImageFiles) or each.kind not in ("id", "shifted"):
        return
    labels = set(found.data.labels)
    if labels == {-1}:
        return
    number = benchmark.classes if isinstance(benchmark.classes, int) else None
    if found.data.class_names is not None:
        number = len(found.data.class_names)
    if min(labels) < 0 or (number is not None and max(labels) >= number):
        wrong = min(labels) if min(labels) < 0 else max(labels)
        classes = "class ids" if number is None else f"class ids 0..{number - 1}"
        raise ValueError(
            f"{where}: labels must be {classes}, got {wrong}: the list is of another benchmark"
        )
    exact = isinstance(benchmark.classes, int) and each.kind == "id"
    if exact and not other_counts and len(labels) < (number or 0):
        raise ValueError(
            f"{where} must have images of {number} classes, got {len(labels)}: the list is of "
            "another benchmark (--other-counts goes on all the same)"
        )


def identity_of(sets: Mapping[str, OpenSet]) -> dict[str, dict[str, Any]]:
    """Key -> identity, as JSON holds it."""
    return {key: asdict(each.identity) for key, each in sets.items()}
