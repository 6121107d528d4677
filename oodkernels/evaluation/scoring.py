"""One walk over data sets: every batch with every detector's scores of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn

from oodkernels._digest import digest
from oodkernels._ranks import gathered, ranks
from oodkernels.data import ROLES, Samples
from oodkernels.detectors import DETECTORS, Batch, Model, OODDetector
from oodkernels.detectors.compose import spec_of
from oodkernels.detectors.walk import (
    GIVEN,
    Alike,
    Data,
    Part,
    parts_of,
    score_part,
    tell_absent,
)
from oodkernels.groups import Groups
from oodkernels.metrics import ThresholdSource

Detectors: TypeAlias = Mapping[str, OODDetector | str] | Sequence[OODDetector | str]

__all__ = [
    "DEFAULT_DETECTORS",
    "ScoredBatch",
    "as_detectors",
    "score_sets",
    "source_of",
]

DEFAULT_DETECTORS = ("msp", "max-logit", "energy")


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """A batch of a data set on its way through :func:`score_sets`.

    Attributes:
        name: Of the data set.
        batch: As detectors read it.
        labels: (N,) class ids, if there are any.
        scores: Name -> (N,) on the CPU: every detector's, then those that were there already.
        detectors: Name -> detector, of the scores that one gave.
        done: Samples of the data set so far, these included.
    """

    name: str
    batch: Batch
    labels: Tensor | None
    scores: dict[str, Tensor]
    detectors: Mapping[str, OODDetector]
    done: int


def score_sets(
    where: str,
    sets: Mapping[str, Data],
    detectors: Mapping[str, OODDetector] | None = None,
    *,
    model: Model | None = None,
    groups: Groups | None = None,
    shared: bool = False,
) -> Iterator[ScoredBatch]:
    """Data sets one after the other, each read once, for all detectors.

    Every set must give the same scores from logits and features of the same width.

    Args:
        where: What errors start with that are not of one data set.
        sets: Name -> data, as for :func:`oodkernels.evaluate`.
        detectors: By any name. None: those that the first batch gives reason for: of logits
            :data:`DEFAULT_DETECTORS`, or ``mos`` and ``mos-log-odds`` where there are groups; of
            a model with an absent class or a confidence branch first that method's own.
        model: What is run on the data; None where they hold logits, features or scores.
        groups: Of a MOS head.
        shared: Whether all ranks of ``torch.distributed`` call this and share the work: of n, each
            scores every n-th batch, and all are given the scores, labels and logits of all batches,
            in order. Data that have a method ``share(rank, world)`` say which are one's own; of
            others all batches are read.

    Raises:
        ValueError: A set has no samples, or other scores or another width than the first; a score
            is NaN (with set, sample and where the NaN comes from); or a detector is not fitted,
            or needs what the batches do not have.
        TypeError: A batch is not of a form that :func:`oodkernels.evaluate` takes.
    """
    first = Alike(where)
    for name, data in sets.items():
        source, done, given, absent = name, 0, GIVEN, None
        if isinstance(data, Samples):
            source, data = data.name, _pruned(data, detectors, model)
            given, absent = _called(data), data.absent_column if model is None else None
        here = ranks() if shared else (0, 1)
        own = parts_of(where, model, _share(data, here), detectors or {}, given)
        while parts := _next_of_all(own, here):
            part = parts.own
            scores = None
            if part is not None:
                if part.batch.absent is None and part.batch.logits is not None:
                    part.batch.absent = absent
                if detectors is None:
                    detectors = as_detectors(_default(part.batch, groups), groups, model, where)
                tell_absent(where, detectors, part.batch)
                scores = score_part(where, detectors, part, source, done + parts.before)
                first.check(source, part.batch, scores)
            for batch, labels, found in parts.exchange(scores):
                first.check(source, batch, found)
                done += len(next(iter(found.values())))
                yield ScoredBatch(name, batch, labels, found, detectors or {}, done)
        if not done:
            raise ValueError(f"{where}: {source} has no samples")


def _share(data: Data, here: tuple[int, int]) -> Data:
    """This rank's batches of a data set: by its own means if it has any, else read past others."""
    rank, world = here
    if world == 1:
        return data
    if hasattr(data, "share"):
        found: Data = data.share(rank, world)
        return found
    whole = [data] if isinstance(data, Tensor | Mapping) else data
    return itertools.islice(whole, rank, None, world)


Exchanged: TypeAlias = tuple[Batch, Tensor | None, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Round:
    """The next batch of every rank."""

    own: Part | None
    sizes: list[int]
    rank: int

    @property
    def before(self) -> int:
        """Samples in the batches of the ranks before this one."""
        return sum(self.sizes[: self.rank])

    def exchange(self, scores: dict[str, Tensor] | None) -> list[Exchanged]:
        """Batch, labels and scores of every rank that had one."""
        if len(self.sizes) == 1:
            return [(self.own.batch, self.own.labels, scores or {})] if self.own else []
        mine = None
        if self.own is not None:
            batch, labels = self.own.batch, self.own.labels
            logits = None if batch.logits is None else batch.logits.cpu()
            labels = None if labels is None else labels.cpu()
            mine = (logits, batch.absent, labels, scores)
        found: list[Exchanged] = []
        for one in gathered(mine):
            if one is not None:
                logits, absent, labels, theirs = one
                batch = Batch(logits=logits)
                batch.absent = absent
                found.append((batch, labels, theirs or {}))
        return found


def _next_of_all(own: Iterator[Part], here: tuple[int, int]) -> _Round | None:
    """The next batches of all ranks; None where none has any."""
    part = next(own, None)
    rank, world = here
    if world == 1:
        return None if part is None else _Round(part, [len(part)], rank)
    sizes = gathered(-1 if part is None else len(part))
    return _Round(part, [max(n, 0) for n in sizes], rank) if max(sizes) >= 0 else None


def _default(batch: Batch, groups: Groups | None) -> list[str]:
    own = {"confidence": batch.confidence, "absent-class": batch.absent}
    names = [name for name, found in own.items() if found is not None]
    if batch.logits is not None:
        names += DEFAULT_DETECTORS if groups is None else ("mos", "mos-log-odds")
    return names


def as_detectors(
    detectors: Detectors,
    groups: Groups | None = None,
    model: Model | None = None,
    where: str = "evaluate",
) -> dict[str, OODDetector]:
    """Detectors by name, made where only their name is given.

    Args:
        detectors: As for :func:`oodkernels.evaluate`.
        groups: For those that are made.
        model: For those that are made.
        where: What errors start with.

    Raises:
        ValueError: A name is unknown, used twice, or a detector's settings are missing.
        TypeError: One is neither a detector nor a name.
    """
    if isinstance(detectors, Mapping):
        pairs = list(detectors.items())
    else:
        names = {cls: name for name, cls in DETECTORS.items()}
        pairs = [
            (d if isinstance(d, str) else names.get(type(d), type(d).__name__), d)
            for d in detectors
        ]
    found: dict[str, OODDetector] = {}
    for label, detector in pairs:
        if label in found:
            raise ValueError(
                f"{where}: two detectors are called {label!r}: give them names of their own, as "
                "in {'name': detector}"
            )
        if isinstance(detector, str):
            detector = spec_of(where, detector).make(where, groups=groups, model=model)
        found[label] = detector
        if not isinstance(found[label], OODDetector):
            raise TypeError(
                f"{where}: detectors must be detectors or names of some, got "
                f"{type(detector).__name__}"
            )
    return found


def source_of(
    name: str, detector: OODDetector | None, model: Model | None = None
) -> ThresholdSource:
    """Where a score comes from, for thresholds: the detector's word, or the name of a column.

    Args:
        name: Of the score.
        detector: That gave it; None for a score that the data brought.
        model: What the data were sent through, if anything was.
    """
    found = ThresholdSource(name) if detector is None else detector.source()
    if found.model is None and isinstance(model, nn.Module):
        found = replace(found, model=digest(model.state_dict()))
    return found


def _called(samples: Samples) -> str:
    """What the scores of a file are called: by its own name for them, if it tells anything."""
    array = samples.arrays.get("scores")
    return array.name if array and array.name and array.name not in ROLES["scores"] else GIVEN


def _pruned(
    samples: Samples, detectors: Mapping[str, OODDetector] | None, model: Model | None
) -> Samples:
    """Leave out the features that no one would read."""
    used = model is not None or any("features" in d.needs for d in (detectors or {}).values())
    roles = [role for role in samples.arrays if role != "features" or used]
    return samples.only(*roles) if set(roles) - {"labels"} else samples
