"""Logits, features, scores and labels in files, read a chunk at a time.

``.npy``, ``.pt`` and ``.safetensors`` files are mapped into memory anew for each chunk, so that a
pass over a file of any size keeps no more than a chunk of it resident; ``.npz``, ``.csv`` and
``.parquet`` files are read in order. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import itertools
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._files import replacing, write_text

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["FORMATS", "ROLES", "Array", "Samples", "open_arrays", "open_samples", "save_arrays"]

CHUNK_BYTES = 1 << 25

ROLES = {
    "logits": ("logits", "logit"),
    "features": ("features", "feature", "embeddings"),
    "scores": ("scores", "score", "conf", "confidence"),
    "labels": ("labels", "label", "targets", "target", "y"),
}
"""What an array can be, and the names under which it is found in a file."""

_DIMENSIONS = {"logits": 2, "features": 2}
"""Of arrays that have more than one."""
_NUMBERED = re.compile(r"(.*?)[_.\-]?(\d+)")
_LONE = ""


@dataclass(frozen=True)
class Array:
    """An array in a file, of which only the header has been read.

    Attributes:
        path: The file.
        name: Its name in the file; "" where a file holds one array without a name.
        shape: (N, ...); N is None where only reading on tells it (``.csv``).
        dtype: Type of its entries.
        chunks: Number of rows -> the array in chunks of that many, the last one shorter.
    """

    path: Path
    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    chunks: Callable[[int], Iterator[Tensor]]

    @property
    def label(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name}" if self.name else str(self.path)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return int(np.prod([n or 1 for n in self.shape[1:]])) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole array in memory."""
        return torch.cat(list(self.chunks(max(1, CHUNK_BYTES // self.row_bytes))))


@dataclass(frozen=True)
class Samples:
    """What is on disk about N samples. Iterating gives batches, dicts of a role's name to rows.

    Attributes:
        name: Where it comes from, for messages.
        arrays: Role (see :data:`ROLES`) -> array: logits (N, C), features (N, d), scores (N,),
            labels (N,). Any other name is that of a score.
    """

    name: str
    arrays: Mapping[str, Array]

    @property
    def num_samples(self) -> int | None:
        """N; None where only reading on tells it."""
        return next((a.shape[0] for a in self.arrays.values() if a.shape[0] is not None), None)

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
        return Samples(self.name, {role: self[role] for role in roles})

    def __getitem__(self, role: str) -> Array:
        if role not in self.arrays:
            raise ValueError(f"{self.name} has no {role}, only {', '.join(self.arrays)}")
        return self.arrays[role]


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
        path: ``.npy``, ``.npz``, ``.pt``, ``.safetensors``, ``.csv``, ``.parquet``, or a folder.
        kind: What a single array without a telling name is: a key of :data:`ROLES`.
        columns: Role -> name of the array (a table's column), where it is none of the usual ones.
        labels: Another file, with the labels.

    Raises:
        ValueError: The file is damaged or of another format; an array is missing, or of a wrong
            shape; arrays differ in length.
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
        elif name := next((name for name in names if name in found), None):
            chosen[role] = found[name]
    if not chosen and len(found) == 1:
        (lone,) = found.values()
        chosen[kind or ("logits" if len(lone.shape) == 2 else "scores")] = lone
    elif not chosen.keys() - {"labels"} and kind in (None, "scores"):
        chosen |= {
            name: array
            for name, array in found.items()
            if len(array.shape) == 1 and array.dtype.is_floating_point
        }
    if labels is not None:
        chosen["labels"] = open_samples(labels, kind="labels")["labels"]
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
    return Samples(str(path), chosen)


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
        found = {}
        for file in sorted(path.iterdir()):
            if file.suffix in (".npy", ".safetensors") and not file.name.startswith("."):
                for name, array in open_arrays(file).items():
                    found[name or file.stem] = array
        if not found:
            raise ValueError(f"{path} must hold .npy or .safetensors files, it has none")
        return found
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    with path.open("rb"):  # one message for all formats where there is no such file
        pass
    with _telling(path):
        return FORMATS[path.suffix](path)


def save_arrays(path: PathLike, arrays: Mapping[str, Tensor]) -> None:
    """Write arrays to a file, in the format that the end of its name says.

    The file is replaced whole or not at all.

    Args:
        path: As for :func:`open_samples`, but no folder.
        arrays: Name -> (N, ...), on the CPU. One alone for ``.npy``; (N,) for ``.csv`` and
            ``.parquet``.

    Raises:
        ValueError: The format is none of these, or cannot hold the arrays.
        OSError: The file cannot be written.
        ImportError: The format needs a package that is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    arrays = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    flat = all(array.ndim == 1 for array in arrays.values())
    if path.suffix in (".csv", ".parquet") and not flat:
        raise ValueError(f"{path}: {path.suffix} is for arrays of one dimension")
    if path.suffix == ".npy" and len(arrays) != 1:
        raise ValueError(f"{path}: .npy holds one array, got {_listed(arrays)}: use .npz")
    if path.suffix == ".csv":
        columns = zip(*(array.tolist() for array in arrays.values()), strict=True)
        lines = [",".join(map(str, row)) for row in columns]
        write_text(path, "\n".join([",".join(arrays), *lines]) + "\n")
        return
    with replacing(path) as temporary:
        if path.suffix in (".npy", ".npz"):
            numpy = {name: array.numpy() for name, array in arrays.items()}
            with temporary.open("wb") as file:
                if path.suffix == ".npy":
                    np.save(file, next(iter(numpy.values())), allow_pickle=False)
                else:
                    np.savez(file, allow_pickle=False, **numpy)
        elif path.suffix == ".pt":
            torch.save(dict(arrays), temporary)
        elif path.suffix == ".safetensors":
            _module("safetensors.torch", path).save_file(dict(arrays), temporary)
        else:
            table = _module("pyarrow", path).table(
                {name: array.numpy() for name, array in arrays.items()}
            )
            _module("pyarrow.parquet", path).write_table(table, temporary)


# --- what the arrays must be ------------------------------------------------------------------


def _checked(role: str, array: Array) -> Array:
    wanted, shape = _DIMENSIONS.get(role, 1), array.shape
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
    if role in ("logits", "features") and not floating:
        raise TypeError(f"{array.label}: {role} must be floating-point, got {array.dtype}")
    if array.dtype.is_complex or array.dtype == torch.bool:
        raise TypeError(f"{array.label}: {role} must be numbers, got {array.dtype}")
    return array


def _as_role(role: str, chunk: Tensor) -> Tensor:
    if _DIMENSIONS.get(role, 1) == 1:
        chunk = chunk.reshape(len(chunk))
    if role == "labels":
        return chunk.long()
    return chunk if chunk.is_floating_point() else chunk.double()


def _shown(shape: tuple[int | None, ...]) -> str:
    return str(tuple("N" if n is None else n for n in shape)).replace("'", "")


def _listed(names: Mapping[str, Any]) -> str:
    shown = [name or "an array without a name" for name in names]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "nothing"


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Errors of readers as a ValueError that names the file."""
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError, PermissionError, _FileError):
        raise
    except pickle.UnpicklingError:
        raise _FileError(
            f"{path} holds Python objects, which are not loaded: save nothing but tensors"
        ) from None
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise _FileError(f"{path} cannot be read, or is cut off: {reason}") from error


class _FileError(ValueError):
    """A message that already names the file."""


def _module(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{path}: {path.suffix} needs {package}, which could not be imported ({error}): "
            f"pip install {package}"
        ) from error


# --- formats ----------------------------------------------------------------------------------


def _torch_type(path: Path, name: str, dtype: np.dtype[Any]) -> torch.dtype | None:
    """The tensor type of an array; None where it has none, as text."""
    if dtype.hasobject:
        raise _FileError(
            f"{path}{': ' + name if name else ''} holds Python objects, which are not loaded: "
            "save numbers"
        )
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


def _to_tensor(values: NDArray[Any]) -> Tensor:
    """A copy, in native byte order."""
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def _mapped(
    path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[..., Tensor]
) -> Array:
    """An array of which ``read(start, end)`` gives a copy of some rows."""

    def chunks(rows: int) -> Iterator[Tensor]:
        for start in range(0, shape[0], rows):
            with _telling(path):
                yield read(start, min(shape[0], start + rows))

    return Array(path, name, shape, dtype, chunks)


def _npy(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        shape, _, header = _npy_header(path, file)
    dtype = _torch_type(path, "", header)
    if dtype is None or not shape:
        raise _FileError(f"{path} must hold an array of numbers, got {header}, shape {shape}")
    np.load(path, mmap_mode="r", allow_pickle=False)  # is the file as long as its header says

    def read(start: int, end: int) -> Tensor:
        return _to_tensor(np.load(path, mmap_mode="r", allow_pickle=False)[start:end])

    return {_LONE: _mapped(path, _LONE, shape, dtype, read)}


def _npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise _FileError(f"{path} is no .npy file, or a pickled one, which is not loaded") from None
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _npz(path: Path) -> dict[str, Array]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            name = member.removesuffix(".npy")
            with archive.open(member) as file:
                shape, fortran, header = _npy_header(path, file)
            dtype = _torch_type(path, name, header)
            if dtype is not None and shape:
                chunks = _zip_chunks(path, member, shape, fortran, header)
                found[name] = Array(path, name, shape, dtype, chunks)
    return found


def _zip_chunks(
    path: Path, member: str, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]
) -> Callable[[int], Iterator[Tensor]]:
    def chunks(rows: int) -> Iterator[Tensor]:
        with _telling(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            if fortran and len(shape) > 1:
                yield from _to_tensor(np.lib.format.read_array(file, allow_pickle=False)).split(
                    rows
                )
                return
            _npy_header(path, file)
            row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise ValueError(f"{member} ends after {start + len(data) // row_bytes} rows")
                yield _to_tensor(np.frombuffer(data, dtype).reshape(count, *shape[1:]))
            file.read(1)  # at its end the archive checks the sum of the bytes

    return chunks


def _pt(path: Path) -> dict[str, Array]:
    def load() -> dict[str, Tensor]:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if isinstance(content, Tensor):
            content = {_LONE: content}
        if not isinstance(content, Mapping):
            raise _FileError(
                f"{path} must hold a tensor or a dict of tensors, got {type(content).__name__}"
            )
        return {
            str(name): value.detach()
            for name, value in content.items()
            if isinstance(value, Tensor) and value.ndim
        }

    def array(name: str, tensor: Tensor) -> Array:
        def read(start: int, end: int) -> Tensor:
            return load()[name][start:end].clone()

        return _mapped(path, name, tuple(tensor.shape), tensor.dtype, read)

    return {name: array(name, tensor) for name, tensor in load().items()}


def _safetensors(path: Path) -> dict[str, Array]:
    library = _module("safetensors", path)

    def array(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
        def read(start: int, end: int) -> Tensor:
            with library.safe_open(path, "pt") as file:
                rows: Tensor = file.get_slice(name)[start:end]
                return rows.clone()

        return _mapped(path, name, shape, dtype, read)

    with library.safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: array(name, tuple(part.get_shape()), part[:0].dtype)
            for name, part in slices.items()
            if part.get_shape()
        }


def _table(columns: Mapping[str, torch.dtype]) -> dict[str, list[str]]:
    """Arrays of a table by name: its columns, and those that are numbered, together."""
    numbered: dict[str, dict[int, str]] = {}
    for column in columns:
        match = _NUMBERED.fullmatch(column)
        role = match and next((r for r, names in ROLES.items() if match[1] in names), None)
        if match and role:
            numbered.setdefault(role, {})[int(match[2])] = column
    single = {c: [c] for c in columns if not any(c in g.values() for g in numbered.values())}
    return single | {role: [g[i] for i in sorted(g)] for role, g in numbered.items()}


def _csv(path: Path) -> dict[str, Array]:
    """Types are those of the first thousand lines: integers where there are no others."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = list(itertools.islice(file, 1000))
    delimiter = max(",;\t", key=head[0].count) if head else ","
    rows = list(csv.reader(head, delimiter=delimiter))
    if not rows or not rows[0]:
        raise _FileError(f"{path} is empty")
    cells = rows[0]
    has_header = not all(map(_is_number, cells))
    rows = rows[has_header:]
    if not rows or len(rows[0]) != len(cells):
        raise _FileError(f"{path} must have as many cells in the first row as in its header")
    columns = zip(*(row for row in rows if len(row) == len(cells)), strict=True)
    integer = [all(re.fullmatch(r"\s*[+-]?\d+\s*", cell) for cell in c) for c in columns]
    if not has_header:
        dtype = torch.int64 if len(cells) == 1 and integer[0] else torch.float64
        return {_LONE: _csv_array(path, _LONE, list(range(len(cells))), dtype, 0, delimiter)}
    place = {name.strip(): i for i, name in enumerate(cells)}
    types = {
        name: torch.int64 if integer[i] else torch.float64
        for name, i in place.items()
        if _is_number(rows[0][i])
    }
    found = {}
    for name, names in _table(types).items():
        wide = len(names) > 1 or name in ("logits", "features")
        dtype = torch.float32 if wide else types[names[0]]
        if name in ROLES["scores"]:
            dtype = torch.float64
        where = [place[n] for n in names]
        found[name] = _csv_array(path, name, where, dtype, 1, delimiter)
    return found


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _csv_array(
    path: Path, name: str, columns: list[int], dtype: torch.dtype, skip: int, delimiter: str
) -> Array:
    one = len(columns) == 1
    as_numpy = torch.empty(0, dtype=dtype).numpy().dtype

    def chunks(rows: int) -> Iterator[Tensor]:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for _ in range(skip):
                next(file)
            for start in itertools.count(0, rows):
                with warnings.catch_warnings(), _telling(path):
                    warnings.filterwarnings("ignore", "loadtxt: input contained no data")
                    try:
                        values = np.loadtxt(
                            itertools.islice(file, rows),
                            as_numpy,
                            comments=None,
                            delimiter=delimiter,
                            usecols=columns,
                            ndmin=2,
                            quotechar='"',
                        )
                    except ValueError as error:
                        raise ValueError(f"in rows from {start}: {error}") from None
                if not len(values):
                    return
                yield torch.from_numpy(values[:, 0] if one else values)

    shape = (None,) if one else (None, len(columns))
    return Array(path, name, shape, dtype, chunks)


def _parquet(path: Path) -> dict[str, Array]:
    arrow, parquet = _module("pyarrow", path), _module("pyarrow.parquet", path)
    with parquet.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        widths = {}
        if count:
            sample = next(file.iter_batches(1))
            widths = dict(zip(schema.names, sample.columns, strict=True))

    def is_list(kind: Any) -> bool:
        checks = (arrow.types.is_list, arrow.types.is_large_list, arrow.types.is_fixed_size_list)
        return any(check(kind) for check in checks)

    types = {}
    for field in schema:
        kind = field.type.value_type if is_list(field.type) else field.type
        if arrow.types.is_floating(kind) or arrow.types.is_integer(kind):
            types[field.name] = torch.from_numpy(np.empty(0, kind.to_pandas_dtype())).dtype
    found = {}
    for name, names in _table(types).items():
        dtype = types[names[0]]
        if is_list(schema.field(names[0]).type):
            width = len(widths[names[0]].flatten()) if count else 0
            shape: tuple[int, ...] = (count, width)
        else:
            shape = (count,) if len(names) == 1 else (count, len(names))
        found[name] = Array(path, name, shape, dtype, _parquet_chunks(path, names, shape))
    return found


def _parquet_chunks(
    path: Path, names: list[str], shape: tuple[int, ...]
) -> Callable[[int], Iterator[Tensor]]:
    parquet = _module("pyarrow.parquet", path)

    def column(values: Any, name: str, start: int) -> NDArray[Any]:
        if values.null_count:
            first = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]
            raise ValueError(f"{name} must not be null, got null at row {start + first}")
        if hasattr(values, "flatten") and len(shape) == 2 and len(names) == 1:
            flat = values.flatten()
            if flat.null_count or len(flat) != len(values) * shape[1]:
                raise ValueError(f"{name} must have {shape[1]} numbers in each row")
            return flat.to_numpy(zero_copy_only=False).reshape(-1, shape[1])
        return values.to_numpy(zero_copy_only=False)

    def pieces(rows: int) -> Iterator[Tensor]:
        start = 0
        with _telling(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(rows, columns=names):
                columns = [column(batch.column(name), name, start) for name in names]
                start += batch.num_rows
                values = columns[0] if len(names) == 1 else np.stack(columns, 1)
                yield _to_tensor(values)

    def chunks(rows: int) -> Iterator[Tensor]:
        return _rechunked(pieces(rows), rows)

    return chunks


def _rechunked(pieces: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in chunks of ``rows``: row groups of a file end where they please."""
    waiting: list[Tensor] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= rows:
            *full, rest = torch.cat(waiting).split(rows)
            if len(rest) == rows:
                full, rest = [*full, rest], rest[:0]
            yield from full
            waiting, count = [rest], len(rest)
    if count:
        yield torch.cat(waiting)


FORMATS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _pt,
    ".safetensors": _safetensors,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Readers by the end of a file's name."""
