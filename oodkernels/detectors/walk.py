"""One way through any data set: its batches as detectors read them, fitted to or scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from oodkernels._digest import StreamDigest
from oodkernels.detectors.base import OODDetector
from oodkernels.detectors.batch import INPUTS, Batch, inputs_of
from oodkernels.detectors.logits import AbsentClass
from oodkernels.detectors.model import Model, run
from oodkernels.detectors.passes import score_batch

Data: TypeAlias = Iterable[Any] | Tensor
"""Batches, tensors, (tensor, labels), or mappings with logits, features, labels, scores; or one."""

GIVEN = "score"

__all__ = [
    "GIVEN",
    "Alike",
    "Data",
    "Part",
    "fit_detectors",
    "identity",
    "parts_of",
    "score_part",
    "tell_absent",
]


@dataclass(frozen=True, eq=False)
class Part:
    """A batch of a data set; ``scores`` were there already."""

    batch: Batch
    labels: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.scores.values()), self.batch))


def parts_of(
    where: str,
    model: Model | None,
    data: Data,
    detectors: Mapping[str, OODDetector],
    given: str = GIVEN,
) -> Iterator[Part]:
    """A data set's batches, sent through the model where there is one.

    Args:
        where: What errors start with.
        model: What is run on the data; None where they hold logits, features or scores.
        data: The data set.
        detectors: For what they read of the model.
        given: What scores are called that the data bring without a name.

    Raises:
        TypeError: A batch is none of :data:`Data`.
    """
    layers = sorted({layer for detector in detectors.values() for layer in detector.layers})
    features = any(
        "features" in d.needs | d.trained_on and not d.layers for d in detectors.values()
    )
    for item in [data] if isinstance(data, Tensor | Mapping) else data:
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
                yield Part(batch, labels, scores)
                continue
            if x is None and any(item.get(name) is not None for name in INPUTS):
                x, _ = inputs_of(where, item)
        elif isinstance(item, (tuple, list)) and len(item) >= 2:
            x, labels = item[:2]
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if isinstance(labels, np.ndarray):
            labels = torch.from_numpy(labels)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{where}: a batch must be a tensor, (tensor, labels) or a dict with "
                + ("logits, features or scores" if model is None else "features")
                + f", got {type(item).__name__}"
            )
        if model is None:
            yield Part(Batch(logits=x), labels)
            continue
        with torch.no_grad():
            found = run(model, x, layers, features)
        yield Part(Batch.of(x, found), labels)


def fit_detectors(
    where: str,
    detectors: Iterable[OODDetector],
    data: Data,
    model: Model | None = None,
    seen: StreamDigest | None = None,
) -> None:
    """Detectors fitted together, in one pass over training samples, or as many as they take.

    Args:
        where: What errors start with.
        detectors: To be fitted; those without a fit read nothing.
        data: Training samples, as for :func:`oodkernels.evaluate`.
        model: What is run on them; None where they hold logits or features.
        seen: Told of every batch, for the name of what was fitted to.

    Raises:
        ValueError: What a detector is trained on is missing, or has the wrong shape.
        TypeError: It has the wrong type.
    """
    chosen = [detector for detector in detectors if detector.trained_on]
    layers = {str(i): detector for i, detector in enumerate(chosen)}
    for i in range(max((detector.passes for detector in chosen), default=0)):
        own = [detector for detector in chosen if detector.passes > i]
        for detector in own if i else ():
            detector._next_pass(where)
        for part in parts_of(where, model, data, layers):
            if seen is not None and not i:
                seen.add(**identity(part))
            for detector in own:
                detector.fit_batch(part.batch, part.labels, where=where)


def identity(part: Part) -> dict[str, Tensor]:
    """What tells a data set from others: its inputs, or where there are none what it holds."""
    batch = part.batch
    fields = ("x",) if batch.x is not None else ("logits", "features", "confidence")
    found = {name: getattr(batch, name) for name in fields}
    found["labels"] = None if part.labels is None else part.labels.long()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def tell_absent(where: str, detectors: Mapping[str, OODDetector], batch: Batch) -> None:
    """What one detector knows of the absent column counts for all, and for the accuracy."""
    if batch.logits is not None and batch.absent is None:
        for detector in detectors.values():
            column = detector.absent
            if column is None and isinstance(detector, AbsentClass):
                column = -1
            if column is not None:
                batch.absent = batch.absent_column(where, column)


def score_part(
    where: str, detectors: Mapping[str, OODDetector], part: Part, source: str, start: int
) -> dict[str, Tensor]:
    """Every detector's scores of a batch, on the CPU, and those that came with it.

    Args:
        where: What errors start with.
        detectors: By any name.
        part: The batch.
        source: Name of its data set, for errors.
        start: Samples of the set before it.

    Raises:
        ValueError: A score is NaN: says of which sample, and where it comes from.
    """
    scores: dict[str, Tensor] = {}
    if detectors and part.batch.tensors():
        scores = score_batch(detectors, part.batch, where=where)
    scores |= part.scores
    for name, values in scores.items():
        nan = values.isnan()
        if bool(nan.any()):
            row = int(nan.nonzero()[0, 0])
            raise ValueError(f"{source}: sample {start + row}: {_source_of_nan(part, row, name)}")
    return {name: values.detach().cpu() for name, values in scores.items()}


def _source_of_nan(part: Part, row: int, score: str) -> str:
    for kind in ("logits", "features"):
        tensor = getattr(part.batch, kind)
        if tensor is not None and bool((nan := tensor[row].isnan()).any()):
            return f"{kind} must not be NaN, got NaN in column {int(nan.nonzero()[0])}"
    if score in part.scores:
        return f"{score} must not be NaN, got NaN"
    return f"{score} gives NaN"


class Alike:
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
