"""One walk over data sets: every batch with every detector's scores of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from oodkernels._digest import digest
from oodkernels.data import ROLES, Samples
from oodkernels.detectors import DETECTORS, AbsentClass, Batch, Model, OODDetector, run, score_batch
from oodkernels.groups import Groups
from oodkernels.metrics import ThresholdSource

Data: TypeAlias = Iterable[Any] | Tensor
Detectors: TypeAlias = Mapping[str, OODDetector | str] | Sequence[OODDetector | str]

__all__ = [
    "DEFAULT_DETECTORS",
    "ScoredBatch",
    "as_detectors",
    "fit_detectors",
    "score_sets",
    "source_of",
]

DEFAULT_DETECTORS = ("msp", "max-logit", "energy")
GIVEN = "score"


@dataclass(frozen=True, eq=False)
class _Part:
    """A batch of a data set; ``scores`` were there already."""

    batch: Batch
    labels: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.scores.values()), self.batch))


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

    Raises:
        ValueError: A set has no samples, or other scores or another width than the first; a score
            is NaN (with set, sample and where the NaN comes from); or a detector is not fitted,
            or needs what the batches do not have.
        TypeError: A batch is not of a form that :func:`oodkernels.evaluate` takes.
    """
    first = _First(where)
    for name, data in sets.items():
        source, done, given, absent = name, 0, GIVEN, None
        if isinstance(data, Samples):
            source, data = data.name, _pruned(data, detectors, model)
            given, absent = _called(data), data.absent_column if model is None else None
        for part in _parts(where, model, data, detectors or {}, given):
            if part.batch.absent is None and part.batch.logits is not None:
                part.batch.absent = absent
            if detectors is None:
                detectors = as_detectors(_default(part.batch, groups), groups, model, where)
            _tell_absent(where, detectors, part.batch)
            scores = _scores(where, detectors, part, source, done)
            first.check(source, part.batch, scores)
            done += len(part)
            yield ScoredBatch(name, part.batch, part.labels, scores, detectors, done)
        if not done:
            raise ValueError(f"{where}: {source} has no samples")


def _default(batch: Batch, groups: Groups | None) -> list[str]:
    own = {"confidence": batch.confidence, "absent-class": batch.absent}
    names = [name for name, found in own.items() if found is not None]
    if batch.logits is not None:
        names += DEFAULT_DETECTORS if groups is None else ("mos", "mos-log-odds")
    return names


def fit_detectors(
    where: str, detectors: Iterable[OODDetector], data: Data, model: Model | None = None
) -> None:
    """Detectors fitted together, in one pass over training samples.

    Args:
        where: What errors start with.
        detectors: To be fitted; those without a fit read nothing.
        data: Training samples, as for :func:`oodkernels.evaluate`.
        model: What is run on them; None where they hold logits or features.

    Raises:
        ValueError: What a detector is trained on is missing, or has the wrong shape.
        TypeError: It has the wrong type.
    """
    chosen = [detector for detector in detectors if detector.trained_on]
    layers = {str(i): detector for i, detector in enumerate(chosen)}
    for part in _parts(where, model, data, layers):
        for detector in chosen:
            detector.fit_batch(part.batch, part.labels, where=where)


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
            if detector not in DETECTORS:
                raise ValueError(
                    f"{where}: there is no detector {detector!r}, only "
                    f"{', '.join(sorted(DETECTORS))}"
                )
            detector = DETECTORS[detector].spec.make(where, groups=groups, model=model)
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


# --- batches ----------------------------------------------------------------------------------


def _parts(
    where: str,
    model: Model | None,
    data: Data,
    detectors: Mapping[str, OODDetector],
    given: str = GIVEN,
) -> Iterator[_Part]:
    """A data set's batches, sent through the model where there is one."""
    layers = sorted({layer for detector in detectors.values() for layer in detector.layers})
    features = any(
        "features" in d.needs | d.trained_on and not d.layers for d in detectors.values()
    )
    for item in [data] if isinstance(data, Tensor) else data:
        x, labels = item, None
        if isinstance(item, Mapping):
            scores = dict(item)
            logits, x, labels = (scores.pop(key, None) for key in ("logits", "features", "labels"))
            confidence = scores.pop("confidence", None)
            parts = (logits, x, confidence)
            if model is None and (scores or any(part is not None for part in parts)):
                if "scores" in scores:
                    scores[given] = scores.pop("scores")
                batch = Batch(logits=logits, features=x, confidence=confidence)
                yield _Part(batch, labels, scores)
                continue
        elif isinstance(item, (tuple, list)) and len(item) >= 2:
            x, labels = item[:2]
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{where}: a batch must be a tensor, (tensor, labels) or a dict with "
                + ("logits, features or scores" if model is None else "features")
                + f", got {type(item).__name__}"
            )
        if model is None:
            yield _Part(Batch(logits=x), labels)
            continue
        with torch.no_grad():
            found = run(model, x, layers, features)
        yield _Part(Batch.of(x, found), labels)


def _tell_absent(where: str, detectors: Mapping[str, OODDetector], batch: Batch) -> None:
    """What one detector knows of the absent column counts for all, and for the accuracy."""
    if batch.logits is not None and batch.absent is None:
        for detector in detectors.values():
            column = detector.absent
            if column is None and isinstance(detector, AbsentClass):
                column = -1
            if column is not None:
                batch.absent = batch.absent_column(where, column)


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


def _scores(
    where: str, detectors: Mapping[str, OODDetector], part: _Part, source: str, start: int
) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    if detectors and part.batch.tensors():
        scores = score_batch(detectors, part.batch, where=where)
    scores |= part.scores
    for name, values in scores.items():
        nan = values.isnan()
        if bool(nan.any()):
            row = int(nan.nonzero()[0])
            raise ValueError(f"{source}: sample {start + row}: {_source_of_nan(part, row, name)}")
    return {name: values.detach().cpu() for name, values in scores.items()}


def _source_of_nan(part: _Part, row: int, score: str) -> str:
    for kind in ("logits", "features"):
        tensor = getattr(part.batch, kind)
        if tensor is not None and bool((nan := tensor[row].isnan()).any()):
            return f"{kind} must not be NaN, got NaN in column {int(nan.nonzero()[0])}"
    if score in part.scores:
        return f"{score} must not be NaN, got NaN"
    return f"{score} gives NaN"


class _First:
    """What the first batch was like, as all others must be."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.source = ""
        self.scores: list[str] = []
        self.widths: dict[str, tuple[str, int]] = {}

    def check(self, source: str, batch: Batch, scores: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a batch has the same scores, from the same widths."""
        for name in ("logits", "features"):
            tensor = getattr(batch, name)
            if tensor is None or tensor.dim() < 2:
                continue
            first, width = self.widths.setdefault(name, (source, tensor.shape[1]))
            if tensor.shape[1] != width:
                raise ValueError(
                    f"{self.where}: {name} of all sets must have the same width, got {width} in "
                    f"{first} and {tensor.shape[1]} in {source}"
                )
        if not self.source:
            if not scores:
                raise ValueError(
                    f"{self.where}: {source} has neither logits nor scores: name the detectors "
                    "that are to score the features"
                )
            self.source, self.scores = source, list(scores)
        for lacking, other, found, names in (
            (source, self.source, scores, self.scores),
            (self.source, source, self.scores, scores),
        ):
            if missing := [name for name in names if name not in found]:
                raise ValueError(
                    f"{self.where}: {lacking} lacks the score {missing[0]!r}, which {other} has: "
                    "all sets must have the same scores; columns={'scores': NAME} (--column "
                    "scores=NAME) takes one of them"
                )
