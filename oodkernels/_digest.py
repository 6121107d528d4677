"""Short names for content: what two things that belong together compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
        x = x.detach().cpu().contiguous()
        kind = f"tensor {name!r} {x.dtype} {tuple(x.shape)}"
        add(kind, x.reshape(-1).view(torch.uint8).numpy().data)

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
