"""Torch's ``.pt``: a tensor, or a dict of tensors."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oodkernels.data.arrays import Array, FileError, Source, stored


def read(source: Source) -> dict[str, Array]:
    """Tensors of at least one dimension by name; "" for one that is alone.

    Under ``FakeTensorMode``, ``torch.load`` takes no memory for the numbers, and tells where they
    are.
    """
    path = source.path
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path} cannot be read, or is cut off: torch.save writes a zip archive")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise FileError(f"{path} is compressed, which torch.save never does")
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise FileError(f"{path} is of a big-endian machine: save it on this one")
    with FakeTensorMode():
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        raise FileError(
            f"{path} must hold a tensor or a dict of tensors, got {type(content).__name__}"
        )
    return {
        str(name): _array(source, str(name), value)
        for name, value in content.items()
        if isinstance(value, Tensor) and value.ndim
    }


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A dict of tensors."""
    torch.save(dict(arrays), path)


def _array(source: Source, name: str, tensor: Tensor) -> Array:
    where = f"{source.path}: {name}" if name else str(source.path)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise FileError(f"{where} must be dense, got {tensor.layout} of {tensor.dtype}")
    storage = tensor.untyped_storage()
    first = getattr(storage, "_checkpoint_offset", None)
    if first is None:
        raise FileError(f"{where} has no numbers of its own: save a plain tensor")
    offset = first + tensor.storage_offset() * tensor.dtype.itemsize
    return stored(source, name, tuple(tensor.shape), tensor.dtype, offset, tensor.stride())
