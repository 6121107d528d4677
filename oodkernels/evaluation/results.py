"""What came of an evaluation, and everything that it is written as."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodkernels._extension import build_info
from oodkernels._files import write_text
from oodkernels._optional import require
from oodkernels.detectors import Tuning
from oodkernels.evaluation import tables
from oodkernels.evaluation.methods import (
    GroupOthers,
    MethodResult,
    StreamedMethodResult,
    Sweep,
)
from oodkernels.evaluation.tables import AVERAGE, METRICS, Row
from oodkernels.metrics.ood import CONVENTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from oodkernels.metrics.calibration import CalibrationBins

__all__ = ["FIGURES_IN_WORDS", "Evaluation", "combine", "plain", "software", "write_texts"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` found; prints the table of results.

    Attributes:
        methods: Every detector's scores, exact or in bounded memory.
        others: The MOS models' "others".
        reliability: Model -> its answers on ID samples by confidence, where labels are known.
        sweep: For the report; None for none.
        tuning: Of the sweep that settings come from, for the report; None for none.
        notes: Model -> what was left out or decided, a sentence each; shown with the table.
    """

    methods: list[MethodResult | StreamedMethodResult]
    others: list[GroupOthers] = field(default_factory=list)
    reliability: dict[str, CalibrationBins] = field(default_factory=dict)
    sweep: Sweep | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    tuning: Tuning | None = None

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

    def flat(self, prefix: str = "ood") -> dict[str, float]:
        """The table with one key a figure, for loggers: "ood/far/auroc".

        With several methods "ood/far/energy/auroc"; with several models the model's name, too.
        :func:`oodkernels.metrics.higher_is_better` says of a key which way is up.

        Args:
            prefix: What keys begin with.
        """
        models = {row.model for row in self.rows}
        scores = {row.score for row in self.rows}
        found: dict[str, float] = {}
        for row in self.rows:
            where = [prefix, row.ood_set]
            where += [row.model] if len(models) > 1 else []
            where += [row.score] if len(scores) > 1 else []
            for metric in METRICS:
                found["/".join([*where, metric])] = getattr(row, metric)
        return found

    @property
    def convention(self) -> dict[str, str]:
        """What the figures mean, in words."""
        name = self.methods[0].convention
        return FIGURES_IN_WORDS if name == "default" else {"name": name, **_words(name)}

    @property
    def remarks(self) -> list[str]:
        """The notes on the models in the table, each with the model's name."""
        models = dict.fromkeys(method.model for method in self.methods)
        found = [f"{model}: {note}" for model in models for note in self.notes.get(model, [])]
        if self.tuning is not None:
            names = [name for name in self.tuning.detectors if name in self._scores]
            if names:
                found.append(
                    f"settings of {', '.join(names)} were chosen by {self.tuning.by} on "
                    f"{self.tuning.chosen_on}."
                )
        return found

    @property
    def _scores(self) -> set[str]:
        return {method.score for method in self.methods}

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
        """Write CSV, see :func:`oodkernels.evaluation.to_csv`."""
        return tables.to_csv(self.rows)

    def to_markdown(self) -> str:
        """Write Markdown, see :func:`oodkernels.evaluation.to_markdown`."""
        return tables.to_markdown(self.rows)

    def to_latex(self) -> str:
        """Write LaTeX, see :func:`oodkernels.evaluation.to_latex`."""
        return tables.to_latex(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """All figures with what they mean, as JSON has it: None for NaN."""
        record = {
            "convention": self.convention,
            "results": [row._asdict() for row in self.rows],
            "notes": self.remarks,
            "figures": {method.name: method.figures for method in self.methods},
            "thresholds": {method.name: method.threshold for method in self.methods},
            "reliability": {
                model: {"ece": bins.ece, "mce": bins.mce}
                | {f.name: getattr(bins, f.name).tolist() for f in fields(bins)}
                for model, bins in self.reliability.items()
            },
            "grouped_models": [asdict(model) for model in self.others],
            "sweep": None if self.sweep is None else asdict(self.sweep),
            "tuning": None if self.tuning is None else json.loads(self.tuning.to_json()),
            "software": software(),
        }
        return {"format": "oodkernels.evaluation", "version": 1, **plain(record)}

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(
        self,
        title: str = "Out-of-distribution detection",
        template: str = "report.html.j2",
        draw: Callable[[Evaluation], dict[str, Figure]] | None = None,
        **more: Any,
    ) -> str:
        """A report that needs no other file; needs the extra ``cli``.

        Args:
            title: Heading of the page.
            template: A file in ``templates``.
            draw: Makes the pictures; :func:`oodkernels.evaluation.report.figures` by default.
            **more: What that file shows beside the evaluation.

        Raises:
            ModuleNotFoundError: jinja2 or matplotlib is missing.
        """
        for package in ("jinja2", "matplotlib"):
            require(package, "cli", "Evaluation.to_html")
        from oodkernels.evaluation import report

        facts = {
            "evaluation": self,
            "ood_sets": tables.ood_sets(self.rows)[:-1],
            "sizes": {row.ood_set: row.n_ood for row in self.rows},
            "table": tables.lines(self.rows),
            "average": AVERAGE,
            "metric_names": tables.METRIC_NAMES,
            "software": software("matplotlib"),
        }
        drawn = partial(draw or report.figures, self)
        return report.render(template, drawn, {"title": title, **facts, **more})

    def save(self, folder: str | Path, *, report: bool = True) -> list[Path]:
        """Write ``results.csv``, ``.json``, ``.md`` and ``.tex``, and last ``report.html``.

        Each file appears under its name only when it is complete, as soon as it is: a report that
        cannot be made leaves the results. The folder is made where it is missing.

        Args:
            folder: Where to.
            report: Whether to write the report too, which needs the extra ``cli``.

        Returns:
            The paths, in that order.

        Raises:
            OSError: The folder or a file cannot be written.
            ModuleNotFoundError: As :meth:`to_html`.
        """
        return write_results(Path(folder), self, report)

    def __str__(self) -> str:
        return self.to_markdown()


FIGURES_IN_WORDS = {
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
        "scores": FIGURES_IN_WORDS["scores"],
        "positive": rule.positive.upper(),
        "fpr95": f"by the rule of {rule.source}",
        "auroc": FIGURES_IN_WORDS["auroc"],
        "aupr_in": f"{rule.aupr}, ID as positive",
        "aupr_out": f"{rule.aupr}, OOD as positive",
        "average": FIGURES_IN_WORDS["average"],
    }


def write_results(folder: Path, result: Any, report: bool) -> list[Path]:
    """Write an evaluation, or what has its ``to_csv`` and the like, in every form."""
    writers: dict[str, Callable[[], str]] = {
        "results.csv": result.to_csv,
        "results.json": result.to_json,
        "results.md": lambda: result.to_markdown() + "\n",
        "results.tex": lambda: result.to_latex() + "\n",
    }
    if report:
        writers["report.html"] = result.to_html
    return write_texts(folder, writers)


def write_texts(folder: Path, writers: Mapping[str, Callable[[], str]]) -> list[Path]:
    """Write files in this order, each made when its turn comes; gives their paths.

    Raises:
        OSError: The folder or a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
        write_text(folder / name, write())
    return [folder / name for name in writers]


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


def plain(value: Any) -> Any:
    """A value as JSON has it: None for NaN, "inf" and "-inf" for infinities."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def combine(*evaluations: Evaluation) -> Evaluation:
    """Evaluations of several models on the same sets as one."""
    return Evaluation(
        [method for e in evaluations for method in e.methods],
        [others for e in evaluations for others in e.others],
        {model: bins for e in evaluations for model, bins in e.reliability.items()},
        next((e.sweep for e in evaluations if e.sweep is not None), None),
        {model: notes for e in evaluations for model, notes in e.notes.items()},
        next((e.tuning for e in evaluations if e.tuning is not None), None),
    )
