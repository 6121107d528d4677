"""What an object was made with, and values that a file gives back."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from oodkernels import _checks
from oodkernels.groups import Groups

if TYPE_CHECKING:
    from typing_extensions import Self


def plain(value: Any, where: str) -> Any:
    """A value of tensors, numbers, text, lists, tuples and dicts alone, which any file gives back.

    NumPy's numbers become Python's and its arrays tensors, members of enumerations their values.

    Args:
        value: Anything.
        where: What it is, for the message.

    Raises:
        TypeError: Something in it is of none of these kinds; the message says what and where.
    """
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        return value if type(value) is Tensor else value.detach()
    if isinstance(value, np.generic):
        return plain(_checks.plain(value), where)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Enum):
        return plain(value.value, where)
    for kind in (bool, int, float, str):  # and what is derived from them
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        found = {plain(k, where): plain(v, f"{where}.{k}") for k, v in value.items()}
        if not isinstance(value, OrderedDict):
            return found
        ordered = OrderedDict(found)
        ordered.__dict__.update(value.__dict__)  # the versions of a state dict's modules
        return ordered
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} must be a number, text, tensor, or list or table of these, to be read back from "
        f"a file, got {type(value).__name__}"
    )


def plain_option(value: Any, where: str) -> Any:
    """Like :func:`plain`, for a TOML file: groups as their JSON, arrays as lists, no None in lists.

    Raises:
        TypeError: As there.
    """
    if isinstance(value, Groups):
        return value.to_json()
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        found = {str(k): plain_option(v, f"{where}.{k}") for k, v in value.items()}
        return {k: v for k, v in found.items() if v is not None}
    if isinstance(value, (list, tuple)):
        if any(item is None for item in value):
            raise TypeError(f"{where} must hold no None")
        return [plain_option(item, f"{where}[{i}]") for i, item in enumerate(value)]
    found = plain(value, where)
    if isinstance(found, (bytes, torch.dtype, torch.device)):
        raise TypeError(f"{where} must be a number, text, list or table, got {found!r}")
    return found


class Recorded:
    """Base of what is made by options: it keeps them, with the defaults, as plain values.

    Attributes:
        options: By the names of the constructor's arguments. Groups are there as JSON; modules and
            functions, which no file gives back, as ``<...>``.
    """

    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Take down the arguments."""
        made = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        except TypeError:  # a copy is made without any; else __init__ will say the same
            return made
        bound.apply_defaults()
        _, *names = bound.arguments
        given = {name: bound.arguments[name] for name in names}
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name)
            elif parameter.kind is parameter.VAR_POSITIONAL and not given[name]:
                del given[name]
        made.__dict__["options"] = {name: _recorded(name, value) for name, value in given.items()}
        return made


def _recorded(name: str, value: Any) -> Any:
    try:
        return plain_option(value, name)
    except TypeError:
        what = value if isinstance(value, (nn.Module, Recorded)) else getattr(value, "__name__", "")
        return f"<{' '.join(repr(what or type(value).__name__).split())}>"
