"""SYNTHETIC features with a hierarchy of classes, for studies that real data cannot reach.

Nothing here is measured on images: super-classes hold classes, classes hold samples, and what a
backbone's penultimate layer would give is drawn from distributions that are written down below. It
serves to vary one thing, such as the number of classes from 100 to 20,000, with all else equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from oodkernels.groups import Groups

__all__ = ["HierarchicalFeatures", "SyntheticBatch"]

Split: TypeAlias = Literal["train", "test", "near", "far", "outliers"]


class SyntheticBatch(NamedTuple):
    """What :meth:`HierarchicalFeatures.batches` yields."""

    features: Tensor
    """(n, width) float32, not negative."""
    labels: Tensor
    """(n,) int64: class 0..C-1, or -1 for a sample of a held-out class."""
    groups: Tensor
    """(n,) int64 super-class: 0..K-1 those of the classifier, from K on those held out."""


class HierarchicalFeatures:
    r"""A world of super-classes, classes and held-out classes, and samples of it, batch by batch.

    A super-class has its centre at N(0, group_spread^2 / d I), a class at that of its super-class
    plus N(0, class_spread^2 / d I), so the spreads are lengths. A sample is

        relu(a centre + e),    e ~ N(0, I),    a = u^(1 / clarity),  u ~ U(0, 1),

    one a per sample: most samples are clear and some show little of their class, however many
    classes there are, and those have the smaller features, as is found of images. A taxonomy
    follows meaning and features follow looks: ``mismatch`` of the classes lie with another
    super-class than their own.

    Samples are drawn from four populations; the first is the classifier's:

    - ``"train"`` and ``"test"``: ``num_classes`` classes, equally often, class c of super-class
      c mod ``num_groups``. Every draw is fresh: training sees no sample twice.
    - ``"near"``: a fifth as many classes, held out of the same super-classes.
    - ``"far"``: ``far_groups`` held-out super-classes of as many classes as the classifier's have.
    - ``"outliers"``: for training with outliers, ``outlier_groups`` further super-classes of eight
      classes each. Frequencies fall as 1 / rank: a few kinds are most of the pool, as in scraped
      data. Some kinds are hard and some easy: one's centre has the direction of a known
      super-class's with weight r ~ U(0, 1) and a random one with sqrt(1 - r^2).

    The defaults are chosen so that no question is settled beforehand. A flat linear classifier,
    trained as in ``benchmarks/scale.py``, is right on about 0.9 of the samples at 100 classes and
    0.7 at 20,000; the best method's FPR95 is 0.3 to 0.4 at 100 classes and rises with their number.

    Memory is that of the centres, about 2.5 (C, d) float32; 26 MB for 20,000 classes of 128
    features. Batch b of a split depends on the seed, the split, b and the batch size alone.

    Args:
        num_classes: C, at least ``num_groups``.
        num_groups: K, super-classes of the classifier, >= 2.
        width: d, >= 1.
        group_spread: > 0.
        class_spread: > 0.
        clarity: > 0; less: more hard samples.
        mismatch: In [0, 1].
        far_groups: >= 1.
        outlier_groups: >= 1.
        seed: >= 0.

    Attributes:
        taxonomy: The classes by super-class, a :class:`~oodkernels.Groups`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        num_groups: int = 8,
        width: int = 128,
        *,
        group_spread: float = 7.0,
        class_spread: float = 14.0,
        clarity: float = 1.5,
        mismatch: float = 0.1,
        far_groups: int = 4,
        outlier_groups: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value, low in (
            ("num_groups", num_groups, 2),
            ("num_classes", num_classes, num_groups),
            ("width", width, 1),
            ("far_groups", far_groups, 1),
            ("outlier_groups", outlier_groups, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"HierarchicalFeatures: {name} must be >= {low}, got {value}")
        for name, real in (
            ("group_spread", group_spread),
            ("class_spread", class_spread),
            ("clarity", clarity),
        ):
            if not real > 0:
                raise ValueError(f"HierarchicalFeatures: {name} must be > 0, got {real}")
        if not 0 <= mismatch <= 1:
            raise ValueError(f"HierarchicalFeatures: mismatch must be in [0, 1], got {mismatch}")
        self.num_classes, self.num_groups, self.width = num_classes, num_groups, width
        self.group_spread, self.class_spread = group_spread, class_spread
        self.clarity, self.mismatch, self.seed = clarity, mismatch, seed
        self.far_groups, self.outlier_groups = far_groups, outlier_groups

        generator = self._generator(0)
        held_out = far_groups + outlier_groups
        super_centres = self._normal(generator, num_groups + held_out, group_spread)
        known = super_centres[torch.arange(outlier_groups) % num_groups]
        near_known = torch.rand(outlier_groups, 1, generator=generator)
        rest = super_centres[num_groups + far_groups :]
        rest.mul_((1 - near_known**2).sqrt()).add_(near_known * known)
        ids = torch.arange(num_classes) % num_groups
        near = torch.arange(-(-num_classes // 5)) % num_groups
        far = torch.arange(-(-num_classes // num_groups) * far_groups) % far_groups + num_groups
        outliers = torch.arange(8 * outlier_groups) % outlier_groups + num_groups + far_groups
        rank = outliers - outliers.amin() + 1
        self.taxonomy = Groups(ids)
        self._populations: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, group in (("id", ids), ("near", near), ("far", far), ("outliers", outliers)):
            place = group.clone()
            if name in ("id", "near"):
                moved = torch.rand(len(group), generator=generator) < mismatch
                step = torch.randint(1, num_groups, group.shape, generator=generator)
                place = torch.where(moved, (group + step) % num_groups, group)
            centres = super_centres[place] + self._normal(generator, len(group), class_spread)
            frequency = 1.0 / rank.double() if name == "outliers" else torch.ones(len(group))
            self._populations[name] = (centres, group, frequency.double().cumsum(0))

    def batches(self, split: Split, n: int, batch_size: int = 512) -> Iterator[SyntheticBatch]:
        """The first n samples of a split, in batches.

        Args:
            split: One of the splits above.
            n: Number of samples, >= 1.
            batch_size: >= 1; the last batch may be smaller.

        Raises:
            ValueError: An unknown split or a number out of its range.
        """
        if split not in get_args(Split):
            raise ValueError(
                f"HierarchicalFeatures.batches: split must be one of {get_args(Split)}, got "
                f"{split!r}"
            )
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"HierarchicalFeatures.batches: {name} must be >= 1, got {value}")
        return self._batches(split, n, batch_size)

    def sample(self, split: Split, n: int) -> SyntheticBatch:
        """The first n samples of a split, in memory; as :meth:`batches` of the default size."""
        columns = zip(*self.batches(split, n), strict=True)
        return SyntheticBatch(*(torch.cat(column) for column in columns))

    def settings(self) -> dict[str, Any]:
        """The numbers that make this world, for records of results."""
        names = (
            *("num_classes", "num_groups", "width", "group_spread", "class_spread", "clarity"),
            *("mismatch", "far_groups", "outlier_groups", "seed"),
        )
        return {name: getattr(self, name) for name in names}

    def _batches(self, split: Split, n: int, batch_size: int) -> Iterator[SyntheticBatch]:
        is_id = split in ("train", "test")
        centres, groups, cumulated = self._populations["id" if is_id else split]
        for b in range(-(-n // batch_size)):
            size = min(batch_size, n - b * batch_size)
            generator = self._generator(1 + get_args(Split).index(split), b)
            draw = torch.rand(batch_size, generator=generator, dtype=torch.float64)
            kind = torch.searchsorted(cumulated, draw[:size] * cumulated[-1], right=True)
            kind = kind.clamp_(max=len(centres) - 1)  # where the product rounds up to the sum
            # Whole batches, cut afterwards: how a power is rounded depends on where it stands.
            clear = torch.rand(batch_size, 1, generator=generator) ** (1 / self.clarity)
            noise = torch.randn(batch_size, self.width, generator=generator)
            features = (clear[:size] * centres[kind]).add_(noise[:size]).relu_()
            labels = kind if is_id else torch.full_like(kind, -1)
            yield SyntheticBatch(features, labels, groups[kind])

    def _generator(self, *stream: int) -> torch.Generator:
        bits = np.random.SeedSequence((self.seed, *stream)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(bits) >> 1)

    def _normal(self, generator: torch.Generator, n: int, length: float) -> Tensor:
        return torch.randn(n, self.width, generator=generator) * (length / self.width**0.5)
