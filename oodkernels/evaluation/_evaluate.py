"""Evaluation of detectors: every score of every data set in one pass, and what came of it.

Needs the extra ``metrics`` where scores are streamed or the ID set has labels.
"""

from __future__ import annotations

import inspect
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._extension import build_info
from oodkernels._files import write_text
from oodkernels.data.samples import Samples
from oodkernels.detectors import DETECTORS, AbsentClass, OODDetector
from oodkernels.detectors.base import Batch, _score_all
from oodkernels.detectors.model import Model, run
from oodkernels.evaluation import tables
from oodkernels.evaluation.tables import AVERAGE, METRICS, Row
from oodkernels.groups import Groups
from oodkernels.metrics.ood import CONVENTIONS, OODResults, ood_metrics
from oodkernels.ops import mos_log_others

if TYPE_CHECKING:
    from oodkernels.metrics import CalibrationBins
    from oodkernels.metrics.streaming import CalibrationError, OODMetrics
    from oodkernels.metrics.streaming.ood import ScoreLevels

Array: TypeAlias = NDArray[Any]
Detectors: TypeAlias = Mapping[str, OODDetector | str] | Sequence[OODDetector | str]

__all__ = ["Evaluation", "GroupOthers", "Method", "StreamedMethod", "Sweep", "evaluate"]

DEFAULT_DETECTORS = ("msp", "max-logit", "energy")
GIVEN = "score"
OWN, OTHER = "ID, own group", "ID, other groups"
ID = "ID"


class Levels(NamedTuple):
    """Distinct scores, ascending, and how many of either side have each."""

    values: Array
    n_id: Array
    n_ood: Array


@dataclass(frozen=True, eq=False)
class Method:
    """Scores of one detector on every test set.

    Attributes:
        model: Name of the model that gave the scores.
        score: Name of the score.
        id_accuracy: Share of ID test samples that the model classifies right; NaN if not known.
        id_scores: (N,) higher = more ID.
        ood_scores: OOD set -> (M,) scores.
        convention: Of :func:`oodkernels.ood_metrics`.
    """

    model: str
    score: str
    id_accuracy: float
    id_scores: Array
    ood_scores: Mapping[str, Array]
    convention: str = "default"

    @property
    def name(self) -> str:
        """Model and score in one label."""
        return f"{self.model}: {self.score}"

    @cached_property
    def results(self) -> OODResults:
        """OOD set -> metrics."""
        return ood_metrics(self.id_scores, self.ood_scores, convention=self.convention)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """OOD set -> figure -> value, the average last."""
        per_set = {name: result.as_dict() for name, result in self.results.items()}
        return {**per_set, AVERAGE: self.results.average}

    @property
    def sizes(self) -> tuple[int, dict[str, int]]:
        """Number of ID scores, and of those of each OOD set."""
        return len(self.id_scores), {name: len(s) for name, s in self.ood_scores.items()}

    @property
    def threshold(self) -> float:
        """The largest score at or above which lie at least 95 % of the ID scores."""
        return next(iter(self.results.values())).threshold

    def levels(self, ood_set: str) -> Levels:
        """The scores as they are counted in histograms and ROC curves."""
        inside, outside = np.asarray(self.id_scores), np.asarray(self.ood_scores[ood_set])
        values, place = np.unique(np.concatenate((inside, outside)), return_inverse=True)
        n_id = np.bincount(place[: len(inside)], minlength=len(values))
        return Levels(values, n_id, np.bincount(place[len(inside) :], minlength=len(values)))


@dataclass(frozen=True, eq=False)
class StreamedMethod:
    """What a metric of fixed size knows of one detector's scores; reads like :class:`Method`.

    ``figures`` have ``..._lower`` and ``..._upper`` beside each, between which the figure of the
    whole stream lies.
    """

    model: str
    score: str
    id_accuracy: float
    metric: OODMetrics
    convention: str = "default"

    @property
    def name(self) -> str:
        """Model and score in one label."""
        return f"{self.model}: {self.score}"

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """OOD set -> figure -> value, the average last."""
        result: dict[str, dict[str, float]] = self.metric.compute()
        return result

    @property
    def sizes(self) -> tuple[int, dict[str, int]]:
        """Number of ID scores, and of those of each OOD set."""
        sets = {name: f for name, f in self.figures.items() if name != AVERAGE}
        n_id = int(next(iter(sets.values()))["n_id"])
        return n_id, {name: int(values["n_ood"]) for name, values in sets.items()}

    @property
    def threshold(self) -> float:
        """The largest score at or above which lie at least 95 % of the ID scores."""
        return next(iter(self.figures.values()))["threshold"]

    def levels(self, ood_set: str) -> Levels:
        """The bins of the scores, by their lower ends."""
        return Levels(*self._levels[ood_set])

    @cached_property
    def _levels(self) -> dict[str, ScoreLevels]:
        return self.metric.levels()


@dataclass(frozen=True)
class GroupOthers:
    """What a MOS model's "others" say about each test set.

    Attributes:
        name: Name of the model.
        groups: Per group, the classes in it.
        names: Of the groups.
        others: Kind of sample -> mean p_others per group. The kinds are the ID samples of the
            group's own classes, the other ID samples (all of them as one where labels are not
            known), and each OOD set.
        min_others: Test set -> mean over its samples of the least p_others, the negated MOS score.
    """

    name: str
    groups: list[list[int]]
    names: list[str]
    others: dict[str, list[float]]
    min_others: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """How a figure depends on something: the papers' curves of FPR95 over the number of classes.

    Attributes:
        series: Method -> points (x, fraction); several at one x are drawn as their mean, and the
            band of one standard deviation around it.
        x: What is varied.
        y: What is measured.
    """

    series: dict[str, list[tuple[float, float]]]
    x: str = "number of classes"
    y: str = "FPR95"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` found; prints the table of results.

    Attributes:
        methods: Every detector's scores, exact or in bounded memory.
        others: The MOS models' "others".
        reliability: Model -> its answers on ID samples by confidence, where labels are known.
        sweep: For the report; None for none.
    """

    methods: list[Method | StreamedMethod]
    others: list[GroupOthers] = field(default_factory=list)
    reliability: dict[str, CalibrationBins] = field(default_factory=dict)
    sweep: Sweep | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """The table of results: per method one row for each OOD set, then their average."""
        rows = []
        for method in self.methods:
            n_id, sizes = method.sizes
            sizes[AVERAGE] = sum(sizes.values())
            rows += [
                Row(
                    ood_set=name,
                    model=method.model,
                    score=method.score,
                    id_accuracy=method.id_accuracy,
                    n_id=n_id,
                    n_ood=sizes[name],
                    **{metric: values[metric] for metric in METRICS},
                )
                for name, values in method.figures.items()
            ]
        return rows

    @property
    def convention(self) -> dict[str, str]:
        """What the figures mean, in words."""
        name = self.methods[0].convention
        return CONVENTION if name == "default" else {"name": name, **_words(name)}

    @property
    def uncertainty(self) -> float:
        """Largest half-width of the bounds of a figure in ``rows``; 0 where all are exact."""
        return max(
            (values.get(f"{m}_upper", 0) - values.get(f"{m}_lower", 0)) / 2
            for method in self.methods
            for values in method.figures.values()
            for m in METRICS
        )

    def to_csv(self) -> str:
        """As :func:`oodkernels.evaluation.to_csv`."""
        return tables.to_csv(self.rows)

    def to_markdown(self) -> str:
        """As :func:`oodkernels.evaluation.to_markdown`."""
        return tables.to_markdown(self.rows)

    def to_latex(self) -> str:
        """As :func:`oodkernels.evaluation.to_latex`."""
        return tables.to_latex(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """All figures with what they mean, as JSON has it: None for NaN."""
        record = {
            "convention": self.convention,
            "results": [row._asdict() for row in self.rows],
            "figures": {method.name: method.figures for method in self.methods},
            "thresholds": {method.name: method.threshold for method in self.methods},
            "reliability": {
                model: {"ece": bins.ece, "mce": bins.mce}
                | {f.name: getattr(bins, f.name).tolist() for f in fields(bins)}
                for model, bins in self.reliability.items()
            },
            "grouped_models": [asdict(model) for model in self.others],
            "sweep": None if self.sweep is None else asdict(self.sweep),
            "software": software(),
        }
        return {"format": "oodkernels.evaluation", "version": 1, **_without_nan(record)}

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(self, title: str = "Out-of-distribution detection") -> str:
        """A report that needs no other file; needs the extra ``demo``."""
        from oodkernels.evaluation.report import to_html

        return to_html(self, title)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``results.csv``, ``.json``, ``.md`` and ``.tex``, and ``report.html``.

        Each file appears under its name only when it is complete. The folder is made where it is
        missing. Needs the extra ``demo`` for the report.

        Returns:
            The paths, in that order.

        Raises:
            OSError: The folder or a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "results.csv": self.to_csv(),
            "results.json": self.to_json(),
            "results.md": self.to_markdown() + "\n",
            "results.tex": self.to_latex() + "\n",
            "report.html": self.to_html(),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return [folder / name for name in texts]

    def __str__(self) -> str:
        return self.to_markdown()


CONVENTION = {
    "name": "default",
    "scores": "higher = more in-distribution (ID)",
    "positive": "ID",
    "fpr95": "share of OOD kept at the largest threshold t with TPR(score >= t) >= 0.95, "
    "from exact counts; OOD scores equal to t count as kept",
    "auroc": "probability that an ID score exceeds an OOD score, ties counted half",
    "aupr_in": "average precision with ID as positive, tied scores grouped",
    "aupr_out": "average precision with OOD as positive and the scores negated",
    "average": "unweighted mean over the OOD sets",
}


def _words(name: str) -> dict[str, str]:
    rule = CONVENTIONS[name]
    return {
        "scores": CONVENTION["scores"],
        "positive": rule.positive.upper(),
        "fpr95": f"by the rule of {rule.source}",
        "auroc": CONVENTION["auroc"],
        "aupr_in": f"{rule.aupr}, ID as positive",
        "aupr_out": f"{rule.aupr}, OOD as positive",
        "average": CONVENTION["average"],
    }


def software(*packages: str) -> dict[str, Any]:
    """What numbers depend on: versions, and how the kernels were built."""
    build = build_info()
    del build["threads"]  # results are the same on any number of them
    found = {}
    for name in ("numpy", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "oodkernels": build.pop("version"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        **found,
        **build,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# --- evaluating -------------------------------------------------------------------------------


def evaluate(
    model_or_scores: Model | Mapping[str, tuple[Any, Mapping[str, Any]]] | Iterable[Method] | None,
    id_loader: Iterable[Any] | Tensor | None = None,
    ood_loaders: Mapping[str, Iterable[Any] | Tensor] | None = None,
    detectors: Detectors | None = None,
    *,
    groups: Groups | None = None,
    model_name: str = "model",
    memory: int | str | None = None,
    convention: str = "default",
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
            name -> (ID scores, {OOD set: scores}), or :class:`Method` objects.
        id_loader: Batches of ID samples: x, (x, labels), and without a model logits, (logits,
            labels) or dicts as :class:`oodkernels.data.Samples` yields them. With a model that is
            a head, dicts with features. Or one tensor instead of batches. Labels are class ids, for
            accuracy and reliability.
        ood_loaders: OOD set -> the same; labels are not looked at.
        detectors: Detectors by name, or in a list: fitted ones where fitting is needed, or keys of
            ``DETECTORS``. By default MSP, max logit and energy. Scores that batches hold, under
            any other name than "logits", "features" and "labels", come beside them.
        groups: Of a MOS head; by default those of the first detector that has them.
        model_name: Name of the model in the table.
        memory: Size of the metrics' state for each detector, as in "16MiB": see
            :class:`oodkernels.OODMetrics`. By default scores are kept, and all figures exact.
        convention: Of :func:`oodkernels.ood_metrics`; with ``memory`` only the default.
        on_batch: Told the data set and the number of its samples done, "ID" for the ID set.

    Returns:
        An :class:`Evaluation`.

    Raises:
        ValueError: A set has no samples, an OOD set a name that is not allowed, a score is NaN
            (with set, sample and where the NaN comes from), a label is no class id, or a detector
            is unknown, not fitted, or needs what the batches do not have.
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
    chosen = None if detectors is None else as_detectors(detectors, groups, model)
    found = _Run(model, chosen, groups, memory, list(ood_loaders))
    for name, loader in {ID: id_loader, **ood_loaders}.items():
        found.take(name, loader, on_batch)
    return found.result(model_name, convention)


def as_detectors(
    detectors: Detectors, groups: Groups | None = None, model: Model | None = None
) -> dict[str, OODDetector]:
    """Detectors by name, made where only their name is given.

    Args:
        detectors: As for :func:`evaluate`.
        groups: For those that are made.
        model: For those that are made.

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
                f"evaluate: two detectors are called {label!r}: give them names of their own, as "
                "in {'name': detector}"
            )
        if isinstance(detector, str):
            detector = _make(detector, groups=groups, model=model)
        found[label] = detector
        if not isinstance(found[label], OODDetector):
            raise TypeError(
                "evaluate: detectors must be detectors or names of some, got "
                f"{type(detector).__name__}"
            )
    return found


def _make(name: str, **settings: Any) -> OODDetector:
    if name not in DETECTORS:
        raise ValueError(
            f"evaluate: there is no detector {name!r}, only {', '.join(sorted(DETECTORS))}"
        )
    parameters = inspect.signature(DETECTORS[name]).parameters
    given = {k: v for k, v in settings.items() if v is not None and k in parameters}
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in given:
            raise ValueError(f"evaluate: detector {name!r} needs {parameter.name}")
    return DETECTORS[name](**given)


def combine(*evaluations: Evaluation) -> Evaluation:
    """Evaluations of several models on the same sets as one."""
    return Evaluation(
        [method for e in evaluations for method in e.methods],
        [others for e in evaluations for others in e.others],
        {model: bins for e in evaluations for model, bins in e.reliability.items()},
    )


def _of_scores(given: Any, model_name: str, convention: str) -> Evaluation:
    if isinstance(given, Mapping):
        methods: list[Any] = []
        for name, (id_scores, ood_scores) in given.items():
            sets = {ood: _to_numpy(scores) for ood, scores in ood_scores.items()}
            inside = _to_numpy(id_scores)
            methods.append(Method(model_name, name, math.nan, inside, sets, convention))
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


@dataclass(frozen=True, eq=False)
class Part:
    """A batch of a data set.

    Attributes:
        batch: As detectors read it.
        labels: (N,) class ids.
        scores: Name -> (N,) scores that were there already.
    """

    batch: Batch
    labels: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.scores.values()), self.batch))


def read_parts(
    model: Model | None, data: Iterable[Any] | Tensor, layers: Sequence[str] = ()
) -> Iterator[Part]:
    """A data set's batches as detectors read them, sent through the model where there is one.

    Args:
        model: As for :func:`evaluate`.
        data: As for :func:`evaluate`.
        layers: Whose outputs are wanted.

    Raises:
        TypeError: A batch is not of a form that :func:`evaluate` takes.
    """
    for item in [data] if isinstance(data, Tensor) else data:
        x, labels = item, None
        if isinstance(item, Mapping):
            scores = dict(item)
            logits, x, labels = (scores.pop(key, None) for key in ("logits", "features", "labels"))
            if model is None and (scores or logits is not None or x is not None):
                if "scores" in scores:
                    scores[GIVEN] = scores.pop("scores")
                yield Part(Batch(logits=logits, features=x), labels, scores)
                continue
        elif isinstance(item, (tuple, list)) and len(item) >= 2:
            x, labels = item[:2]
        if not isinstance(x, Tensor):
            raise TypeError(
                "evaluate: a batch must be a tensor, (tensor, labels) or a dict with "
                + ("logits, features or scores" if model is None else "features")
                + f", got {type(item).__name__}"
            )
        if model is None:
            yield Part(Batch(logits=x), labels)
            continue
        with torch.no_grad():
            found = run(model, x, layers)
        yield Part(Batch(x, found.logits, found.features, found.layers, found.confidence), labels)


def score_part(
    detectors: Mapping[str, OODDetector], part: Part, where: str, start: int = 0
) -> dict[str, Tensor]:
    """Every detector's scores of a batch on the CPU, with those that it brought itself.

    Args:
        detectors: By any name.
        part: The batch.
        where: Data set, for messages.
        start: Number of the batch's first sample in it.

    Raises:
        ValueError: A score is NaN; the message says of which sample, and where it comes from.
    """
    scores = _score_all("evaluate", detectors, part.batch, None) if detectors else {}
    scores |= part.scores
    for name, values in scores.items():
        nan = values.isnan()
        if bool(nan.any()):
            row = int(nan.nonzero()[0])
            raise ValueError(f"{where}: sample {start + row}: {_source_of_nan(part, row, name)}")
    return {name: values.detach().cpu() for name, values in scores.items()}


def _source_of_nan(part: Part, row: int, score: str) -> str:
    for kind in ("logits", "features"):
        tensor = getattr(part.batch, kind)
        if tensor is not None and bool((nan := tensor[row].isnan()).any()):
            return f"{kind} must not be NaN, got NaN in column {int(nan.nonzero()[0])}"
    if score in part.scores:
        return f"{score} must not be NaN, got NaN"
    return f"{score} gives NaN"


class _Run:
    """Scores as they come in."""

    def __init__(
        self,
        model: Model | None,
        detectors: dict[str, OODDetector] | None,
        groups: Groups | None,
        memory: int | str | None,
        ood_sets: list[str],
    ) -> None:
        self.model, self.detectors, self.groups = model, detectors, groups
        self.memory, self.ood_sets = memory, ood_sets
        self.kept: dict[str, dict[str, list[Tensor]]] = {}
        self.metrics: dict[str, OODMetrics] = {}
        self.right = self.labelled = 0
        self.calibration: CalibrationError | None = None
        self.others: dict[str, _Mean] = {}
        self.least: dict[str, _Mean] = {}

    def take(
        self, name: str, loader: Iterable[Any] | Tensor, on_batch: Callable[[str, int], None]
    ) -> None:
        """All of one data set."""
        where = name
        if isinstance(loader, Samples):
            where = loader.name
            loader = self._pruned(loader)
        layers = sorted({layer for d in (self.detectors or {}).values() for layer in d.layers})
        done = 0
        for part in read_parts(self.model, loader, layers):
            if self.detectors is None:
                names = DEFAULT_DETECTORS if part.batch.logits is not None else ()
                self.detectors = as_detectors(names, self.groups)
            scores = score_part(self.detectors, part, where, done)
            if not scores:
                raise ValueError(
                    f"evaluate: {where} has neither logits nor scores: name the detectors that are "
                    "to score the features"
                )
            for score, values in scores.items():
                self._keep(score, name, values)
            if part.batch.logits is not None:
                self._describe(name, part.batch, part.labels if name == ID else None)
            done += len(part)
            on_batch(name, done)
        if not done:
            raise ValueError(f"evaluate: {where} has no samples")

    def _pruned(self, samples: Samples) -> Samples:
        """Without the features that no one would read."""
        used = self.model is not None or any(
            "features" in d.needs for d in (self.detectors or {}).values()
        )
        roles = [role for role in samples.arrays if role != "features" or used]
        return samples.only(*roles) if set(roles) - {"labels"} else samples

    def _keep(self, score: str, name: str, values: Tensor) -> None:
        if self.memory is None:
            self.kept.setdefault(score, {}).setdefault(name, []).append(values)
            return
        if score not in self.metrics:
            from oodkernels.metrics.streaming import OODMetrics

            self.metrics[score] = OODMetrics(memory=self.memory, sets=len(self.ood_sets))
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
            absent = any(isinstance(d, AbsentClass) for d in (self.detectors or {}).values())
            flat = batch.logit_scores(columns=-1 if absent else None)
            confidence, answer = flat.msp, flat.label
            classes = batch.logits.shape[1] - absent
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

            self.calibration = CalibrationError()
        self.calibration.update(confidence.cpu().clamp(max=1), correct.cpu())

    def result(self, model: str, convention: str) -> Evaluation:
        """What came of it."""
        accuracy = self.right / self.labelled if self.labelled else math.nan
        methods: list[Method | StreamedMethod] = [
            StreamedMethod(model, score, accuracy, metric) for score, metric in self.metrics.items()
        ]
        for score, sets in self.kept.items():
            arrays = {name: _to_numpy(torch.cat(parts)) for name, parts in sets.items()}
            inside = arrays.pop(ID)
            methods.append(Method(model, score, accuracy, inside, arrays, convention))
        reliability = {}
        if self.calibration is not None:
            reliability[model] = self.calibration.calibration_bins()
        return Evaluation(methods, self._grouped(model), reliability)

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
