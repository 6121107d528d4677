"""Heads trained on extracted features, in files of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from oodkernels._files import replacing
from oodkernels.groups import Groups

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["Head"]

_FORMAT, _VERSION = "oodkernels.head", 1


class Head(nn.Module):
    """A linear classifier on features: (N, d) -> logits, or (logits, confidence logit).

    It starts at zero, as the head of MOS does (Huang & Li, CVPR 2021).

    Args:
        in_features: d.
        columns: C, C + K for groups, C + 1 with an absent class.
        groups: Of a MOS head; None for a flat one.
        confidence: Whether it has a confidence branch (DeVries & Taylor, 2018).

    Raises:
        ValueError: ``columns`` is not the width of ``groups``.
    """

    def __init__(
        self,
        in_features: int,
        columns: int,
        groups: Groups | None = None,
        confidence: bool = False,
    ) -> None:
        super().__init__()
        if groups is not None and groups.width != columns:
            raise ValueError(
                f"Head: columns must be C + K = {groups.width} of the groups, got {columns}"
            )
        self.groups = groups
        self.linear = nn.Linear(in_features, columns)
        self.confidence = nn.Linear(in_features, 1) if confidence else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, confidence logit)."""
        features = features.to(self.linear.weight.dtype)
        logits: Tensor = self.linear(features)
        if self.confidence is None:
            return logits
        return logits, self.confidence(features)

    def save(self, path: PathLike) -> None:
        """Write to a safetensors file, replaced whole or not at all; extra "files".

        Raises:
            ImportError: safetensors is missing.
            OSError: The file cannot be written.
        """
        groups = None if self.groups is None else self.groups.to_json()
        # One entry: several come in any order, and the same head would give other bytes.
        metadata = {_FORMAT: json.dumps({"version": _VERSION, "groups": groups})}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        with replacing(path) as temporary:
            _safetensors("Head.save").torch.save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: PathLike) -> Head:
        """The head in a file that :meth:`save` wrote, on the CPU, in evaluation mode.

        Raises:
            ValueError: The file is none of these, or of another version.
            ImportError: safetensors is missing.
            OSError: The file cannot be read.
        """
        where = f"Head.load: {os.fspath(path)}"
        library = _safetensors("Head.load")
        with Path(path).open("rb"):
            pass
        try:
            with library.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except library.SafetensorError as error:
            raise ValueError(f"{where}: must be a safetensors file: {error}") from None
        if _FORMAT not in metadata:
            raise ValueError(f"{where}: must be the file of a head, got one without {_FORMAT!r}")
        try:
            content = json.loads(metadata[_FORMAT])
            if content["version"] != _VERSION:
                raise ValueError(f"version must be {_VERSION}, got {content['version']!r}")
            groups = None if content["groups"] is None else Groups.from_json(content["groups"])
            weight: Tensor = tensors["linear.weight"]
            head = cls(weight.shape[1], weight.shape[0], groups, "confidence.weight" in tensors)
            head.to(weight.dtype).load_state_dict(tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        return head.eval()


def _safetensors(where: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{where}: a head's file needs safetensors: pip install 'oodkernels[files]'"
        ) from error
    return safetensors
