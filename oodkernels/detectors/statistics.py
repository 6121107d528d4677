"""Class means and the scatter within classes, in one pass over any number of rows.

Rows come batch by batch, and statistics of parts of the data merge to those of the whole, over
objects (:meth:`ClassStatistics.merge`) and over processes (:meth:`ClassStatistics.all_reduce`). All
sums are float64, and every term of the scatter is a square of differences (Chan, Golub & LeVeque,
The American Statistician 1983), so nothing cancels however far from zero the features lie.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from oodkernels._checks import check_count, check_floating, check_integers

__all__ = ["ClassStatistics"]

_CHUNK = 1 << 24  # numbers that are converted to float64 at once
_STATE = ("counts", "means", "scatter")


class ClassStatistics:
    """Counts, means and the tied scatter of labelled features.

    Memory: (C, d) and (d, d) float64 and some 400 MiB at most, whatever the number of rows.

    Args:
        num_classes: C, labels are below it; None for the largest label so far + 1.
        device: Where the statistics are kept; None for the device of the first rows.

    Attributes:
        counts: (C,) int64, rows of each class.
        means: (C, d) float64; zeros for a class without rows.
        scatter: (d, d) float64, the sum over the rows of (x - mu_y)(x - mu_y)^T, where mu_y is the
            mean of the row's class.

    Example:
        >>> statistics = ClassStatistics()
        >>> for x, y in loader:
        ...     statistics.update(features_of(x), y)
        >>> statistics.means, statistics.covariance()
    """

    def __init__(
        self, num_classes: int | None = None, device: torch.device | str | None = None
    ) -> None:
        if num_classes is not None:
            num_classes = check_count("ClassStatistics", "num_classes", num_classes)
        self._fixed = num_classes
        self._device = None if device is None else torch.device(device)
        self.counts = torch.zeros(num_classes or 0, dtype=torch.int64, device=device)
        self.means = torch.zeros(num_classes or 0, 0, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64, device=device)

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return len(self.counts)

    @property
    def width(self) -> int:
        """Width d of the features, 0 before the first rows."""
        return len(self.scatter)

    @property
    def count(self) -> int:
        """Rows of all classes."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """Mean of the rows of all classes, (d,) float64; NaN without rows."""
        return self.counts.double() @ self.means / self.count

    @property
    def missing(self) -> list[int]:
        """Classes without rows."""
        return (self.counts == 0).nonzero()[:, 0].tolist()

    def covariance(self) -> Tensor:
        """The tied covariance, (d, d) float64: scatter / N, as maximum likelihood has it.

        Raises:
            ValueError: There are no rows.
        """
        if not self.count:
            raise ValueError("ClassStatistics.covariance: there must be rows, got none")
        return self.scatter / self.count

    @torch.inference_mode(False)  # or the statistics could not be updated outside of it
    @torch.no_grad()
    def update(
        self, features: Tensor, labels: Tensor, *, where: str = "ClassStatistics.update"
    ) -> ClassStatistics:
        """Take in some rows.

        Args:
            features: (N, d), float64, float32, bfloat16 or float16; finite.
            labels: (N,) integers, 0..C-1, or -1 for OOD rows, which are left out.
            where: What errors start with.

        Returns:
            Itself.

        Raises:
            ValueError: A wrong shape, another d than before, a label out of range, or a feature
                that is not finite.
            TypeError: Features are not of a floating-point type above, labels are not integers.
        """
        features, labels = features.detach(), labels.detach()
        check_floating(where, "features", features)
        if features.dim() != 2 or not features.shape[1]:
            raise ValueError(
                f"{where}: features must have shape (N, d), got {tuple(features.shape)}"
            )
        check_integers(where, "labels", labels)
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"{where}: labels must have shape ({len(features)},), as there are features, got "
                f"{tuple(labels.shape)}"
            )
        if not len(features):
            return self
        check_finite(where, features)
        low, high = int(labels.min()), int(labels.max())
        limit = self._fixed
        if low < -1 or (limit is not None and high >= limit):
            allowed = "at least 0" if limit is None else f"in 0..{limit - 1}"
            raise ValueError(
                f"{where}: labels must be {allowed}, or -1 for OOD, got {low if low < -1 else high}"
            )
        self._resize(where, high + 1, features.shape[1], features.device)
        chunk = max(1, _CHUNK // features.shape[1])
        for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
            known = y >= 0
            if known.any():
                self._add(x[known], y[known])
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Take in the rows of another; the result is that of one that saw all, up to rounding.

        Returns:
            Itself.

        Raises:
            ValueError: The other has another d, or classes beyond ``num_classes``.
        """
        where = "ClassStatistics.merge"
        if self._fixed is not None and other.num_classes > self._fixed:
            raise ValueError(
                f"{where}: other must have at most {self._fixed} classes, got {other.num_classes}"
            )
        if other.width:
            self._resize(where, other.num_classes, other.width, other.counts.device)
            classes = torch.arange(other.num_classes, device=self.counts.device)
            self._merge(classes, *(getattr(other, name).to(classes.device) for name in _STATE))
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ClassStatistics:
        """Merge those of all processes of a group, which all call this; once, after the last rows.

        Three sums over the processes, of as many numbers as the statistics have. A process may have
        seen no rows.

        Args:
            group: None for all processes.

        Returns:
            Itself: the same on every process.

        Raises:
            ValueError: Processes have features of different width; raised by all of them.
        """
        where = "ClassStatistics.all_reduce"
        device, d = self.counts.device, self.width
        least = -d if d else -(2**31)
        shape = torch.tensor([self.num_classes, d, least], device=device)
        dist.all_reduce(shape, dist.ReduceOp.MAX, group)
        num_classes, widest, narrowest = shape.tolist()
        if widest and widest != -narrowest:
            raise ValueError(
                f"{where}: all processes must have features of one width, got {-narrowest} to "
                f"{widest}"
            )
        self._resize(where, num_classes, widest, device)
        total = self.counts.clone()
        dist.all_reduce(total, group=group)
        mean = self.means * (self.counts / total.clamp(min=1).double())[:, None]
        dist.all_reduce(mean, group=group)
        away = self.counts.double().sqrt()[:, None] * (self.means - mean)
        self.scatter += away.T @ away
        dist.all_reduce(self.scatter, group=group)
        self.counts, self.means = total, mean
        return self

    def to(self, device: torch.device | str | int) -> ClassStatistics:
        """Move to a device; returns itself."""
        self._device = torch.device(device)
        for name in _STATE:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """``counts``, ``means`` and ``scatter``, as tensors of their own."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what :meth:`state_dict` was taken of.

        Raises:
            ValueError: A tensor is missing or has a shape that does not fit the others, or there
                are other classes than ``num_classes``.
        """
        where = "ClassStatistics.load_state_dict"
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise ValueError(f"{where}: state must hold {', '.join(_STATE)}, got no {missing[0]}")
        shapes = [tuple(state[name].shape) for name in _STATE]
        c, d = (size[0] if size else 0 for size in (shapes[0], shapes[2]))
        if shapes != [(c,), (c, d), (d, d)] or self._fixed not in (None, c):
            raise ValueError(
                f"{where}: counts, means and scatter must have shapes (C,), (C, d) and (d, d)"
                f"{'' if self._fixed is None else f' with C = {self._fixed}'}, got {shapes}"
            )
        check_integers(where, "counts", state["counts"])
        for name in ("means", "scatter"):
            check_floating(where, name, state[name])
            if not state[name].isfinite().all():
                raise ValueError(f"{where}: {name} must be finite")
        if (state["counts"] < 0).any():
            raise ValueError(f"{where}: counts must not be negative")
        for name in _STATE:
            kept = getattr(self, name)
            setattr(self, name, state[name].to(self._device, kept.dtype, copy=True))

    def __repr__(self) -> str:
        return (
            f"ClassStatistics(num_classes={self.num_classes}, width={self.width}, "
            f"count={self.count})"
        )

    def _resize(self, where: str, num_classes: int, width: int, device: torch.device) -> None:
        """Make room for classes and, the first time, for the width."""
        if self.width and width != self.width:
            raise ValueError(f"{where}: features must have {self.width} columns, got {width}")
        if not self.width:
            if self._device is None:
                self.to(device)
            self.scatter = self.scatter.new_zeros(width, width)
            self.means = self.means.new_zeros(self.num_classes, width)
        more = num_classes - self.num_classes
        if more > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
            self.means = torch.cat([self.means, self.means.new_zeros(more, width)])

    def _add(self, features: Tensor, labels: Tensor) -> None:
        # Sorted rows and segment sums, because index_add_ is not deterministic on CUDA.
        order = labels.argsort(stable=True)
        classes, counts = labels[order].unique_consecutive(return_counts=True)
        rows = features[order].to(self.scatter)
        device = rows.device
        classes, counts = classes.to(device, torch.int64), counts.to(device)
        sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)
        means = sums / counts[:, None]
        rows -= means.repeat_interleave(counts, 0)
        self._merge(classes, counts, means, rows.T @ rows)

    def _merge(self, classes: Tensor, counts: Tensor, means: Tensor, scatter: Tensor) -> None:
        """Merge the statistics of other rows, of some classes, each once."""
        before = self.counts[classes]
        total = before + counts
        share = counts / total.clamp(min=1).double()
        delta = means - self.means[classes]
        apart = (before * share).sqrt()[:, None] * delta
        self.scatter += scatter
        self.scatter += apart.T @ apart
        self.means[classes] += share[:, None] * delta
        self.counts[classes] = total


def check_finite(where: str, features: Tensor) -> None:
    """Raise ValueError, with the count and the first, if rows of (N, d) hold NaN or inf."""
    chunk = max(1, _CHUNK // features.shape[1])
    finite = torch.cat([rows.isfinite().all(1) for rows in features.split(chunk)])
    if not finite.all():
        raise ValueError(
            f"{where}: features must be finite, got {int((~finite).sum())} rows that are not, "
            f"first row {int(finite.int().argmin())}"
        )
