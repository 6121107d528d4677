"""One pass over a batch for any number of detectors: a model runs once for all that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from oodkernels.detectors.batch import Batch, joined, present
from oodkernels.detectors.model import Model, Walk, absent_column, run, to_model

__all__ = ["Detector", "complete", "completed", "predict_batch", "score_batch"]


class Detector(Protocol):
    """What a pass asks of a detector; see :class:`OODDetector`."""

    name: ClassVar[str]
    model: Model | None
    needs: frozenset[str]
    layers: Sequence[str]
    batch_size: int
    _walk: Walk | None

    def _ready(self, where: str) -> None: ...
    def _missing(self, batch: Batch, wanted: Iterable[str]) -> list[str]: ...
    def _check(self, where: str, batch: Batch) -> None: ...
    def _announce(self, batch: Batch) -> None: ...
    def _score(self, batch: Batch) -> Tensor: ...
    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]: ...


def score_batch(
    detectors: Mapping[str, Detector],
    batch: Batch,
    chunk: int | None = None,
    *,
    where: str = "score_batch",
) -> dict[str, Tensor]:
    """:func:`score_all` of a batch.

    Args:
        detectors: By any name.
        batch: Its tensors are not looked at again; what detectors need and it has not is computed
            from its ``x``.
        chunk: As for :func:`score_all`.
        where: What errors start with.

    Returns:
        As there.

    Raises:
        ValueError: As there.
        NotFittedError: As there.
    """
    used = list(detectors.values())
    if chunk is None and batch.x is not None:
        chunk = min((d.batch_size for d in used), default=1)
    scores: list[list[Tensor]] = [[] for _ in used]
    with torch.no_grad():
        for part in batch.chunks(chunk):
            mine = completed(where, used, part)
            for detector, own in zip(used, mine, strict=True):
                detector._announce(own)
            for i, own in enumerate(mine):
                scores[i].append(used[i]._score(own))
    found = [present(joined(parts, batch.device)) for parts in scores]
    return dict(zip(detectors, found, strict=True))


def predict_batch(
    detector: Detector, batch: Batch, *, where: str = "predict_batch"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores of a batch with predicted classes and groups, whatever the threshold.

    Args:
        detector: The detector.
        batch: As for :func:`score_batch`; it goes through in one piece.
        where: What errors start with.

    Returns:
        Score, label and group as in :class:`Prediction`.

    Raises:
        ValueError: As :func:`score_batch`.
        NotFittedError: As there.
    """
    with torch.no_grad():
        own = complete(where, detector, batch)
        return detector._score(own), *detector._label(own)


def completed(
    where: str,
    detectors: Sequence[Detector],
    batch: Batch,
    wanted: frozenset[str] | None = None,
) -> list[Batch]:
    """Give each detector a checked batch that has what it needs; a model runs once at most."""
    found: dict[int, Batch] = {}

    def ran(detector: Detector) -> Batch:
        key = id(detector.model)
        if key not in found:
            sharing = [d for d in detectors if d.model is detector.model]
            found[key] = _run(where, batch, sharing, wanted)
        return found[key]

    return [complete(where, detector, batch, wanted, ran) for detector in detectors]


def complete(
    where: str,
    detector: Detector,
    batch: Batch,
    wanted: frozenset[str] | None = None,
    ran: Callable[[Detector], Batch] | None = None,
) -> Batch:
    """:func:`completed` for one detector; ``ran`` gives what several have their model say."""
    if wanted is None:
        detector._ready(where)
    needs = detector.needs if wanted is None else wanted
    if missing := detector._missing(batch, needs):
        if batch.x is None or "x" in missing:
            raise ValueError(f"{where}: {detector.name} needs {', '.join(missing)}, or x")
        if detector.model is None:
            raise ValueError(
                f"{where}: x needs a model: {type(detector).__name__}(..., model=model)"
            )
        batch = _run(where, batch, [detector], wanted) if ran is None else ran(detector)
        if missing := detector._missing(batch, needs):
            raise ValueError(
                f"{where}: the model must give {', '.join(missing)} for {detector.name}; "
                f"see FeatureModel"
            )
    if detector.model is not None and batch.absent is None and batch.logits is not None:
        column = absent_column(detector.model)
        if column is not None:
            batch = batch.without(batch.absent_column(where, column))
    detector._check(where, batch)
    return batch


def _run(
    where: str,
    batch: Batch,
    detectors: Sequence[Detector],
    wanted: frozenset[str] | None,
) -> Batch:
    """The batch with what the detectors' model makes of its x; what was given is kept."""
    first, *others = detectors
    model, layers = present(first.model), first.layers
    features = not layers and "features" in (first.needs if wanted is None else wanted)
    for d in others:
        layers = tuple(dict.fromkeys((*layers, *d.layers)))
        reads = d.needs if wanted is None else wanted
        features = features or (not d.layers and "features" in reads)
    walk = None
    if isinstance(model, nn.Module):
        if first._walk is None or not first._walk.is_of(model):
            first._walk = Walk(model)
        walk = first._walk.current()
    x = to_model(model, present(batch.x), walk)
    found = Batch.of(x, run(model, x, layers, features, walk))
    if found.logits is not None and found.logits.dim() != 2:
        raise ValueError(
            f"{where}: the model must give logits (N, C), got {tuple(found.logits.shape)}; those "
            f"of pixels are scored as logits=, (N, C, H, W)"
        )
    if batch.logits is not None:
        found.logits = batch.logits
    if batch.features is not None:
        found.features = batch.features
    if batch.confidence is not None:
        found.confidence = batch.confidence
    if batch.layers:
        found.layers = {**found.layers, **batch.layers}
    if batch.absent is not None:
        found.absent = batch.absent
    return found
