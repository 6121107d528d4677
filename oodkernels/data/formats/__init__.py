"""Formats of files with arrays: each in a module of its own, all of them in :data:`FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from oodkernels.data.arrays import Array, Source
from oodkernels.data.formats import csv, npy, parquet, safetensors, torch

__all__ = ["FORMATS", "FileFormat"]


@dataclass(frozen=True)
class FileFormat:
    """A format of files with arrays.

    Attributes:
        suffix: End of its files' names.
        holds: What a file can hold, for documentation.
        read: File -> its numeric arrays by name, unread.
        write: A path, arrays on the CPU -> the file.
        one: Whether a file holds a single array.
        flat: Whether arrays that are written must be of one dimension.
        package: What has to be installed for it beside the core dependencies.
    """

    suffix: str
    holds: str
    read: Callable[[Source], dict[str, Array]]
    write: Callable[[Path, Mapping[str, Tensor]], None]
    one: bool = False
    flat: bool = False
    package: str | None = None


FORMATS = {
    form.suffix: form
    for form in (
        FileFormat(".npy", "one array of NumPy", npy.read, npy.write, one=True),
        FileFormat(".npz", "arrays of NumPy by name", npy.read_archive, npy.write_archive),
        FileFormat(".pt", "a tensor, or a dict of tensors", torch.read, torch.write),
        FileFormat(".safetensors", "tensors by name", safetensors.read, safetensors.write),
        FileFormat(".csv", "a table of text", csv.read, csv.write, flat=True),
        FileFormat(
            ".parquet", "a table", parquet.read, parquet.write, flat=True, package="pyarrow"
        ),
    )
}
"""Formats by the end of a file's name."""
