"""Short names for content: what two things that belong together compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(*parts: str | Tensor | Mapping[str, Tensor] | None) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of text, tensors and state dicts.

    Args:
        *parts: Text; tensors of any type, shape, strides and device, of which type, shape and
            bytes count; mappings such as state dicts, of which names count too and their order does
            not; None, which differs from all of these.

    Returns:
        16 hexadecimal digits, the same in every process and on every machine of one byte order.
    """
    hasher = hashlib.sha256()

    def add(kind: str, content: bytes | memoryview) -> None:
        hasher.update(f"{kind} {len(content)}:".encode())
        hasher.update(content)

    def add_tensor(name: str, x: Tensor) -> None:
        add(f"tensor {name!r} {x.dtype} {tuple(x.shape)}", _content(x))

    for part in parts:
        if isinstance(part, Tensor):
            add_tensor("", part)
        elif isinstance(part, Mapping):
            add("mapping", str(len(part)).encode())
            for name in sorted(part):
                add_tensor(name, part[name])
        else:
            add(type(part).__name__, (part or "").encode())
    return hasher.hexdigest()[:16]


def _content(x: Tensor) -> memoryview:
    x = x.detach().cpu().contiguous()
    content: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return content


class StreamDigest:
    """Short names for arrays that come in pieces, however they are cut.

    Attributes:
        count: Rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._hashers: dict[str, Any] = {}

    def add(self, **rows: Tensor) -> None:
        """Take in rows (N, ...) of each array."""
        for name, x in rows.items():
            if name not in self._hashers:
                kind = f"{x.dtype} {tuple(x.shape[1:])}:"
                self._hashers[name] = hashlib.sha256(kind.encode())
            self._hashers[name].update(_content(x))
        self.count += max(map(len, rows.values()), default=0)

    def found(self) -> dict[str, str]:
        """Name of the array -> 16 hexadecimal digits."""
        return {name: hasher.hexdigest()[:16] for name, hasher in self._hashers.items()}
