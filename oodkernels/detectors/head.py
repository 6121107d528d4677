"""What detectors share that know the linear layer between features and logits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from oodkernels._checks import accumulate_type, check_floating, check_real
from oodkernels.detectors.base import NotFittedError, OODDetector
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.model import FeatureModel, Model, _classifier
from oodkernels.detectors.statistics import check_finite

Head: TypeAlias = nn.Linear | Sequence[Tensor | None]
"""A linear layer, or its weight (C, d) and bias (C,) or None."""

__all__ = [
    "HEAD",
    "Head",
    "HeadDetector",
    "Reservoir",
    "Sampled",
    "check_percentile",
    "floats",
    "linear_head",
    "read_head",
]

HEAD: Mapping[str, str] = {"weight": "C d", "bias": "C"}
"""The head's tensors and their axes, for ``_tensors`` of a :class:`HeadDetector`."""


class HeadDetector(OODDetector):
    """A detector that reads features and the head that maps them to logits.

    The first batch that has features and logits is compared with the head: where they do not
    belong together it is refused.

    Args:
        head: As :data:`Head`; None for the layer that the model's logits come from, or that a file
            brings.
        model: As for :class:`OODDetector`.
        absent: As for :class:`MSP`; the head has a row for that column too.

    Attributes:
        weight: (C, d).
        bias: (C,), zeros where the head has none.

    Raises:
        ValueError: The head is not linear, or its shapes do not fit.
        TypeError: It is none of these.
    """

    _tensors: ClassVar[Mapping[str, str]] = HEAD
    _positive = ""  # what the method takes for granted where features are not negative
    weight: Tensor
    bias: Tensor

    def __init__(
        self, head: Head | None = None, model: Model | None = None, absent: int | None = None
    ) -> None:
        super().__init__(model, absent)
        where = type(self).__name__
        if head is None and isinstance(model, nn.Module):
            head = linear_head(model)
        if head is not None:
            self.weight, self.bias = read_head(where, head)
            self.num_classes, self.width = self.weight.shape
        self._checked = self._warned = False

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias, or None where no head is known yet."""
        return (self.weight, self.bias) if "weight" in vars(self) else None

    # Of the model, and not of the settings; in files it is two of the tensors.
    def _arguments(self) -> dict[str, Any]:
        return {k: v for k, v in super()._arguments().items() if k != "head"}

    def _reset(self) -> None:
        head = {k: vars(self)[k] for k in HEAD if k in vars(self)}
        super()._reset()
        vars(self).update(head)
        if head:
            self.num_classes, self.width = head["weight"].shape

    def _ready(self, where: str) -> None:
        if "weight" not in vars(self):
            raise NotFittedError(
                f"{where}: head must be given: {type(self).__name__}(head=model.fc), or a model "
                f"whose logits come from an nn.Linear"
            )
        super()._ready(where)

    def _check(self, where: str, batch: Batch) -> None:
        super()._check(where, batch)
        if batch.features is None or torch.compiler.is_compiling() or not len(batch.features):
            return  # what follows looks at numbers
        features = batch.features
        if (
            self._positive
            and not self._warned
            and batch.once("negative features", lambda: _negative(features))
        ):
            self._warned = True
            warnings.warn(
                f"{where}: features must not be negative for {self.name}, which takes "
                f"{self._positive} for granted: expect poor scores on features without a ReLU",
                stacklevel=4,
            )
        if self._checked or batch.logits is None or "weight" not in vars(self):
            return
        x, z = batch.features[:8].double(), batch.logits[:8].double()
        if z.shape[1] != len(self.weight):
            raise ValueError(
                f"{where}: head must have a row for each of {z.shape[1]} logits, got "
                f"{len(self.weight)}"
            )
        mine = x @ self.weight.to(x).T + self.bias.to(x)
        apart, size = (mine - z).abs().nan_to_num(0).max(), mine.abs().nan_to_num(0).max()
        # Half precision and TF32 stay below a hundredth of the largest logit.
        if float(apart) > 0.02 * max(1.0, float(size)):
            raise ValueError(
                f"{where}: head must give the logits from the features, got logits that differ by "
                f"{float(apart):.3g} where the largest is {float(size):.3g}: features, logits and "
                f"head must be of one model, without anything between them"
            )
        self._checked = True

    def _linear(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weight and bias of the classes, of the type of the batch's scores, on its device."""
        features = present(batch.features)
        like = torch.empty(0, dtype=accumulate_type(features.dtype), device=features.device)
        weight, bias = self.weight.to(like), self.bias.to(like)
        absent = self.absent_of(batch)
        if absent is None:
            return weight, bias
        rows = torch.arange(len(bias), device=bias.device) != absent
        return weight[rows], bias[rows]

    def absent_of(self, batch: Batch) -> int | None:
        """Number of the row that stands for no class, or None."""
        if self.absent is not None:
            return self.absent % len(self.weight)
        return batch.absent


def _negative(features: Tensor) -> bool:
    """Whether one is below 0: the least one says so, unless it is NaN."""
    least = float(features.amin())
    return bool((features < 0).any()) if math.isnan(least) else least < 0


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The layer that a model's logits come from, if it is linear."""
    found = _classifier(model.model if isinstance(model, FeatureModel) else model)
    return found if isinstance(found, nn.Linear) else None


def floats(x: Tensor) -> Tensor:
    """The tensor in the type that its scores have."""
    return x.to(accumulate_type(x.dtype))


def read_head(where: str, head: Any) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of a :data:`Head`, copied.

    Raises:
        ValueError: Shapes do not fit.
        TypeError: It is none.
    """
    weight: Tensor
    bias: Tensor | None
    if isinstance(head, nn.Linear):
        weight, bias = head.weight, head.bias
    elif isinstance(head, Sequence) and len(head) == 2 and isinstance(head[0], Tensor):
        weight, bias = head
    else:
        raise TypeError(
            f"{where}: head must be an nn.Linear, or its weight and bias, got {type(head).__name__}"
        )
    weight = weight.detach()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    check_floating(where, "head's weight", weight)
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or not weight.numel():
        raise ValueError(
            f"{where}: head must have weight (C, d) and bias (C,), got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    return weight.clone(), bias.clone()


def check_percentile(where: str, percentile: Any) -> float:
    """A percentile as a float; raise unless it is a number in [1, 100)."""
    number = check_real(where, "percentile", percentile)
    if not 1 <= number < 100:
        raise ValueError(
            f"{where}: percentile must be in per cent, in [1, 100), got {percentile}"
            + (": 0.9 is written 90" if 0 < number < 1 else "")
        )
    return number


class Reservoir:
    """At most ``size`` rows of a stream, each row as likely as any other.

    Which they are follows from the seed and the order of the rows, not from the batches that they
    come in.

    Args:
        size: Rows to keep.
        seed: Of the choice.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.count = 0
        self._random = np.random.default_rng(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: tuple[Tensor, ...] = ()

    def add(self, *columns: Tensor) -> None:
        """Offer rows: tensors (N, ...) of which entries of one index belong together."""
        keys = torch.from_numpy(self._random.random(len(columns[0])))
        self.count += len(keys)
        worst = float(self._keys.max()) if len(self._keys) >= self.size else math.inf
        fresh = (keys < worst).nonzero()[:, 0]
        mine = tuple(c.detach()[fresh.to(c.device)] for c in columns)
        rows = tuple(map(torch.cat, zip(self._rows, mine, strict=True))) if self._rows else mine
        keys = torch.cat([self._keys, keys[fresh]])
        if len(keys) > self.size:
            least = keys.topk(self.size, largest=False).indices.sort().values
            keys, rows = keys[least], tuple(r[least.to(r.device)] for r in rows)
        self._keys, self._rows = keys, rows

    def rows(self) -> tuple[Tensor, ...]:
        """The rows kept, in the order they came in, a tensor for each column."""
        return self._rows


class Sampled(OODDetector):
    """A detector that is fitted to a uniform sample of the training data."""

    _sample: Reservoir | None = None

    def _reset(self) -> None:
        super()._reset()
        self._sample = None

    def _reservoir(self) -> Reservoir:
        """An empty sample."""
        raise NotImplementedError

    def _columns(self, batch: Batch) -> tuple[Tensor, ...]:
        """What is sampled of a batch: tensors of as many rows."""
        raise NotImplementedError

    def _update(self, where: str, batch: Batch, labels: Tensor | None) -> None:
        if self._sample is None:
            if self._status == "fitted":
                raise ValueError(
                    f"{where}: {self.name} from a file has no sample of its training features to "
                    f"add to: fit it again to all of them"
                )
            self._sample = self._reservoir()
        features = present(batch.features)
        check_finite(where, features)
        self.width = features.shape[1]
        self._sample.add(*self._columns(batch))

    def _rows(self, where: str, least: int = 1) -> tuple[Tensor, ...]:
        """The columns of the sample; ValueError if it has fewer than ``least`` rows."""
        rows = self._sample.rows() if self._sample else ()
        found = len(rows[0]) if rows else 0
        if found < least:
            raise ValueError(f"{where}: there must be at least {least} ID samples, got {found}")
        return rows
