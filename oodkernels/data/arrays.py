"""An array in a file, read a chunk at a time through a descriptor.

Nothing is mapped into memory: where another process cuts a mapped file short, its reader is killed.
Here the size and time of the file are looked at around each piece that is read.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["Array", "FileError", "PathLike"]

CHUNK_BYTES = 1 << 25
MAX_ROW_BYTES = 1 << 28
"""A larger row is no sample's, but a damaged or hostile header's."""

ROLES = {
    "logits": ("logits", "logit"),
    "features": ("features", "feature", "embeddings"),
    "scores": ("scores", "score", "conf", "confidence"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "confidence": ("confidence_logit",),
}
"""What an array can be, and the names under which it is found in a file."""

MATRICES = ("logits", "features")
"""The roles of two dimensions."""
_NUMBERED = re.compile(r"(.*?)[_.\-]?(\d+)")


class FileError(ValueError):
    """A file that cannot be read as what it is said to be; the message names it.

    What a file holds, such as the name of a column, may be of any length: a message is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1000 else f"{message[:1000]}...")


@dataclass(frozen=True)
class Array:
    """An array in a file, of which only the header has been read.

    Attributes:
        path: The file.
        name: Its name in the file; "" where a file holds one array without a name.
        shape: (N, ...); N is None where only reading on tells it (``.csv``).
        dtype: Type of its entries.
        pieces: Number of rows -> the array in pieces of that many, the last one shorter.
    """

    path: Path
    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    pieces: Callable[[int], Iterator[Tensor]]

    @property
    def label(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name}" if self.name else str(self.path)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return math.prod(n or 1 for n in self.shape[1:]) * self.dtype.itemsize

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """The array in chunks of ``rows`` rows, the last one shorter.

        Raises:
            ValueError: The file is damaged, or has changed since its header was read.
        """
        if self.row_bytes > MAX_ROW_BYTES:
            raise FileError(
                f"{self.label}: a row must have at most {MAX_ROW_BYTES >> 20} MiB, got "
                f"{self.row_bytes >> 20} MiB"
            )
        with telling(self.path):
            yield from self.pieces(rows)

    def read(self) -> Tensor:
        """The whole array in memory."""
        chunks = list(self.chunks(max(1, CHUNK_BYTES // self.row_bytes)))
        empty = torch.empty([n or 0 for n in self.shape], dtype=self.dtype)
        return torch.cat(chunks) if chunks else empty


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Whatever a reader raises, as a :class:`FileError` that names the file."""
    try:
        yield
    except (FileNotFoundError, FileError, ImportError, PermissionError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{path} does not fit into memory: {error}") from None
    except pickle.UnpicklingError:
        raise FileError(
            f"{path} holds Python objects, which are not loaded: save nothing but tensors"
        ) from None
    except Exception as error:
        raise FileError(f"{path} cannot be read, or is cut off: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error says, on one line that is not too long; some repeat what the file holds."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:300]}...") or type(error).__name__


class Source:
    """A file as it was when it was first looked at: a regular one that nobody is to change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = path.stat()
        if not path.is_file():  # opening a pipe would wait for its writer
            raise FileError(f"{path} must be a file, got a pipe, a device or a folder")
        self.size, self._state = found.st_size, (found.st_size, found.st_mtime_ns, found.st_ino)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file, without a buffer; what goes wrong after a change is put down to that."""
        with self.path.open("rb", buffering=0) as file:
            self.check(file)
            try:
                yield file
            except Exception:
                self.check(file)  # which would be the reason
                raise

    def check(self, file: IO[Any]) -> None:
        """Raise :class:`FileError` where an open file is no longer what it was."""
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns, found.st_ino) != self._state:
            raise FileError(
                f"{self.path} changed while it was read, from {self.size} bytes to "
                f"{found.st_size}: something else writes to it"
            )

    def read(self, file: IO[bytes], start: int, size: int) -> bytearray:
        """``size`` bytes from ``start``."""
        data = bytearray(size)
        view = memoryview(data)
        file.seek(start)
        while view and (count := file.readinto(view)):  # type: ignore[attr-defined]
            view = view[count:]
        self.check(file)
        if view:
            raise FileError(f"{self.path} is cut off: it ends at byte {start + size - len(view)}")
        return data


def stored(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offset: int,
    strides: Sequence[int] | None = None,
    swapped: bool = False,
) -> Array:
    """An array whose numbers lie in a file as they would in memory.

    Args:
        source: The file.
        name: As for :class:`Array`.
        shape: Likewise.
        dtype: Likewise.
        offset: Its first byte.
        strides: In entries; by default those of C's order.
        swapped: Whether the bytes of each entry are in the other order.

    Raises:
        FileError: The file is shorter than that, or a number stands for many.
    """
    c_order = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    steps = c_order if strides is None else list(strides)
    inner = 1 + sum((n - 1) * step for n, step in zip(shape[1:], steps[1:], strict=True))
    if shape[0] <= 1:
        steps[0] = inner
    where = f"{source.path}: {name}" if name else str(source.path)
    entries = math.prod(shape)
    span = (shape[0] - 1) * steps[0] + inner if entries else 0
    if entries > span:
        raise FileError(f"{where} repeats {span} numbers as {entries}: save a contiguous copy")
    if offset + span * dtype.itemsize > source.size:
        raise FileError(
            f"{where} is cut off: shape {shape} needs {offset + span * dtype.itemsize} bytes, the "
            f"file has {source.size}"
        )
    if entries and steps[0] < inner and steps[0] != 1:
        raise FileError(f"{where} has strides {tuple(steps)}: save a contiguous copy")

    def numbers(file: IO[bytes], start: int, count: int) -> Tensor:
        data = source.read(file, offset + start * dtype.itemsize, count * dtype.itemsize)
        if swapped:
            whole = np.frombuffer(data, f"u{dtype.itemsize}")
            whole.byteswap(inplace=True)
        return torch.frombuffer(data, dtype=dtype)

    def by_rows(file: IO[bytes], start: int, count: int) -> Tensor:
        found = numbers(file, start * steps[0], (count - 1) * steps[0] + inner)
        return found.as_strided((count, *shape[1:]), steps).contiguous()

    def by_columns(file: IO[bytes], start: int, count: int) -> Tensor:
        found = torch.empty((*shape[1:], count), dtype=dtype)
        for index in np.ndindex(*shape[1:]):
            first = start + sum(i * step for i, step in zip(index, steps[1:], strict=True))
            found[index] = numbers(file, first, count)
        return found.movedim(-1, 0).contiguous()

    def pieces(rows: int) -> Iterator[Tensor]:
        if not entries:
            return
        read = by_columns if steps[0] < inner else by_rows
        with source.open() as file:
            for start in range(0, shape[0], rows):
                yield read(file, start, min(rows, shape[0] - start))

    return Array(source.path, name, shape, dtype, pieces)


def is_role(name: str) -> bool:
    """Whether an array of this name would be taken for one of :data:`ROLES`."""
    return any(name in names for names in ROLES.values())


def tensor_type(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The tensor type of a NumPy type; None where there is none, as for text."""
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


def to_tensor(values: NDArray[Any]) -> Tensor:
    """A copy, in native byte order."""
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def columns_of_arrays(
    path: Path, columns: Sequence[str], *, gaps: bool = False
) -> dict[str, list[str]]:
    """Arrays of a table by name: its columns, and those that are numbered, together.

    ``logits_0``, ``logits_1``, ... are one array; so are columns with nothing but numbers for
    names, which is called "". A number is a place: they are to run from 0 or 1 without a gap.

    Args:
        path: The file, for messages.
        columns: Their names.
        gaps: Whether numbers may be missing, as where these are not all columns.

    Raises:
        FileError: A name is there twice, or a number is missing.
    """
    if len(set(columns)) < len(columns):
        twice = next(name for i, name in enumerate(columns) if name in columns[:i])
        raise FileError(f"{path} has more than one column {twice!r}")
    numbered: dict[str, dict[int, str]] = {}
    arrays = {}
    wide = [name for role in MATRICES for name in ROLES[role]]
    for column in columns:
        match = _NUMBERED.fullmatch(column)
        if match and (match[1] in wide or column.isdecimal()):
            places = numbered.setdefault(match[1], {})
            if (number := int(match[2])) in places:
                raise FileError(f"{path}: {places[number]!r} and {column!r} are the same column")
            places[number] = column
        else:
            arrays[column] = [column]
    for name, places in numbered.items():
        found = sorted(places)
        first = min(found[0], 1)
        missing = next((n for n, m in enumerate(found, first) if n != m), None)
        if missing is not None and not gaps:
            above = places[next(n for n in found if n > missing)]
            raise FileError(
                f"{path}: of the columns {name or '0, 1, ...'} number {missing} is missing before "
                f"{above!r}"
            )
        if name in arrays:
            raise FileError(f"{path} has a column {name!r} beside {places[found[0]]!r}")
        arrays[name] = [places[n] for n in found]
    return arrays
