"""Tensors that end, or begin, at a page that nothing may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_PROT_NONE = 0


class Arena:
    """Memory between two protected pages, for one tensor at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = -(-capacity // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.capacity + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (address, address + PAGE + self.capacity):
            if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, values: Tensor, strides: tuple[int, ...], at_end: bool) -> Tensor:
        """The values at ``strides``, the last or the first of them beside a protected page.

        Where a stride is 0, the values must not change along that dimension.
        """
        if not values.numel():
            return torch.empty_strided(values.shape, strides, dtype=values.dtype)
        count = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        size = count * values.element_size()
        assert size <= self.capacity, f"{size} bytes of {self.capacity}"
        offset = PAGE + (self.capacity - size if at_end else 0)
        flat = torch.frombuffer(self.memory, dtype=values.dtype, count=count, offset=offset)
        flat.view(torch.uint8).fill_(0xA5)
        tensor = flat.as_strided(values.shape, strides)
        once = [slice(0, 1) if s == 0 else slice(None) for s in strides]
        tensor[tuple(once)] = values[tuple(once)]
        return tensor
