"""What detectors read of N inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels.detectors.model import Outputs
from oodkernels.groups import Groups
from oodkernels.ops import (
    FeatureStats,
    LogitScores,
    MOSPrediction,
    feature_stats,
    logit_scores,
    mos_predict,
)

T = TypeVar("T")
Inputs: TypeAlias = Tensor | NDArray[Any]
"""A tensor, or an array that is taken for one."""
Features: TypeAlias = Inputs | Mapping[str, Inputs]
"""(N, d), or by the name of the layer for a detector that reads several."""

__all__ = [
    "INPUTS",
    "Batch",
    "Features",
    "Inputs",
    "as_batch",
    "blocks",
    "check_axes",
    "check_kept",
    "in_blocks",
    "joined",
    "present",
    "tensor_of",
]

_BLOCK = 1 << 18  # numbers of a block that stays in cache


class Batch:
    """What detectors read of N inputs; what several of them need of it is computed once.

    Attributes:
        x: (N, ...) inputs, or None.
        logits: (N, C), or None; one column more where one is ``absent``.
        features: (N, d) penultimate features, or None.
        layers: Outputs (N, ...) of layers by name.
        confidence: (N,) logit of the confidence, or None.
        axes: Axis of the features in ``layers``, for those of which the module tells.
        absent: Column of ``logits`` that stands for no class, >= 0, or None.
        percentiles: Those at which :meth:`feature_stats` will be asked for, all found at once.
        asked: By what detectors have in common, the settings in which each differs.
    """

    def __init__(
        self,
        x: Tensor | None = None,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        layers: Mapping[str, Tensor] | None = None,
        confidence: Tensor | None = None,
        *,
        axes: Mapping[str, int] | None = None,
        absent: int | None = None,
    ) -> None:
        self.x = x
        self.logits = logits
        self.features = features
        self.layers = layers or {}
        self.confidence = confidence
        self.axes = axes or {}
        self.absent = absent
        self.percentiles: set[float] = set()
        self.asked: dict[Hashable, set[float]] = {}
        self._known: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, x: Tensor, outputs: Outputs) -> Batch:
        """What a model says about ``x``."""
        return cls(
            x,
            outputs.logits,
            outputs.features,
            outputs.layers,
            outputs.confidence,
            axes=outputs.axes,
            absent=outputs.absent,
        )

    def __len__(self) -> int:
        return self._first().shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the first tensor there is."""
        return self._first().device

    def _first(self) -> Tensor:
        if self.x is not None:
            return self.x
        if self.logits is not None:
            return self.logits
        for tensor in (self.features, self.confidence):
            if tensor is not None:
                return tensor
        return next(iter(self.layers.values()))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Those that are there, by the name that errors give them."""
        fields = ("x", "logits", "features", "confidence")
        found = [(name, getattr(self, name)) for name in fields]
        layers = [(f"features[{name!r}]", tensor) for name, tensor in self.layers.items()]
        return [(name, tensor) for name, tensor in found if tensor is not None] + layers

    def rows(self, index: slice | Tensor) -> Batch:
        """The batch of some of the rows."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        layers = {name: tensor[index] for name, tensor in self.layers.items()}
        x, logits, features, confidence = map(
            part, (self.x, self.logits, self.features, self.confidence)
        )
        return Batch(x, logits, features, layers, confidence, axes=self.axes, absent=self.absent)

    def chunks(self, size: int | None) -> Iterator[Batch]:
        """The batch in parts of at most ``size`` rows; None: in one."""
        if size is None or (n := len(self)) <= size:
            yield self
            return
        for begin in range(0, n, size):
            yield self.rows(slice(begin, begin + size))

    def without(self, absent: int | None) -> Batch:
        """The batch whose logits have an absent column; what was computed is shared."""
        found = copy.copy(self)
        found.absent = absent
        return found

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` returned when ``key`` was first asked for."""
        if key not in self._known:
            self._known[key] = compute()
        value: T = self._known[key]
        return value

    def absent_column(self, where: str, column: int | None) -> int | None:
        """The number of the absent column: ``column`` if it is given, else :attr:`absent`.

        Raises:
            ValueError: They contradict each other, or the logits have no such column, or no other.
        """
        if column is None:
            return self.absent
        width = present(self.logits).shape[1]
        if not -width <= column < width or width < 2:
            raise ValueError(
                f"{where}: absent must be one of several columns of logits, got {column} for "
                f"{width} columns"
            )
        column %= width
        if self.absent not in (None, column):
            raise ValueError(
                f"{where}: absent must be column {self.absent}, as the model has it, got {column}"
            )
        return column

    def class_logits(self, absent: int | None = None) -> Tensor:
        """(N, C) logits of the classes: a view where the absent column is none, first or last."""
        logits = present(self.logits)
        absent = self.absent_column("logits", absent)
        if absent is None:
            return logits
        if absent in (0, logits.shape[1] - 1):
            return logits[:, 1:] if absent == 0 else logits[:, :-1]
        return self.once(
            ("class_logits", absent),
            lambda: torch.cat([logits[:, :absent], logits[:, absent + 1 :]], 1),
        )

    def logit_scores(self, temperature: float = 1.0, absent: int | None = None) -> LogitScores:
        """:func:`oodkernels.logit_scores` of the classes' logits, without the absent column."""
        absent = self.absent if absent is None else self.absent_column("logits", absent)
        key = ("logit_scores", temperature, absent)
        found: LogitScores | None = self._known.get(key)
        if found is None:
            logits = present(self.logits) if absent is None else self.class_logits(absent)
            found = self._known[key] = logit_scores(logits, temperature)
        return found

    def feature_stats(
        self, percentile: float | None = None, rectified: bool = False
    ) -> FeatureStats:
        """:func:`oodkernels.feature_stats` of the features, each (N,).

        Args:
            percentile: In per cent; None where neither threshold nor the sum above it is read.
            rectified: Whether negative features count as 0.
        """
        features = present(self.features)
        if self._known.get("negative features") is False:
            rectified = False
        key = ("feature_stats", rectified)
        asked, found = self._known.get(key, ((), None))
        if found is None or (percentile is not None and percentile not in asked):
            more = self.percentiles if percentile is None else {*self.percentiles, percentile}
            asked = tuple(sorted({*asked, *more}))
            found = feature_stats(features, asked, rectified)
            self._known[key] = asked, found
        if percentile is None:
            return found
        at = asked.index(percentile)
        return found._replace(threshold=found.threshold[:, at], top_sum=found.top_sum[:, at])

    def mos_predict(self, groups: Groups) -> MOSPrediction:
        """:func:`oodkernels.mos_predict` of the logits."""
        logits = present(self.logits)
        return self.once(("mos_predict", groups), lambda: mos_predict(logits, groups))


def as_batch(
    where: str,
    x: Any = None,
    logits: Inputs | None = None,
    features: Features | None = None,
    confidence: Inputs | None = None,
) -> Batch:
    """The checked arguments of ``score`` as a batch.

    Raises:
        ValueError: There is none, or one has the wrong shape.
        TypeError: One is no tensor, or not floating-point.
    """
    if x is None and features is None and confidence is None and isinstance(logits, Tensor):
        return Batch(logits=_checked(where, "logits", logits))
    layers = None
    if isinstance(features, Mapping):
        layers = {name: _checked(where, f"features[{name!r}]", f) for name, f in features.items()}
        features = None
    batch = Batch(
        None if x is None else _checked(where, "x", x),
        None if logits is None else _checked(where, "logits", logits),
        None if features is None else _checked(where, "features", features),
        layers,
        None if confidence is None else _checked(where, "confidence", confidence),
    )
    others = features is not None or confidence is not None or layers
    if not others and (x is None) != (logits is None):
        return batch  # of one tensor
    tensors = batch.tensors()
    if not tensors:
        raise ValueError(f"{where}: x, logits, features or confidence must be given, got none")
    first, n = tensors[0][0], len(tensors[0][1])
    for name, tensor in tensors:
        if len(tensor) != n:
            raise ValueError(
                f"{where}: {first} and {name} must be of the same samples, got {n} and "
                f"{len(tensor)}"
            )
    logit = batch.confidence
    if logit is not None and logit.numel() != n:
        raise ValueError(f"{where}: confidence must be (N,) or (N, 1), got {tuple(logit.shape)}")
    return batch


_SHAPES = {"logits": (2, "(N, C)"), "features": (2, "(N, d)")}


def _checked(where: str, name: str, tensor: Any) -> Tensor:
    """A tensor, or an array as one, that is floating-point and has the right number of axes."""
    if not isinstance(tensor, Tensor):
        tensor = tensor_of(tensor)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    if name != "x" and not tensor.is_floating_point():
        raise TypeError(f"{where}: {name} must be floating-point, got {tensor.dtype}")
    dim, shape = _SHAPES.get(name, (0, "(N, ...)"))
    found = tensor.dim()
    if found == 0 or (dim and found != dim):
        raise ValueError(f"{where}: {name} must be {shape}, got {tuple(tensor.shape)}")
    return tensor


def tensor_of(value: Any) -> Any:
    """An array as a tensor, anything else as it is; one that cannot be written to is copied."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(np.require(value, requirements="W"))


INPUTS = ("x", "pixel_values")
"""What a loader's dicts may call the inputs; the second is Hugging Face's word."""


def inputs_of(where: str, item: Any) -> tuple[Any, Any]:
    """A model's inputs, and labels or None, of what a loader gives.

    Args:
        where: What errors start with.
        item: A tensor or an array; a pair of one and labels; or a mapping with "x" or
            "pixel_values", and perhaps "labels".

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(item, Mapping):
        found = [item[name] for name in INPUTS if item.get(name) is not None]
        if len(found) == 1:
            return found[0], item.get("labels")
        raise TypeError(
            f"{where}: a batch must have one of {' and '.join(INPUTS)}, got "
            f"{', '.join(map(str, item))}"
        )
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Tensor | np.ndarray):
        return item, None
    raise TypeError(
        f"{where}: a batch must be a tensor, (tensor, labels) or a dict, got {type(item).__name__}"
    )


def is_loader(x: Any) -> bool:
    """Whether inputs are batches of them, and no tensor or array."""
    if isinstance(x, Tensor):
        return False
    return isinstance(x, Iterable) and not isinstance(x, np.ndarray | str | Mapping)


def check_kept(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor from a file holds finite floating-point numbers."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(
            f"{name} must be floating-point and finite, got {tensor.dtype}"
            f"{', not finite' if tensor.is_floating_point() else ''}"
        )


def check_axes(
    tensors: Mapping[str, Tensor], axes: Mapping[str, str], sizes: Mapping[str, int | None]
) -> None:
    """Raise ValueError unless tensors from a file are finite and of these axes.

    Args:
        tensors: By name.
        axes: By the same names, letters for the axes: "C d".
        sizes: Letter -> size, None where it may be any; other letters, too. The same letter must
            have the same size everywhere.
    """
    known = dict(sizes)
    for name, letters in axes.items():
        tensor, wanted = tensors[name], letters.split()
        check_kept(name, tensor)
        if len(wanted) != tensor.dim() or any(
            known.get(letter) not in (None, found)
            for letter, found in zip(wanted, tensor.shape, strict=True)
        ):
            raise ValueError(
                f"{name} must be ({', '.join(wanted)}) with {known}, got {tuple(tensor.shape)}"
            )
        known.update(zip(wanted, tensor.shape, strict=True))


def in_blocks(compute: Callable[..., Tensor], *rows: Tensor, size: int = _BLOCK) -> Tensor:
    """``compute`` of blocks of rows of some tensors, put together.

    Args:
        compute: Gives a tensor of as many rows as it is given.
        *rows: (N, ...) each.
        size: Numbers of a block of the widest of them.
    """
    width = max(1, *(t[:1].numel() for t in rows))
    parts = zip(*(blocks(t, max(1, size // width)) for t in rows), strict=True)
    return torch.cat([compute(*part) for part in parts])


def joined(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """The parts that are there as one tensor on a device, None where none is."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(device)


def blocks(x: Tensor, rows: int) -> Sequence[Tensor]:
    """Rows of a tensor in blocks of at most so many; in one where a program is made of it."""
    return (x,) if torch.compiler.is_compiling() else x.split(rows)


def present(value: T | None) -> T:
    """What is known to be there."""
    assert value is not None
    return value
