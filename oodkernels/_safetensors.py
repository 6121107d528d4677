"""Safetensors files with a JSON object that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkernels._files import check_file, read_json, replacing
from oodkernels._optional import require

_KEY = "oodkernels"  # one entry: several come in any order, and the same content in other bytes


def write_tensors(
    where: str,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    format: str,
    version: int,
    content: Mapping[str, Any],
) -> None:
    """Write tensors and JSON to a file that is replaced whole or not at all.

    Args:
        where: What errors start with.
        path: The file.
        tensors: By name, on any device, of any strides.
        format: What :func:`read_tensors` asks for.
        version: The same.
        content: What JSON can hold; NumPy scalars and arrays, tuples and tensors become plain.

    Raises:
        ImportError: safetensors is missing.
        TypeError: JSON cannot hold the content.
        OSError: The file cannot be written.
    """
    package = require("safetensors.torch", "files", where)
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = json.dumps({"format": format, "version": version, **content}, default=_to_json)
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        package.save_file(own, temporary, {_KEY: text})
        temporary.chmod(mode)  # else nobody but the writer could read it


def read_tensors(
    where: str, path: str | os.PathLike[str], format: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_tensors` wrote: the JSON beside ``format`` and ``version``, the tensors.

    They are read and not mapped: a file that another process cuts short meanwhile is an error.

    Raises:
        ValueError: The file is none of these, or of another format or version.
        ImportError: safetensors is missing.
        OSError: The file cannot be read.
    """
    package = require("safetensors.torch", "files", where.partition(":")[0])
    data = check_file(where, path).read_bytes()
    try:
        tensors: dict[str, Tensor] = package.load(data)
    except require("safetensors", "files", where).SafetensorError as error:
        raise ValueError(f"{where}: must be a safetensors file: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return read_json(
        where, header.get("__metadata__", {}).get(_KEY, "{}"), format, version
    ), tensors


def _to_json(value: Any) -> Any:
    """What JSON can hold of a NumPy or torch value."""
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept in a file, got {str(value)[:80]}")
