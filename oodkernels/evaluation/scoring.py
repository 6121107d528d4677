"""One walk over data sets: every batch with every detector's scores of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from oodkernels.data.samples import ROLES, Samples
from oodkernels.detectors import DETECTORS, Batch, Model, OODDetector, run, score_batch
from oodkernels.groups import Groups

Data: TypeAlias = Iterable[Any] | Tensor
Detectors: TypeAlias = Mapping[str, OODDetector | str] | Sequence[OODDetector | str]

__all__ = [
    "DEFAULT_DETECTORS",
    "ScoredBatch",
    "as_detectors",
    "fit_detectors",
    "make_detector",
    "score_sets",
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
        done: Samples of the data set so far, these included.
    """

    name: str
    batch: Batch
    labels: Tensor | None
    scores: dict[str, Tensor]
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
            :data:`DEFAULT_DETECTORS`, or ``mos`` and ``mos-log-odds`` where there are groups.
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
        source, done, given = name, 0, GIVEN
        if isinstance(data, Samples):
            source, data = data.name, _pruned(data, detectors, model)
            given = _called(data)
        for part in _parts(where, model, data, detectors or {}, given):
            if detectors is None:
                names = () if part.batch.logits is None else DEFAULT_DETECTORS
                if names and groups is not None:
                    names = ("mos", "mos-log-odds")
                detectors = as_detectors(names, groups, model, where)
            scores = _scores(where, detectors, part, source, done)
            first.check(source, part.batch, scores)
            done += len(part)
            yield ScoredBatch(name, part.batch, part.labels, scores, done)
        if not done:
            raise ValueError(f"{where}: {source} has no samples")


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
            detector = make_detector(detector, {"groups": groups, "model": model}, where=where)
        found[label] = detector
        if not isinstance(found[label], OODDetector):
            raise TypeError(
                f"{where}: detectors must be detectors or names of some, got "
                f"{type(detector).__name__}"
            )
    return found


def make_detector(
    name: str,
    context: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    where: str = "evaluate",
) -> OODDetector:
    """A detector by its name in ``DETECTORS``.

    Args:
        name: Its name.
        context: Arguments that it gets where it has them and they are not None.
        settings: Arguments that it must have.
        where: What errors start with.

    Raises:
        ValueError: There is no such detector, or no such setting of it; or one is missing.
    """
    if name not in DETECTORS:
        raise ValueError(
            f"{where}: there is no detector {name!r}, only {', '.join(sorted(DETECTORS))}"
        )
    parameters = inspect.signature(DETECTORS[name]).parameters
    own = [key for key in parameters if key not in ("groups", "model")]
    for key in settings or {}:
        if key not in own:
            raise ValueError(
                f"{where}: detector {name!r} has no setting {key!r}, only "
                f"{', '.join(own) or 'none'}"
            )
    given = {k: v for k, v in context.items() if v is not None and k in parameters}
    given |= settings or {}
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in given:
            raise ValueError(f"{where}: detector {name!r} needs {parameter.name}")
    return DETECTORS[name](**given)


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
            if model is None and (scores or logits is not None or x is not None):
                if "scores" in scores:
                    scores[given] = scores.pop("scores")
                yield _Part(Batch(logits=logits, features=x), labels, scores)
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


def _called(samples: Samples) -> str:
    """What the scores of a file are called: by its own name for them, if it tells anything."""
    array = samples.arrays.get("scores")
    return array.name if array and array.name and array.name not in ROLES["scores"] else GIVEN


def _pruned(
    samples: Samples, detectors: Mapping[str, OODDetector] | None, model: Model | None
) -> Samples:
    """Without the features that no one would read."""
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
