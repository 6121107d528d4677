"""Logits, features, scores and labels of samples, from files of any format.

A pass over a file of any size keeps no more than a chunk of it resident. Nothing is unpickled.
"""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodkernels._checks import check_count
from oodkernels._files import replacing
from oodkernels.data.arrays import (
    CHUNK_BYTES,
    MATRICES,
    ROLES,
    Array,
    FileError,
    PathLike,
    Source,
    telling,
)
from oodkernels.data.formats import FORMATS, safetensors
from oodkernels.groups import Groups

__all__ = ["Samples", "match_classes", "open_arrays", "open_samples", "save_arrays"]

METADATA = "oodkernels.samples"
"""Key of the names of classes in a ``.safetensors`` file."""
RECORD = "extract.json"
"""File of a folder that holds an extraction, with the names of classes among its settings."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Samples:
    """What is on disk about N samples. Iterating gives batches, dicts of a role's name to rows.

    Attributes:
        name: Where it comes from, for messages.
        arrays: Role (see :data:`ROLES`) -> array: logits (N, C), features (N, d), scores (N,),
            labels (N,), confidence (N,), the logit of a confidence branch. Any other name is that
            of a score.
        class_names: Name of each label 0, 1, ...; None where the file does not say.
        model_classes: Names of the classes of the model that made the logits, by class id; None
            where the file does not say.
        absent_column: Column of the logits that is the absent class's; None without one.
        groups: Of a MOS model's logits; None for others.
    """

    name: str
    arrays: Mapping[str, Array]
    class_names: tuple[str, ...] | None = None
    model_classes: tuple[str, ...] | None = None
    absent_column: int | None = None
    groups: Groups | None = None

    @property
    def num_samples(self) -> int | None:
        """N; None where only reading on tells it."""
        return next((a.shape[0] for a in self.arrays.values() if a.shape[0] is not None), None)

    @property
    def without_accuracy(self) -> str | None:
        """Why the labels cannot be compared with the logits; None where they can.

        Labels of folders that are not known to be the model's classes cannot. Those of files that
        say nothing of names are taken at their word, as columns of the logits.
        """
        if self.class_names is None or self.class_names == self.model_classes:
            return None
        names = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
        if self.model_classes is None:
            return f"{self.name}: whether its classes ({names}) are the model's is not known"
        return f"{self.name}: its classes ({names}) are not the model's"

    def with_classes(self, names: Sequence[str]) -> Samples:
        """The same samples, with labels that count ``names``.

        Args:
            names: The classes of a model or head.

        Raises:
            ValueError: The names of the labels are not known, or one is not among ``names``.
        """
        if self.class_names is None or "labels" not in self.arrays:
            raise ValueError(f"{self.name} does not say the names of its classes")
        ids = torch.tensor(match_classes(self.class_names, names, self.name))
        labels = self.arrays["labels"]

        def pieces(rows: int) -> Iterator[Tensor]:
            for chunk in labels.chunks(rows):
                chunk = chunk.reshape(len(chunk)).long()
                wrong = (chunk < -1) | (chunk >= len(ids))
                if bool(wrong.any()):
                    raise FileError(
                        f"{labels.label}: labels must be -1 or class ids 0..{len(ids) - 1}, got "
                        f"{int(chunk[wrong][0])}"
                    )
                yield torch.where(chunk < 0, chunk, ids[chunk.clamp(min=0)])

        found = replace(labels, shape=labels.shape[:1], dtype=torch.int64, pieces=pieces)
        return replace(self, arrays={**self.arrays, "labels": found}, class_names=tuple(names))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches()

    def batches(self, rows: int | None = None) -> Iterator[dict[str, Tensor]]:
        """All samples in order.

        Args:
            rows: In a batch; by default as many as fit 32 MiB.

        Raises:
            ValueError: A file is damaged, or arrays turn out to differ in length.
        """
        if rows is None:
            rows = max(1, CHUNK_BYTES // sum(a.row_bytes for a in self.arrays.values()))
        rows = check_count("Samples.batches", "rows", rows)
        streams = [array.chunks(rows) for array in self.arrays.values()]
        for chunks in itertools.zip_longest(*streams):
            sizes = {0 if chunk is None else len(chunk) for chunk in chunks}
            if len(sizes) > 1:
                names = " and ".join(array.label for array in self.arrays.values())
                raise ValueError(f"{names} must have equally many samples")
            yield {
                role: _as_role(role, chunk) for role, chunk in zip(self.arrays, chunks, strict=True)
            }

    def read(self, role: str) -> Tensor:
        """All of one array in memory.

        Raises:
            ValueError: There is no such array, or its file is damaged.
        """
        return _as_role(role, self[role].read())

    def only(self, *roles: str) -> Samples:
        """The same samples, of which no more is read than these arrays.

        Raises:
            ValueError: There is no such array.
        """
        return replace(self, arrays={role: self[role] for role in roles})

    def __getitem__(self, role: str) -> Array:
        if role not in self.arrays:
            raise ValueError(f"{self.name} has no {role}, only {', '.join(self.arrays)}")
        return self.arrays[role]


def match_classes(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """The place of each of ``names`` among the ``known`` ones.

    Args:
        names: Of classes, such as those of the folders of a validation set.
        known: Those of the training run, in the order of its class ids.
        where: What the names are of, for messages.

    Returns:
        A class id for each of ``names``.

    Raises:
        ValueError: One is not known, or is there twice.
    """
    ids = {name: i for i, name in enumerate(known)}
    for what in (names, known):
        if len(set(what)) < len(what):
            twice = next(name for i, name in enumerate(what) if name in what[:i])
            raise ValueError(f"{where}: the class {twice!r} is there twice")
    if unknown := [name for name in names if name not in ids]:
        raise ValueError(
            f"{where}: its classes must be among those trained on, {_listed(known)}; unknown: "
            + _listed(unknown)
        )
    return [ids[name] for name in names]


def open_samples(
    path: PathLike,
    *,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: PathLike | None = None,
) -> Samples:
    """The logits, features, scores and labels in a file, or in a folder of files.

    Arrays are found by their names, see :data:`ROLES`; a table's columns ``logits_0``,
    ``logits_1``, ... make one array. A file with a single array of another name, or of none, is
    taken for logits if it has two dimensions and for scores if it has one; several of one dimension
    are as many scores, as ``oodk score`` writes them. In a folder, as ``oodk extract`` writes it,
    the files' names count.

    Args:
        path: A file of any of :data:`FORMATS`, or a folder.
        kind: What a single array without a telling name is: a key of :data:`ROLES`.
        columns: Role -> name of the array (a table's column), where it is none of the usual ones.
        labels: Another file, with the labels.

    Raises:
        ValueError: The file is damaged or of another format; an array is missing, or of a wrong
            shape; arrays differ in length; two could be the same.
        TypeError: An array is of a wrong type.
        OSError: The file cannot be read.
        ImportError: The format needs a package that is missing.
    """
    columns = columns or {}
    for role in [*columns, *([kind] if kind else [])]:
        if role not in ROLES:
            raise ValueError(f"open_samples: {role!r} must be one of {', '.join(ROLES)}")
    found = open_arrays(path)
    chosen: dict[str, Array] = {}
    for role, names in ROLES.items():
        if role in columns:
            if columns[role] not in found:
                raise ValueError(f"{path} has no column {columns[role]!r}, only {_listed(found)}")
            chosen[role] = found[columns[role]]
            continue
        present = [name for name in names if name in found and name not in columns.values()]
        if len(present) > 1:
            raise ValueError(
                f"{path} has {' and '.join(present)}, any of which may be the {role}: say by "
                f"columns, {role}={present[0]}"
            )
        if present:
            chosen[role] = found[present[0]]
    if not chosen.keys() - {"labels"}:
        taken = {array.name for array in chosen.values()}
        rest = {name: array for name, array in found.items() if name not in taken}
        if len(rest) == 1 and (not chosen or "" in rest):
            (lone,) = rest.values()
            chosen[kind or ("logits" if len(lone.shape) == 2 else "scores")] = lone
        elif kind in (None, "scores"):
            chosen |= {
                name: array
                for name, array in rest.items()
                if len(array.shape) == 1 and array.dtype.is_floating_point
            }
    meaning = _meaning(path, chosen)
    if labels is not None:
        other = open_samples(labels, kind="labels")
        chosen["labels"], meaning["class_names"] = other["labels"], other.class_names
    if not chosen.keys() - {"labels"} and not (kind == "labels" and chosen):
        raise ValueError(
            f"{path} must hold logits, features or scores, got {_listed(found)}: "
            "say which is which by columns"
        )
    chosen = {role: _checked(role, array) for role, array in chosen.items()}
    lengths = {a.label: a.shape[0] for a in chosen.values() if a.shape[0] is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "arrays must have equally many samples, got "
            + ", ".join(f"{n} in {name}" for name, n in lengths.items())
        )
    return Samples(str(path), chosen, **meaning)


def open_arrays(path: PathLike) -> dict[str, Array]:
    """Every numeric array of a file by name, unread; "" for the only one of a file without names.

    Args:
        path: As for :func:`open_samples`.

    Raises:
        ValueError: As :func:`open_samples`.
        OSError: As :func:`open_samples`.
        ImportError: As :func:`open_samples`.
    """
    path = Path(path)
    if path.is_dir():
        found: dict[str, Array] = {}
        for file in sorted(path.iterdir()):
            if file.suffix not in (".npy", ".safetensors") or file.name.startswith("."):
                continue
            for name, array in open_arrays(file).items():
                if (name := name or file.stem) in found:
                    raise ValueError(
                        f"{path} holds {name} twice, in {found[name].path.name} and {file.name}: "
                        "give one of the files"
                    )
                found[name] = array
        if not found:
            raise ValueError(f"{path} must hold .npy or .safetensors files, it has none")
        return found
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    with telling(path):
        return FORMATS[path.suffix].read(Source(path))


def save_arrays(path: PathLike, arrays: Mapping[str, Tensor]) -> None:
    """Write arrays to a file, in the format that the end of its name says.

    The file is replaced whole or not at all.

    Args:
        path: As for :func:`open_samples`, but no folder.
        arrays: Name -> (N, ...). One alone for ``.npy``; (N,) for ``.csv`` and ``.parquet``.

    Raises:
        ValueError: The format is none of these, or cannot hold the arrays.
        OSError: The file cannot be written.
        ImportError: The format needs a package that is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    form = FORMATS[path.suffix]
    arrays = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    if form.flat and not all(array.ndim == 1 for array in arrays.values()):
        raise ValueError(f"{path}: {path.suffix} is for arrays of one dimension")
    if form.one and len(arrays) != 1:
        raise ValueError(f"{path}: {path.suffix} holds one array, got {_listed(arrays)}: use .npz")
    with replacing(path) as temporary:
        form.write(temporary, arrays)


# --- what the arrays must be ------------------------------------------------------------------


def _meaning(path: PathLike, chosen: Mapping[str, Array]) -> dict[str, Any]:
    """What the files say about their labels and logits, as :class:`Samples` has it."""
    meaning = {}
    for role, keys in (
        ("labels", ["class_names"]),
        ("logits", ["model_classes", "absent_column", "groups"]),
    ):
        content: Any = None
        if role in chosen:
            file = chosen[role].path
            with telling(file):
                if file.suffix == ".safetensors":
                    content = json.loads(
                        safetensors.read_metadata(Source(file)).get(METADATA, "{}")
                    )
                elif (record := file.with_name(RECORD)).exists() and Path(path).is_dir():
                    content = json.loads(record.read_text(encoding="utf-8"))
                for key in keys:
                    if (value := (content or {}).get(key)) is not None:
                        meaning[key] = _MEANINGS[key](value)
    return meaning


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"the names of classes must be text, got {str(value)[:80]}")
    return tuple(value)


_MEANINGS: dict[str, Callable[[Any], Any]] = {
    "class_names": _names,
    "model_classes": _names,
    "absent_column": operator.index,
    "groups": Groups.from_json,
}


def _checked(role: str, array: Array) -> Array:
    wanted, shape = 2 if role in MATRICES else 1, array.shape
    if wanted == 1 and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]
    if len(shape) != wanted:
        form = {"logits": "(N, C)", "features": "(N, d)"}.get(role, "(N,)")
        raise ValueError(f"{array.label}: {role} must be {form}, got {_shown(array.shape)}")
    if 0 in shape:
        raise ValueError(f"{array.label}: {role} must not be empty, got {_shown(array.shape)}")
    floating = array.dtype.is_floating_point
    if role == "labels" and (floating or array.dtype == torch.bool):
        raise TypeError(f"{array.label}: labels must be integers, got {array.dtype}")
    if role in MATRICES and not floating:
        raise TypeError(f"{array.label}: {role} must be floating-point, got {array.dtype}")
    if array.dtype.is_complex or array.dtype == torch.bool:
        raise TypeError(f"{array.label}: {role} must be numbers, got {array.dtype}")
    if floating and array.dtype not in _FLOATS:
        raise TypeError(
            f"{array.label}: {role} must be float64, float32, bfloat16 or float16, got "
            f"{array.dtype}"
        )
    return array


def _as_role(role: str, chunk: Tensor) -> Tensor:
    if role not in MATRICES:
        chunk = chunk.reshape(len(chunk))
    if role == "labels":
        return chunk.long()
    return chunk if chunk.is_floating_point() else chunk.double()


def _shown(shape: tuple[int | None, ...]) -> str:
    return str(tuple("N" if n is None else n for n in shape)).replace("'", "")


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = [name or "an array without a name" for name in names]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "nothing"
