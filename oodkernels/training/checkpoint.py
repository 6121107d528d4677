"""Checkpoints: tensors and plain values alone, each with a digest of what was saved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels._digest import digest
from oodkernels._files import check_file, replacing
from oodkernels.nn.weights import load_into
from oodkernels.training._plain import plain

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint"]

_FORMAT, _VERSION = "oodkernels.training", 2


def save_checkpoint(state: Mapping[str, Any], path: PathLike) -> None:
    """Write a checkpoint, replaced whole or not at all, on the disk when this returns.

    Args:
        state: Tensors, numbers, text, lists and dicts; NumPy's numbers become Python's.
        path: The file.

    Raises:
        TypeError: Something in it could not be read back.
        OSError: The file cannot be written.
    """
    content = {"format": _FORMAT, "version": _VERSION, **plain(state, "checkpoint")}
    content["digests"] = _digests(content)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: PathLike) -> dict[str, Any]:
    """What :class:`Trainer` saved, on the CPU; tensors and plain values only, no code is run.

    Raises:
        ValueError: Not a checkpoint of this version, or not as it was saved; the message says which
            tensor is another.
        OSError: The file cannot be read.
    """
    where = f"load_checkpoint: {os.fspath(path)}"
    with check_file(where, path).open("rb"):  # a missing file is the system's error
        pass
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind the reader of a broken file raises
        first = str(error).partition("\n")[0]
        raise ValueError(f"{where} must be a checkpoint, got {first}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{where} must be a checkpoint of Trainer, got another")
    if state.get("version") != _VERSION:
        raise ValueError(f"{where} must be of version {_VERSION}, got {state.get('version')}")
    kept, found = state.pop("digests", None) or {}, _digests(state)
    for name in (*found, *kept):
        if found.get(name) != kept.get(name):
            raise ValueError(
                f"{where} must be as it was saved, got another {name}: the file was damaged or "
                "changed; go on from an earlier one"
            )
    return state


def load_weights(model: nn.Module, path: PathLike, ema: bool = True) -> None:
    """Give a model the weights of a checkpoint, and put it into evaluation mode.

    Args:
        model: Of the architecture that was trained; wrapped by ``DataParallel`` or
            ``torch.compile`` or not, as it may have been then.
        path: ``best.pt`` or ``last.pt``.
        ema: Take the averaged weights, where there are any.

    Raises:
        ValueError: Not a checkpoint, or of another model.
        OSError: The file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint["model"]
    if ema and checkpoint["ema"] is not None:
        prefix = "module."
        averaged = checkpoint["ema"].items()
        state = {name[len(prefix) :]: v for name, v in averaged if name.startswith(prefix)}
    load_into(model, state, f"load_weights: {os.fspath(path)} must be of the model")
    model.eval()


def _digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Digests of every tensor, and of all other values together."""
    tensors: dict[str, str] = {}
    rest = []
    for name, value in _leaves(state, ""):
        if isinstance(value, Tensor):
            tensors[name] = digest(value)
        else:
            rest.append(f"{name} {value!r}")
    return {**tensors, "value": digest("\n".join(rest))}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{name}[{i}]")
    else:
        yield name, value
