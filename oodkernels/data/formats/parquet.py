"""``.parquet``, by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._optional import require
from oodkernels.data.arrays import (
    Array,
    FileError,
    Source,
    columns_of_arrays,
    is_role,
    tensor_type,
    to_tensor,
)


def read(source: Source) -> dict[str, Array]:
    """Numeric columns, columns of lists, and numbered columns together, by name."""
    parquet = _library(source.path)
    with parquet.ParquetFile(source.path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        types = {}
        for field in schema:
            if (kind := _numeric(field.type)) is not None:
                types[field.name] = kind
            elif any(
                is_role(name) for name in columns_of_arrays(source.path, [field.name], gaps=True)
            ):
                raise FileError(
                    f"{source.path}: column {field.name!r} must be numbers, got {field.type}"
                )
        if len(set(schema.names)) < len(schema.names):
            columns_of_arrays(source.path, schema.names)
        listed = [name for name in types if _is_list(schema.field(name).type)]
        sample = next(file.iter_batches(1, columns=listed), None) if listed and count else None
        widths = {
            name: len(sample.column(name).flatten()) if sample is not None else 0 for name in listed
        }
    own = [name for name in types if not name.startswith("__index_level_")]  # pandas' index
    found = {}
    for name, names in columns_of_arrays(source.path, own).items():
        dtype = types[names[0]]
        for other in names[1:]:
            dtype = torch.promote_types(dtype, types[other])
        if any(other in widths for other in names):
            if len(names) > 1:
                raise FileError(f"{source.path}: {names[0]!r} must hold numbers, got lists")
            shape: tuple[int, ...] = (count, widths[names[0]])
        else:
            shape = (count,) if len(names) == 1 else (count, len(names))
        found[name] = _array(source, name, names, shape, dtype)
    return found


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A table with a column for each array."""
    parquet = _library(path)
    arrow = require("pyarrow", "parquet", f"{path}: .parquet")
    table = arrow.table({name: array.numpy() for name, array in arrays.items()})
    parquet.write_table(table, path)


def _library(path: Path) -> Any:
    return require("pyarrow.parquet", "parquet", f"{path}: .parquet")


def _is_list(kind: Any) -> bool:
    types = require("pyarrow", "parquet", ".parquet").types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _numeric(kind: Any) -> torch.dtype | None:
    types = require("pyarrow", "parquet", ".parquet").types
    kind = kind.value_type if _is_list(kind) else kind
    if not types.is_floating(kind) and not types.is_integer(kind):
        return None
    return tensor_type(np.dtype(kind.to_pandas_dtype()))


def _array(
    source: Source, name: str, names: list[str], shape: tuple[int, ...], dtype: torch.dtype
) -> Array:
    def values(column: Any, called: str, start: int) -> NDArray[Any]:
        where = f"{source.path}: {called}"
        if column.null_count:
            first = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]
            raise FileError(f"{where} must not be null, got null at row {start + first}")
        if not _is_list(column.type):
            return column.to_numpy(zero_copy_only=False)
        compute = require("pyarrow.compute", "parquet", f"{source.path}: .parquet")
        lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
        if (lengths != shape[1]).any():
            first = np.flatnonzero(lengths != shape[1])[0]
            raise FileError(
                f"{where} must have {shape[1]} numbers in each row, got {lengths[first]} at row "
                f"{start + first}"
            )
        flat = column.flatten()
        if flat.null_count:
            first = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]
            row = start + first // shape[1]
            raise FileError(f"{where} must not be null, got null at row {row}")
        return flat.to_numpy(zero_copy_only=False).reshape(-1, shape[1])

    def groups(rows: int) -> Iterator[Tensor]:
        start = 0
        with (
            source.open() as raw,
            _library(source.path).ParquetFile(source.path) as file,
        ):
            for batch in file.iter_batches(rows, columns=names):
                columns = [values(batch.column(called), called, start) for called in names]
                start += batch.num_rows
                source.check(raw)
                found = (
                    columns[0] if len(shape) == 1 or columns[0].ndim == 2 else np.stack(columns, 1)
                )
                yield to_tensor(found).to(dtype)
        if start != shape[0]:
            raise FileError(f"{source.path} has {start} rows, its header says {shape[0]}")

    return Array(source.path, name, shape, dtype, lambda rows: _rechunked(groups(rows), rows))


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
