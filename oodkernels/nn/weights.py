"""Files of a model's weights, with what its columns mean: ``model.pt``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels._files import check_file, replacing
from oodkernels._optional import require
from oodkernels.groups import Groups

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["Weights", "align_names", "load_into", "read_weights", "save_weights"]

_FORMAT, _VERSION = "oodkernels.model", 1
_WRAPPERS = ("module", "_orig_mod")  # of DataParallel and DDP, of torch.compile


class Weights(NamedTuple):
    """What :func:`read_weights` returns; None for what a file of another program does not say."""

    state: dict[str, Tensor]
    """The state dict."""
    columns: int | None = None
    """Logits: C, C + K for groups, C + 1 with an absent class."""
    absent_column: int | None = None
    """Column of the absent class, the last; None without one."""
    groups: Groups | None = None
    """Groups of a MOS head."""
    class_names: list[str] | None = None
    """Names by class id."""

    @property
    def num_classes(self) -> int | None:
        """C; None where the file does not say."""
        if self.groups is not None:
            return self.groups.num_classes
        return None if self.columns is None else self.columns - (self.absent_column is not None)


def save_weights(
    model: nn.Module,
    path: PathLike,
    columns: int,
    *,
    absent: bool = False,
    groups: Groups | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a model's state dict and what its columns mean, replaced whole or not at all.

    Args:
        model: The model.
        path: File, by custom ``model.pt``.
        columns: Number of its logits.
        absent: Whether the last of them is the absent class's.
        groups: Of a MOS head.
        class_names: By class id.

    Raises:
        OSError: The file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model.state_dict(),
        "columns": columns,
        "absent_column": columns - 1 if absent else None,
        "groups": None if groups is None else groups.to_json(),
        "class_names": None if class_names is None else [str(name) for name in class_names],
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def read_weights(path: PathLike) -> Weights:
    """The weights in a file, on the CPU; tensors and plain values only, no code is run.

    Args:
        path: Of :func:`save_weights`; a checkpoint of :class:`~oodkernels.training.Trainer`; or a
            state dict, itself or under ``state_dict`` or ``model``, in a ``.pt`` or, by its ending,
            a ``.safetensors`` file.

    Raises:
        ValueError: The file has no state dict.
        ModuleNotFoundError: safetensors is missing.
        OSError: The file cannot be read.
    """
    where, content = f"read_weights: {os.fspath(path)}", _content(path)
    facts: Mapping[str, Any] = {}
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        if content.get("version") != _VERSION:
            raise ValueError(f"{where}: version must be {_VERSION}, got {content.get('version')!r}")
        facts = content
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{where}: must hold a state dict, names and tensors, and does not")
    groups = facts.get("groups")
    try:
        groups = None if groups is None else Groups.from_json(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    columns, absent = facts.get("columns"), facts.get("absent_column")
    return Weights(content, columns, absent, groups, facts.get("class_names"))


def _content(path: PathLike) -> Any:
    with check_file(f"read_weights: {os.fspath(path)}", path).open(
        "rb"
    ):  # a missing file is the system's error, whatever the format
        pass
    try:
        if Path(path).suffix == ".safetensors":
            return require("safetensors.torch", "files", "read_weights").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # of whatever kind the readers of a broken file raise
        first = str(error).partition("\n")[0][:300]
        raise ValueError(
            f"read_weights: {os.fspath(path)} must be a file of weights, got {first}"
        ) from error


def align_names(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict under the names that a model has for it.

    ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` put ``module.`` and
    ``_orig_mod.`` before or into names. These are disregarded, on both sides.

    Returns:
        The state dict; as it was where other names differ too, for ``load_state_dict`` to say so.
    """
    wanted = {_plain_name(name): name for name in model.state_dict()}
    given = {_plain_name(name): value for name, value in state.items()}
    if len(given) != len(state) or given.keys() != wanted.keys():
        return dict(state)
    return {wanted[name]: value for name, value in given.items()}


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def load_into(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Load a state dict by :func:`align_names`.

    Args:
        model: Of the architecture that was trained.
        state: Its state dict.
        where: The beginning of the message.

    Raises:
        ValueError: It does not fit; the message says in what.
    """
    try:
        model.load_state_dict(align_names(state, model))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
