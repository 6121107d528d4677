"""Heads trained on extracted features, in files of their own."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels._safetensors import read_tensors, write_tensors
from oodkernels.groups import Groups

PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["Head"]

_FORMAT, _VERSION = "oodkernels.head", 1


class Head(nn.Module):
    """A classifier on features: (N, d) -> logits, or (logits, confidence logit).

    Its last layer starts at zero, as the head of MOS does (Huang & Li, CVPR 2021).

    Args:
        in_features: d.
        columns: C, C + K for groups, C + 1 with an absent class.
        groups: Of a MOS head; None for a flat one.
        confidence: Whether it has a confidence branch (DeVries & Taylor, 2018).
        absent: Whether the last column is that of an absent class, no class of the data.
        hidden: Widths of hidden layers, each with a ReLU; none: a linear classifier.
        class_names: By class id; None: not known.

    Attributes:
        num_classes: C.
        absent_column: That of the absent class, the last; None without one.
        mean: (d,) that is taken from features, 0 until :meth:`standardize`.
        std: (d,) by which they are divided, 1 until :meth:`standardize`.

    Raises:
        ValueError: ``columns`` is not the width of ``groups``, there are groups and an absent
            class, or not as many names as classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_features: int,
        columns: int,
        groups: Groups | None = None,
        confidence: bool = False,
        *,
        absent: bool = False,
        hidden: Sequence[int] = (),
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        # NumPy's integers would not go into the file.
        in_features, columns = operator.index(in_features), operator.index(columns)
        hidden = [operator.index(width) for width in hidden]
        if groups is not None and groups.width != columns:
            raise ValueError(
                f"Head: columns must be C + K = {groups.width} of the groups, got {columns}"
            )
        if groups is not None and absent:
            raise ValueError("Head: groups have no absent class, got absent=True")
        self.groups = groups
        self.absent_column = columns - 1 if absent else None
        self.num_classes = columns - bool(absent) if groups is None else groups.num_classes
        if class_names is not None and len(class_names) != self.num_classes:
            raise ValueError(
                f"Head: class_names must be {self.num_classes}, one a class, got {len(class_names)}"
            )
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([in_features, *hidden]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        width = hidden[-1] if hidden else in_features
        self.linear = nn.Linear(width, columns)
        self.confidence = nn.Linear(width, 1) if confidence else None
        for layer in (self.linear, self.confidence):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, confidence logit).

        Raises:
            ValueError: ``features`` have another width.
        """
        if features.shape[-1:] != self.mean.shape:  # else one of 1 would be stretched
            raise ValueError(
                f"Head: features must be (N, {len(self.mean)}), got {tuple(features.shape)}"
            )
        features = (features.to(self.linear.weight.dtype) - self.mean) / self.std
        features = self.hidden(features)
        logits: Tensor = self.linear(features)
        if self.confidence is None:
            return logits
        return logits, self.confidence(features)

    def get_classifier(self) -> nn.Linear:
        """The layer that the logits come from, by timm's name."""
        return self.linear

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """Make mean 0 and standard deviation 1 of each of these features, here and from now on.

        A feature that never varies is left at its scale.

        Args:
            features: (N, d), those to be trained on.

        Raises:
            ValueError: Another width, no samples, or a mean that is not finite.
        """
        if features.dim() != 2 or features.shape[1] != len(self.mean) or not len(features):
            raise ValueError(
                f"Head.standardize: features must be (N, {len(self.mean)}), N at least 1, got "
                f"{tuple(features.shape)}"
            )
        n, rows = len(features), 1 << 14  # converted a part at a time
        mean = sum(part.double().sum(0) for part in features.split(rows)) / n
        square = sum((part.double() - mean).square().sum(0) for part in features.split(rows)) / n
        if not torch.isfinite(square).all():
            raise ValueError("Head.standardize: features must be finite, got some that are not")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(square > 0, square.sqrt(), 1))

    def save(self, path: PathLike) -> None:
        """Write to a safetensors file, replaced whole or not at all; extra "files".

        Raises:
            ModuleNotFoundError: safetensors is missing.
            OSError: The file cannot be written.
        """
        content = {
            "groups": None if self.groups is None else self.groups.to_json(),
            "absent": self.absent_column,
            "class_names": self.class_names,
        }
        write_tensors("Head.save", path, self.state_dict(), _FORMAT, _VERSION, content)

    @classmethod
    def load(cls, path: PathLike) -> Head:
        """The head in a file that :meth:`save` wrote, on the CPU, in evaluation mode.

        Raises:
            ValueError: The file is none of these, or of another version.
            ModuleNotFoundError: safetensors is missing.
            OSError: The file cannot be read.
        """
        where = f"Head.load: {os.fspath(path)}"
        content, tensors = read_tensors(where, path, _FORMAT, _VERSION)
        try:
            head = cls._of(content, tensors)
        except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{where}: {' '.join(str(e).split())}") from None
        return head.eval()

    @classmethod
    def _of(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
        groups = None if content["groups"] is None else Groups.from_json(content["groups"])
        weight = tensors["linear.weight"]
        hidden: list[int] = []
        while f"hidden.{2 * len(hidden)}.weight" in tensors:
            hidden.append(len(tensors[f"hidden.{2 * len(hidden)}.weight"]))
        head = cls(
            len(tensors["mean"]),
            len(weight),
            groups,
            "confidence.weight" in tensors,
            absent=content["absent"] is not None,
            hidden=hidden,
            class_names=content["class_names"],
        )
        head.to(weight.dtype).load_state_dict(tensors)
        return head
