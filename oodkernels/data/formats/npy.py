"""NumPy's ``.npy`` and ``.npz``. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkernels.data.arrays import (
    Array,
    FileError,
    Source,
    is_role,
    stored,
    tensor_type,
    to_tensor,
)

MAX_FORTRAN_BYTES = 1 << 30
"""Largest size of an array in Fortran's order in an archive, which is only read whole."""


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    size: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read(source: Source) -> dict[str, Array]:
    """The array of a ``.npy`` file, under the name ""."""
    with source.open() as file:
        header = _header(source.path, file)
    shape = header.shape
    dtype = _type(str(source.path), header.dtype)
    if dtype is None or not shape:
        raise FileError(
            f"{source.path} must hold an array of numbers, got {header.dtype}, shape {shape}"
        )
    if (whole := header.size + header.data_bytes) != source.size:
        what = "is cut off" if whole > source.size else "holds more than one array"
        raise FileError(
            f"{source.path} {what}: shape {shape} takes {whole} bytes, the file has {source.size}"
        )
    strides = None
    if header.fortran:
        strides = [math.prod(shape[:i]) for i in range(len(shape))]
    swapped = not header.dtype.isnative
    return {"": stored(source, "", shape, dtype, header.size, strides, swapped)}


def read_archive(source: Source) -> dict[str, Array]:
    """The numeric arrays of a ``.npz`` file; others only count where they would be asked for."""
    found = {}
    refused: FileError | None = None
    with source.open() as raw, zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as file:
                header = _header(source.path, file)
            try:
                dtype = _type(f"{source.path}: {name}", header.dtype)
            except FileError as error:
                if is_role(name):
                    raise
                refused = error
                continue
            if dtype is None or not header.shape:
                continue
            if header.size + header.data_bytes != info.file_size:
                raise FileError(
                    f"{source.path}: {name} is cut off: shape {header.shape} needs "
                    f"{header.data_bytes} bytes, it has {info.file_size - header.size}"
                )
            found[name] = _member(source, info, name, header, dtype)
    if refused and not found:
        raise refused
    return found


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A ``.npy`` file of the one array."""
    (array,) = arrays.values()
    with path.open("wb") as file:
        np.save(file, array.numpy(), allow_pickle=False)


def write_archive(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A ``.npz`` file."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():  # as np.savez, which takes no name "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array.numpy(), allow_pickle=False)


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Begin a ``.npy`` file whose numbers follow."""
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _header(path: Path, file: IO[bytes]) -> _Header:
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise FileError(f"{path} is no .npy file, or a pickled one, which is not loaded") from None
    try:
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except MemoryError:  # of the parser, for brackets without end
        raise FileError(f"{path} has a damaged header") from None
    if any(n < 0 for n in shape):
        raise FileError(f"{path} has a damaged header: shape {shape}")
    return _Header(tuple(map(int, shape)), bool(fortran), dtype, file.tell())


def _type(where: str, dtype: np.dtype[Any]) -> torch.dtype | None:
    if dtype.hasobject:
        raise FileError(f"{where} holds Python objects, which are not loaded: save numbers")
    return tensor_type(dtype)


def _member(
    source: Source, info: zipfile.ZipInfo, name: str, header: _Header, dtype: torch.dtype
) -> Array:
    shape = header.shape

    def pieces(rows: int) -> Iterator[Tensor]:
        with (
            source.open() as raw,
            zipfile.ZipFile(raw) as archive,
            archive.open(info) as file,
        ):
            if header.fortran and len(shape) > 1:
                if header.data_bytes > MAX_FORTRAN_BYTES:
                    raise FileError(
                        f"{source.path}: {name} is in Fortran's order, of which at most "
                        f"{MAX_FORTRAN_BYTES >> 30} GiB are read from an archive: save it in C's"
                    )
                whole = to_tensor(np.lib.format.read_array(file, allow_pickle=False))
                yield from whole.split(rows)
                return
            _header(source.path, file)
            row_bytes = header.dtype.itemsize * math.prod(shape[1:])
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = file.read(count * row_bytes)
                source.check(raw)
                if len(data) < count * row_bytes:
                    raise ValueError(f"{name} ends after {start + len(data) // row_bytes} rows")
                yield to_tensor(np.frombuffer(data, header.dtype).reshape(count, *shape[1:]))
            file.read(1)  # at its end the archive checks the sum of the bytes

    return Array(source.path, name, shape, dtype, pieces)
