"""Whitening by a triangular matrix, and the distances of whitened features that detectors share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_real
from oodkernels._digest import digest
from oodkernels.detectors.batch import Batch, blocks, present
from oodkernels.detectors.statistics import ClassStatistics
from oodkernels.ops import nearest_centroid

__all__ = [
    "Space",
    "Whitening",
    "check_samples",
    "check_shrinkage",
    "inverse_root",
    "times_triangle",
    "whitening",
]

_CHUNK = 1 << 24  # numbers that are whitened at once
_CENTRED = 1 << 22  # numbers that the origin is taken from at once
_COLUMNS = 128  # of a block of the triangle, at least
_BLOCKS = 8  # of the triangle, at most: nine sixteenths of the products of a square are left
_LEAST_SHARE = 1e-10  # of a feature's variance that the others must leave unexplained


def times_triangle(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of rows with an upper triangular matrix, whose zeros are not multiplied.

    A block of columns at a time; the blocks follow from d alone.

    Args:
        x: (N, d).
        matrix: (d, d), zeros below the diagonal, of the same type.
        out: (N, d) to write to, where no gradient is asked for.

    Returns:
        (N, d).
    """
    d = len(matrix)
    step = max(_COLUMNS, -(-d // _BLOCKS))
    ends = [(i, min(d, i + step)) for i in range(0, d, step)]
    with torch.autocast(x.device.type, enabled=False):
        if out is None:
            parts = [torch.mm(x[:, :end], matrix[:end, begin:end]) for begin, end in ends]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        for begin, end in ends:
            torch.mm(x[:, :end], matrix[:end, begin:end], out=out[:, begin:end])
    return out


class Space(NamedTuple):
    """Where Euclidean distances are Mahalanobis distances: z = (h - origin) @ matrix."""

    origin: Tensor  # (d,)
    matrix: Tensor  # (d, d), upper triangular
    centroids: Tensor  # (C, d)

    def whitened(self, features: Tensor) -> Tensor:
        """Z of features (N, d) of the space's type, with gradients."""
        return times_triangle(features - self.origin, self.matrix)


class Whitening:
    """Class means, an origin and the inverse root of a covariance, by which features are measured.

    What is measured of a batch is measured once for all detectors with equal ones.

    Args:
        matrix: (d, d) float64, upper triangular.
        origin: (d,) float64.
        means: (C, d) float64.
        unit: Whether features are divided by their Euclidean norm first.
    """

    def __init__(self, matrix: Tensor, origin: Tensor, means: Tensor, unit: bool = False) -> None:
        self.matrix, self.origin, self.means, self.unit = matrix, origin, means.clone(), unit
        self._digest = digest(matrix, origin, means)
        self._spaces: dict[tuple[torch.dtype, torch.device], Space] = {}

    def to(self, device: torch.device | str | int) -> Whitening:
        """The same on a device."""
        other = copy.copy(self)
        other._spaces = {}
        for name in ("matrix", "origin", "means"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    def space(self, like: Tensor) -> Space:
        """The space of features of the type and device of a tensor, float64 or float32."""
        key = (like.dtype, like.device)
        found = self._spaces.get(key)
        if found is None:
            found = self._space(like)
            if not torch.compiler.is_compiling():
                self._spaces[key] = found
        return found

    @torch.inference_mode(False)  # for the gradients of input steps
    @torch.no_grad()
    def _space(self, like: Tensor) -> Space:
        # Rounded first, so that means and samples are mapped by the very same numbers.
        origin, matrix = self.origin.to(like.dtype), self.matrix.to(like.dtype)
        centroids = (self.means - origin.double()) @ matrix.double()
        return Space(*(t.to(like) for t in (origin, matrix, centroids)))

    def nearest(self, batch: Batch, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class of the nearest mean and the squared Mahalanobis distance from it, (N,) each.

        Args:
            batch: It keeps what was found, for detectors that ask for the same.
            features: (N, d) instead of the batch's, of which nothing is kept.
        """
        if features is not None:
            return self._nearest(features)
        return batch.once(self._key("nearest"), lambda: self._nearest(present(batch.features)))

    def square(self, batch: Batch) -> Tensor:
        """Squared Mahalanobis distance of a batch's features from the origin, (N,), kept there."""
        return batch.once(self._key("square"), lambda: self._square(present(batch.features)))

    def _key(self, what: str) -> tuple[str, str, str, bool]:
        return what, self._digest, str(self.matrix.device), self.unit

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        found = [nearest_centroid(z, space.centroids) for space, z in self._whitened(features)]
        labels, distance = zip(*found, strict=True)
        return torch.cat(labels), torch.cat(distance)

    def _square(self, features: Tensor) -> Tensor:
        return torch.cat([z.square_().sum(1) for _, z in self._whitened(features)])

    def _whitened(self, features: Tensor) -> Iterator[tuple[Space, Tensor]]:
        """Blocks of rows in the space; each takes the place of the one before."""
        dtype = accumulate_type(features.dtype)
        space = self.space(features.new_empty(0, dtype=dtype))
        parts = blocks(features, max(1, _CHUNK // features.shape[1]))
        if torch.compiler.is_compiling():
            for rows in parts:
                rows = rows.to(dtype)
                if self.unit:
                    rows = rows / rows.norm(dim=1, keepdim=True)
                yield space, space.whitened(rows)
            return
        size = max(1, min(len(parts[0]), _CENTRED // features.shape[1]))
        centred = features.new_empty(size, features.shape[1], dtype=dtype)
        z = features.new_empty(parts[0].shape, dtype=dtype)
        for rows in parts:
            for some, out in zip(rows.split(size), z[: len(rows)].split(size), strict=True):
                own = centred[: len(some)]
                if self.unit:
                    # A row of zeros has no direction: NaN, and so its score.
                    norms = torch.linalg.vector_norm(some, dim=1, keepdim=True, dtype=dtype)
                    torch.div(some, norms, out=own).sub_(space.origin)
                else:
                    torch.sub(some, space.origin, out=own)
                times_triangle(own, space.matrix, out=out)
            yield space, z[: len(rows)]


def check_shrinkage(where: str, shrinkage: float | None) -> float | None:
    """A share or None; raise unless it is one."""
    if shrinkage is None:
        return None
    share = check_real(where, "shrinkage", shrinkage)
    if not 0 <= share <= 1:
        raise ValueError(f"{where}: shrinkage must be in [0, 1] or None, got {share:g}")
    return share


def check_samples(where: str, statistics: ClassStatistics) -> None:
    """Raise ValueError unless every class has samples."""
    if not statistics.count:
        raise ValueError(f"{where}: there must be ID samples to fit to, got none")
    if missing := statistics.missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        raise ValueError(
            f"{where}: every class 0..{statistics.num_classes - 1} must have samples to fit to, "
            f"got none of class {some}"
        )


def whitening(
    where: str,
    covariance: Tensor,
    statistics: ClassStatistics,
    shrinkage: float | None,
    of: str = "the features",
    *,
    stacklevel: int = 2,
) -> tuple[Tensor, float]:
    """Upper triangular W (d, d), W W^T the inverse of a covariance, and the shrinkage it took.

    Args:
        where: What messages start with.
        covariance: (d, d).
        statistics: What it comes from.
        shrinkage: In [0, 1]; None for 0, or where the covariance is singular OAS, with a warning.
        of: Whose covariance it is, in messages.
        stacklevel: Of the warning.

    Raises:
        ValueError: It is singular with that shrinkage.
    """
    amount = shrinkage or 0.0
    found = inverse_root(covariance, amount)
    if found is None and shrinkage is None:
        amount = _oas(covariance, statistics.count)
        found = inverse_root(covariance, amount)
        if found is not None:
            warnings.warn(
                f"{where}: the covariance of {of} ({statistics.width} features, "
                f"{statistics.count} samples, {statistics.num_classes} classes) is singular: "
                f"shrunk by {amount:.3g} (OAS) towards its mean variance; shrinkage= chooses "
                f"another amount",
                stacklevel=stacklevel,
            )
    if found is None:
        raise ValueError(
            f"{where}: the covariance of {of} must not be singular, got one that is with "
            f"shrinkage {amount:.3g}"
        )
    return found, amount


def inverse_root(covariance: Tensor, shrinkage: float = 0.0) -> Tensor | None:
    """Upper triangular W with W W^T the inverse of a covariance shrunk; None if it is singular."""
    target = covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * target
    std = covariance.diagonal().sqrt()
    if not std.all():
        return None
    # Of the correlations, so that the units of the features do not matter. The square of a diagonal
    # element is the share of a variance that the features before leave unexplained.
    factor, failed = torch.linalg.cholesky_ex(covariance / std / std[:, None])
    if failed or factor.diagonal().square().min() < _LEAST_SHARE:
        return None
    return (
        torch.linalg.solve_triangular(factor, (1 / std).diag(), upper=False).T.contiguous().triu()
    )


def _oas(covariance: Tensor, n: int) -> float:
    """The oracle approximating shrinkage of n samples, as scikit-learn computes it."""
    d = len(covariance)
    size = float(covariance.square().mean())
    mean = float(covariance.diagonal().mean()) ** 2
    excess = (n + 1) * (size - mean / d)
    return 1.0 if excess <= 0 else min(1.0, (size + mean) / excess)
