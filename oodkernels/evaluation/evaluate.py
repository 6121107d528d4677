"""Evaluation of detectors: every score of every data set in one pass, and what came of it.

Needs the extra ``metrics`` where scores are streamed or the ID set has labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from oodkernels._digest import StreamDigest
from oodkernels._ranks import ranks
from oodkernels.detectors import Batch, Model, Tuning
from oodkernels.detectors.walk import Data, Part, identity
from oodkernels.evaluation.methods import (
    OTHER,
    OWN,
    Array,
    GroupOthers,
    MethodResult,
    StreamedMethodResult,
)
from oodkernels.evaluation.results import Evaluation
from oodkernels.evaluation.scoring import Detectors, ScoredBatch, as_detectors, score_sets
from oodkernels.evaluation.tables import AVERAGE, printable
from oodkernels.groups import Groups
from oodkernels.metrics.ood import CONVENTIONS
from oodkernels.ops import mos_log_others

if TYPE_CHECKING:
    from oodkernels.metrics.streaming import CalibrationError, OODMetrics

__all__ = ["evaluate"]

Scores: TypeAlias = Mapping[str, tuple[Any, Mapping[str, Any]]]

ID = "ID"


def evaluate(
    model_or_scores: Model | Scores | Iterable[MethodResult] | None,
    id_loader: Data | None = None,
    ood_loaders: Mapping[str, Data] | None = None,
    detectors: Detectors | None = None,
    *,
    groups: Groups | None = None,
    model_name: str = "model",
    memory: int | str | None = None,
    convention: str = "default",
    tuning: Tuning | None = None,
    shared: bool = False,
    on_batch: Callable[[str, int], None] = lambda name, samples: None,
) -> Evaluation:
    """Detectors on one ID set and any number of OOD sets, each read once for all of them.

    Example:
        >>> evaluation = evaluate(model, id_loader, {"svhn": svhn}, ["msp", "energy"])
        >>> print(evaluation)                     # the papers' table
        >>> evaluation.save("run")                # CSV, JSON, Markdown, LaTeX, HTML
        >>> evaluate(None, open_samples("id.npz"), {"svhn": open_samples("svhn.npz")})
        >>> evaluate({"energy": (id_scores, {"svhn": svhn_scores})})

    Args:
        model_or_scores: x -> logits, an ``nn.Module`` where features are needed. None, if loaders
            hold logits, features or scores instead of inputs. Or, without loaders, the scores:
            name -> (ID scores, {OOD set: scores}), or
            :class:`oodkernels.evaluation.MethodResult` objects.
        id_loader: Batches of ID samples: x, (x, labels), and without a model logits, (logits,
            labels) or dicts as :class:`oodkernels.data.Samples` yields them. With a model that is
            a head, dicts with features. Or one tensor instead of batches. Labels are class ids, for
            accuracy and reliability.
        ood_loaders: OOD set -> the same, with the same scores, from logits and features of the
            same width; labels are not looked at.
        detectors: Detectors by name, or in a list: fitted ones where fitting is needed, or keys of
            ``DETECTORS``. By default MSP, max logit and energy, or with groups MOS and its
            log-odds; of a model with an absent class or a confidence branch first its own. Scores
            that batches hold, under any other name than "logits", "features", "labels" and
            "confidence", come beside them.
        groups: Of a MOS head; by default those of the first detector that has them, of the model,
            or of the ID file.
        model_name: Name of the model in the table.
        memory: Size of the metrics' state for each detector, as in "16MiB": see
            :class:`oodkernels.OODMetrics`. By default scores are kept, and all figures exact.
        convention: Of :func:`oodkernels.ood_metrics`; with ``memory`` only the default.
        tuning: Of the sweep that the detectors' settings come from: for the report, and so that
            none of the sets is one that they were chosen on.
        shared: Whether all ranks of ``torch.distributed`` call this, and share the batches as
            :func:`oodkernels.evaluation.score_sets` has it; all are given the same.
        on_batch: Told the data set and the number of its samples done, "ID" for the ID set.

    Returns:
        An :class:`Evaluation`.

    Raises:
        ValueError: A set has no samples, an OOD set a name that is not allowed, a score is NaN
            (with set, sample and where the NaN comes from), a label is no class id, or a detector
            is unknown, not fitted, or needs what the batches do not have; or the settings were
            chosen on one of the sets, or for another model.
        TypeError: A batch is none of the above.
        ImportError: torchmetrics is needed and missing.
    """
    if id_loader is None or ood_loaders is None:
        return _of_scores(model_or_scores, model_name, convention)
    if not ood_loaders:
        raise ValueError("evaluate: ood_loaders must name at least one OOD set, got none")
    for name in ood_loaders:
        if name in ("", AVERAGE, ID):
            raise ValueError(f"evaluate: an OOD set cannot be called {name!r}")
    if convention not in CONVENTIONS or (memory is not None and convention != "default"):
        raise ValueError(
            f"evaluate: convention must be one of {', '.join(CONVENTIONS)}, and 'default' with "
            f"memory, got {convention!r}"
        )
    if model_or_scores is not None and not callable(model_or_scores):
        raise TypeError(
            "evaluate: model_or_scores must be a model or None where loaders are given, got "
            f"{type(model_or_scores).__name__}"
        )
    model = model_or_scores
    if groups is None and detectors is not None:
        given = detectors.values() if isinstance(detectors, Mapping) else detectors
        groups = next((g for d in given if (g := getattr(d, "groups", None))), None)
    if groups is None:
        groups = getattr(id_loader if model is None else model, "groups", None)
    chosen = None if detectors is None else as_detectors(detectors, groups, model)
    id_data, why = _comparable(id_loader, model, groups)
    sets = {ID: id_data, **{printable(name): data for name, data in ood_loaders.items()}}
    found = _Tally(groups, memory, list(sets)[1:], why)
    seen = {name: StreamDigest() for name in sets}
    if tuning is not None:
        if shared and ranks()[1] > 1:
            raise ValueError("evaluate: tuning is for one process, which reads all of the data")
        tuning.check_model("evaluate", model)
    for batch in score_sets("evaluate", sets, chosen, model=model, groups=groups, shared=shared):
        found.take(batch)
        if tuning is not None:
            seen[batch.name].add(**identity(Part(batch.batch)))
        on_batch(batch.name, batch.done)
    if tuning is not None:
        for name, read in seen.items():
            tuning.check_test("evaluate", name, read.found())
    return replace(found.result(model_name, convention), tuning=tuning)


def _comparable(data: Any, model: Model | None, groups: Groups | None) -> tuple[Any, str | None]:
    """ID data with labels that count the model's classes, or why labels cannot be compared."""
    names = getattr(data, "class_names", None)
    known = getattr(data if model is None else model, "model_classes", None)
    if model is not None and known is None:
        known = getattr(model, "class_names", None)
    if groups is not None and groups.class_names is not None:
        if known is not None and tuple(known) != groups.class_names:
            raise ValueError(
                "evaluate: groups must count classes as the model does: give "
                "groups.matched(names) of the model's class names"
            )
        known = groups.class_names
    if names is None or (known is not None and tuple(names) == tuple(known)):
        return data, None
    if known is not None and set(names) <= set(known):
        return data.with_classes(known), None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if known is None:
        return data, f"whether the classes of {data.name} ({shown}) are the model's is not known"
    return data, f"the classes of {data.name} ({shown}) are not the model's"


def _of_scores(given: Any, model_name: str, convention: str) -> Evaluation:
    if isinstance(given, Mapping):
        methods: list[Any] = []
        for name, (id_scores, ood_scores) in given.items():
            sets = {ood: _to_numpy(scores) for ood, scores in ood_scores.items()}
            inside = _to_numpy(id_scores)
            methods.append(MethodResult(model_name, name, math.nan, inside, sets, convention))
    elif given is None or callable(given):
        raise TypeError("evaluate: id_loader and ood_loaders are needed with a model")
    else:
        methods = list(given)
    if not methods:
        raise ValueError("evaluate: there are no scores")
    return Evaluation(methods)


def _to_numpy(scores: Any) -> Array:
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
        scores = scores.float() if scores.dtype == torch.bfloat16 else scores
        return scores.reshape(-1).numpy()
    return np.asarray(scores).reshape(-1)


class _Tally:
    """Scores, answers and "others" as they come in."""

    def __init__(
        self,
        groups: Groups | None,
        memory: int | str | None,
        ood_sets: list[str],
        without_accuracy: str | None,
    ) -> None:
        self.groups, self.memory, self.ood_sets = groups, memory, ood_sets
        self.without_accuracy = without_accuracy
        self.absent: int | None = None
        self.kept: dict[str, dict[str, list[Tensor]]] = {}
        self.metrics: dict[str, OODMetrics] = {}
        self.right = self.labelled = 0
        self.calibration: CalibrationError | None = None
        self.others: dict[str, _Mean] = {}
        self.least: dict[str, _Mean] = {}

    def take(self, found: ScoredBatch) -> None:
        """A batch."""
        for score, values in found.scores.items():
            self._keep(score, found.name, values)
        if found.batch.logits is not None:
            counts = found.name == ID and self.without_accuracy is None
            self._describe(found.name, found.batch, found.labels if counts else None)
            self.absent = found.batch.absent

    def _keep(self, score: str, name: str, values: Tensor) -> None:
        if self.memory is None:
            self.kept.setdefault(score, {}).setdefault(name, []).append(values)
            return
        if score not in self.metrics:
            from oodkernels.metrics.streaming import OODMetrics

            # This process is told of all samples: ranks have nothing to add up.
            self.metrics[score] = OODMetrics(
                memory=self.memory, sets=len(self.ood_sets), sync_on_compute=False
            )
        if name == ID:
            self.metrics[score].update_id(values)
        else:
            self.metrics[score].update_ood(name, values)

    def _describe(self, name: str, batch: Batch, labels: Tensor | None) -> None:
        """Accuracy and reliability where there are labels; "others" where there are groups."""
        assert batch.logits is not None
        if labels is not None:
            labels = labels.to(batch.logits.device)
            self._answers(batch, labels)
        if self.groups is None:
            return
        p = mos_log_others(batch.logits, self.groups).double().exp()
        self._add(self.others, name, p)
        self._add(self.least, name, p.amin(1, keepdim=True))
        if labels is not None:
            group = self.groups.to(p.device).class_to_group[labels]
            own = torch.nn.functional.one_hot(group, self.groups.num_groups).double()
            self._add(self.others, OWN, p, own)
            self._add(self.others, OTHER, p, 1 - own)

    def _add(
        self, means: dict[str, _Mean], kind: str, values: Tensor, weight: Tensor | None = None
    ) -> None:
        weight = torch.ones_like(values) if weight is None else weight
        means.setdefault(kind, _Mean()).add(values, weight)

    def _answers(self, batch: Batch, labels: Tensor) -> None:
        assert batch.logits is not None
        if self.groups is not None:
            found = batch.mos_predict(self.groups)
            confidence, answer = found.prob, self.groups.to_class(found.label)
            classes = self.groups.num_classes
        else:
            flat = batch.logit_scores()
            confidence, answer = flat.msp, flat.label
            classes = batch.logits.shape[1] - (batch.absent is not None)
        wrong = (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"evaluate: labels of the ID set must be class ids 0..{classes - 1}, got "
                f"{int(labels[first])} for sample {self.labelled + first}"
            )
        correct = answer == labels
        self.right += int(correct.sum())
        self.labelled += len(labels)
        if self.calibration is None:
            from oodkernels.metrics.streaming import CalibrationError

            self.calibration = CalibrationError(sync_on_compute=False)
        self.calibration.update(confidence.cpu().clamp(max=1), correct.cpu())

    def result(self, model: str, convention: str) -> Evaluation:
        """What came of it."""
        accuracy = self.right / self.labelled if self.labelled else math.nan
        methods: list[MethodResult | StreamedMethodResult] = [
            StreamedMethodResult(model, score, accuracy, metric)
            for score, metric in self.metrics.items()
        ]
        for score, sets in self.kept.items():
            arrays = {name: _to_numpy(torch.cat(parts)) for name, parts in sets.items()}
            inside = arrays.pop(ID)
            methods.append(MethodResult(model, score, accuracy, inside, arrays, convention))
        reliability = {}
        if self.calibration is not None:
            reliability[model] = self.calibration.calibration_bins()
        notes = []
        if self.without_accuracy is not None:
            notes.append(f"accuracy is left out: {self.without_accuracy}.")
        if self.absent is not None:
            notes.append(
                f"column {self.absent} of the logits is the absent class's; no score but "
                "absent-class counts it."
            )
        return Evaluation(
            methods, self._grouped(model), reliability, notes={printable(model): notes}
        )

    def _grouped(self, model: str) -> list[GroupOthers]:
        if self.groups is None or not self.others:
            return []
        kinds = [OWN, OTHER] if OWN in self.others else [ID]
        members = torch.split(self.groups.classes, self.groups.sizes.tolist())
        return [
            GroupOthers(
                name=model,
                groups=[classes.tolist() for classes in members],
                names=list(self.groups.names),
                others={kind: self.others[kind].values() for kind in [*kinds, *self.ood_sets]},
                min_others={name: mean.values()[0] for name, mean in self.least.items()},
            )
        ]


class _Mean:
    """Weighted mean of rows, column by column."""

    def __init__(self) -> None:
        self.total = self.weight = torch.zeros(())

    def add(self, rows: Tensor, weight: Tensor) -> None:
        self.total = self.total + (rows * weight).sum(0).cpu()
        self.weight = self.weight + weight.sum(0).cpu()

    def values(self) -> list[float]:
        return (self.total / self.weight).tolist()
