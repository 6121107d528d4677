"""``.safetensors``: a length, a header in JSON, the numbers.

Read and written by hand because the library maps what it reads into memory, where a file that is
cut short ends the process, and writes from tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from oodkernels.data.arrays import Array, FileError, Source, is_role, stored

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def read(source: Source) -> dict[str, Array]:
    """Tensors of at least one dimension by name."""
    header, start = _header(source)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        where = f"{source.path}: {name}"
        try:
            dtype, shape = _TYPES.get(entry["dtype"]), tuple(entry["shape"])
            first, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, first, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FileError(f"{where} has a damaged header: {str(entry)[:80]}") from None
        if dtype is None:
            if is_role(name):
                raise FileError(f"{where} must be numbers, got type {str(entry['dtype'])[:80]}")
            continue
        if end - first != math.prod(shape) * dtype.itemsize:
            raise FileError(f"{where} has a damaged header: {end - first} bytes for shape {shape}")
        if shape:
            found[name] = stored(source, name, shape, dtype, start + first)
    return found


def read_metadata(source: Source) -> dict[str, str]:
    """The text that a file has beside its tensors."""
    found = _header(source)[0].get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A file of tensors that are in memory."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    types = {name: array.dtype for name, array in arrays.items()}
    with path.open("wb") as file:
        write_chunks(file, shapes, types, lambda name: [arrays[name]])


def write_chunks(
    file: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, torch.dtype],
    chunks: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors of which no more than a chunk is in memory.

    Args:
        file: Open for writing.
        shapes: Of the tensors by name.
        types: Likewise.
        chunks: Name -> the tensor's rows in order.
        metadata: Text beside the tensors.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * types[name].itemsize
        header[name] = {
            "dtype": _NAMES[types[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in shapes:
        for chunk in chunks(name):
            file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(source: Source) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    with source.open() as file:
        size = int.from_bytes(source.read(file, 0, 8), "little")
        if size > source.size - 8:
            raise FileError(f"{source.path} is cut off, or no .safetensors file")
        text = source.read(file, 8, size)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise FileError(f"{source.path} has a damaged header: {error}") from None
    if not isinstance(content, dict):
        raise FileError(f"{source.path} has a damaged header: {str(content)[:80]}")
    return content, 8 + size
