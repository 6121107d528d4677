"""What came of a benchmark: figures of every detector on every set, averages, identity, report."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkernels.evaluation import tables
from oodkernels.evaluation.benchmarks.definition import OOD_KINDS
from oodkernels.evaluation.benchmarks.run import BenchmarkRun
from oodkernels.evaluation.methods import MethodResult, StreamedMethodResult
from oodkernels.evaluation.results import Evaluation, plain, write_results
from oodkernels.metrics.comparison import ComparisonResult, compare_detectors
from oodkernels.metrics.ood import ood_metrics

__all__ = ["FIGURES", "BenchmarkResult", "BenchmarkRow"]

FIGURES = ("fpr95", "fpr95_ood", "auroc", "aupr_in", "aupr_out")
STANDARD, FULL = "standard", "full-spectrum"
RESULT_FORMAT = "oodkernels.benchmark.results"
_CHOSEN_ON = "id.val and ood.val"
DRAWN = 8
"""Detectors in the report's pictures."""


class BenchmarkRow(NamedTuple):
    """A line of the table: a detector on an OOD set, or its average over some.

    Attributes:
        ood_set: The set; or "near", "far" or "all" for the unweighted mean over these.
        kind: "near" or "far" of a set, "average" of an average.
        spectrum: "standard", or "full-spectrum" where the covariate-shifted sets are ID too.
        model: Name of the model.
        score: Label of the detector.
        id_accuracy: Share of ID samples classified right; NaN where labels are not known.
        fpr95: Share of OOD kept where at least 95 % of ID are; ID is positive.
        fpr95_ood: Share of ID taken for OOD where 95 % of OOD are found; OOD is positive, as in
            OpenOOD.
        auroc: Probability that an ID score exceeds an OOD score.
        aupr_in: Average precision, ID as positive.
        aupr_out: Average precision, OOD as positive.
        n_id: ID samples.
        n_ood: OOD samples.
    """

    ood_set: str
    kind: str
    spectrum: str
    model: str
    score: str
    id_accuracy: float
    fpr95: float
    fpr95_ood: float
    auroc: float
    aupr_in: float
    aupr_out: float
    n_id: int
    n_ood: int

    @property
    def column(self) -> str:
        """Set and spectrum in one heading."""
        return self.ood_set if self.spectrum == STANDARD else f"{self.ood_set}, {self.spectrum}"


class _Cells(NamedTuple):
    ood_set: str
    model: str
    score: str
    id_accuracy: float
    fpr95: float
    fpr95_ood: float
    auroc: float
    aupr_in: float
    aupr_out: float


@dataclass(frozen=True, eq=False)
class BenchmarkResult:
    """Scores of all detectors on the sets of a benchmark; prints the table of averages.

    Attributes:
        name: Of the benchmark.
        model: Of the model.
        identity: What the figures are of, see :class:`BenchmarkRun`.
        kinds: Test set -> "near", "far" or "shifted".
        id_scores: Detector -> (N,) scores of the ID test set.
        scores: Test set -> detector -> scores.
        correct: "id/test" and shifted sets -> whether each sample is classified right; without
            those that have no labels.
        notes: What was left out or decided, a sentence each.
        files: Detector -> path of its scores in the run's folder, "{set}" in place of the set.
    """

    name: str
    model: str
    identity: Mapping[str, Any]
    kinds: Mapping[str, str]
    id_scores: Mapping[str, Tensor]
    scores: Mapping[str, Mapping[str, Tensor]]
    correct: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: BenchmarkRun, model: str, notes: Sequence[str] = ()) -> BenchmarkResult:
        """What a run has found, after :meth:`BenchmarkRun.score`."""
        kinds = {each.name: each.kind for each in run.benchmark.of("shifted", *OOD_KINDS)}
        correct = {}
        for key in ("id/test", *(f"shifted/{n}" for n, kind in kinds.items() if kind == "shifted")):
            answer = run.predictions(key)
            samples = run.samples[key]
            known = samples.without_accuracy is None and "labels" in samples.arrays
            if answer is not None and known:
                correct[key] = answer == samples.read("labels")
        told = [*notes, *(f"{label} is left out: {why}" for label, why in run.left_out.items())]
        if run.tuning is not None:
            names = ", ".join(run.tuning.settings)
            told.append(f"Settings of {names} are chosen by {run.tuning.by} on {_CHOSEN_ON}.")
        for key, each in run.sets.items():
            gone, bad = len(each.missing), len(run.skipped.get(key, ()))
            if gone or bad:
                told.append(f"{key}: {gone} images are missing and {bad} cannot be read.")
        counts = {key: {"count": run.samples[key].num_samples} for key in run.sets}
        skipped = {
            key: sorted(map(run.sets[key].relative, names)) for key, names in run.skipped.items()
        }
        identity = {
            **run.identity,
            "data": {key: one | counts[key] for key, one in run.identity["data"].items()},
            "detectors": run.settings,
            "skipped": skipped,
        }
        return cls(
            run.benchmark.name,
            model,
            identity,
            kinds,
            run.scores("id/test"),
            {name: run.scores(f"{kind}/{name}") for name, kind in kinds.items()},
            correct,
            told,
            run.files,
        )

    @property
    def ood_sets(self) -> list[str]:
        """Names of the near sets, then of the far ones."""
        return [name for kind in OOD_KINDS for name, k in self.kinds.items() if k == kind]

    @property
    def shifted(self) -> list[str]:
        """Names of the covariate-shifted sets."""
        return [name for name, kind in self.kinds.items() if kind == "shifted"]

    @cached_property
    def rows(self) -> list[BenchmarkRow]:
        """Every detector on every set, each followed by its averages."""
        found = []
        for spectrum in (STANDARD, FULL) if self.shifted else (STANDARD,):
            shifted = self.shifted if spectrum == FULL else []
            accuracy = self._accuracy(shifted)
            for score, own in self.id_scores.items():
                inside = torch.cat([own, *(self.scores[name][score] for name in shifted)])
                outside = {name: self.scores[name][score] for name in self.ood_sets}
                ours = ood_metrics(inside, outside)
                theirs = ood_metrics(inside, outside, convention="openood")
                rows = []
                for name in self.ood_sets:
                    figures = ours[name].as_dict()
                    figures["fpr95_ood"] = theirs[name].as_dict()["fpr95"]
                    rows.append(
                        BenchmarkRow(
                            name,
                            self.kinds[name],
                            spectrum,
                            self.model,
                            score,
                            accuracy,
                            **{figure: figures[figure] for figure in FIGURES},
                            n_id=len(inside),
                            n_ood=len(outside[name]),
                        )
                    )
                found += [*rows, *self._averages(rows)]
        return found

    def _averages(self, rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
        found = []
        for name in ("near", "far", "all"):
            own = [row for row in rows if name in ("all", row.kind)]
            if own:
                means: dict[str, Any] = {
                    f: math.fsum(getattr(r, f) for r in own) / len(own) for f in FIGURES
                }
                total = sum(row.n_ood for row in own)
                found.append(own[0]._replace(ood_set=name, kind="average", n_ood=total, **means))
        return found

    def _accuracy(self, shifted: Sequence[str]) -> float:
        keys = ["id/test", *(f"shifted/{name}" for name in shifted)]
        if any(key not in self.correct for key in keys):
            return math.nan
        right = torch.cat([self.correct[key] for key in keys])
        return float(right.double().mean())

    @cached_property
    def comparison(self) -> ComparisonResult | None:
        """Paired tests of all detectors on all OOD sets; None for a single detector."""
        if len(self.id_scores) < 2:
            return None
        return compare_detectors(
            dict(self.id_scores), {name: dict(self.scores[name]) for name in self.ood_sets}
        )

    def summary(self) -> list[_Cells]:
        """The averages as lines of a table."""
        return _cells([row for row in self.rows if row.kind == "average"])

    def to_csv(self) -> str:
        """One line per detector, spectrum and OOD set or average, in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(BenchmarkRow._fields)
        for row in self.rows:
            cells = ["" if isinstance(c, float) and math.isnan(c) else c for c in row]
            writer.writerow([tables.csv_cell(cell) for cell in cells])
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """The averages, one line per detector in per cent, the best of each column in bold."""
        return tables.to_markdown(self.summary(), FIGURES)

    def to_latex(self) -> str:
        """The same for LaTeX, with ``booktabs``."""
        return tables.to_latex(self.summary(), FIGURES)

    def as_dict(self) -> dict[str, Any]:
        """All figures and what they are of, as JSON has it: None for NaN."""
        compared = self.comparison
        alike = {}
        if compared is not None:
            alike = {
                name: {
                    "auroc": compared.as_good_as_best(name),
                    "fpr95": compared.as_good_as_best(name, "fpr"),
                }
                for name in self.ood_sets
            }
        record = {
            "name": self.name,
            "model": self.model,
            "identity": self.identity,
            "figures": FIGURES_IN_WORDS,
            "results": [row._asdict() for row in self.rows],
            "shifted_accuracy": {
                name: float(self.correct[f"shifted/{name}"].double().mean())
                for name in self.shifted
                if f"shifted/{name}" in self.correct
            },
            "not_told_from_best": alike,
            "notes": list(self.notes),
            "files": self.files,
        }
        return {"format": RESULT_FORMAT, "version": 1, **plain(record)}

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """A report that needs no other file; needs the extra ``cli``."""
        methods: list[MethodResult | StreamedMethodResult] = [
            MethodResult(
                self.model,
                score,
                self._accuracy([]),
                self.id_scores[score].numpy(),
                {name: self.scores[name][score].numpy() for name in self.ood_sets},
            )
            for score in self.best_detectors(DRAWN)
        ]
        notes = {self.model: list(self.notes)}
        rows = self.summary()
        single = _cells([row for row in self.rows if row.kind != "average"])
        compared = self.comparison
        marked = {}
        if compared is not None:
            marked = {name: set(compared.as_good_as_best(name)) for name in self.ood_sets}
        return Evaluation(methods, notes=notes).to_html(
            f"{self.name}: {self.model}",
            "benchmark.html.j2",
            result=self,
            table=tables.lines(rows, FIGURES),
            ood_sets=tables.ood_sets(rows)[:-1],
            average=tables.ood_sets(rows)[-1],
            metric_names={figure: tables.EVERY_NAME[figure] for figure in FIGURES},
            sets=tables.ood_sets(single),
            single=tables.lines(single, ("auroc",)),
            marked=marked,
            meaning=FIGURES_IN_WORDS,
            identity=_flat(self.identity),
        )

    def best_detectors(self, count: int) -> list[str]:
        """Labels of the detectors with the highest AUROC on average over all sets."""
        mean = {
            row.score: row.auroc
            for row in self.rows
            if row.kind == "average" and row.ood_set == "all" and row.spectrum == STANDARD
        }
        return sorted(mean, key=lambda score: -mean[score])[:count]

    def save(self, folder: str | Path, *, report: bool = True) -> list[Path]:
        """Write ``results.csv``, ``.json``, ``.md`` and ``.tex``, and last ``report.html``.

        Args:
            folder: Where to; each file appears under its name when it is complete.
            report: Whether to write the report too, which needs the extra ``cli``.

        Raises:
            OSError: The folder or a file cannot be written.
        """
        return write_results(Path(folder), self, report)

    def __str__(self) -> str:
        return self.to_markdown()


FIGURES_IN_WORDS = {
    "scores": "higher = more in-distribution (ID)",
    "fpr95": "share of OOD kept at the largest threshold that keeps at least 95 % of ID; ID is "
    "positive",
    "fpr95_ood": "share of ID taken for OOD where 95 % of OOD are found, by the rule of OpenOOD; "
    "OOD is positive",
    "auroc": "probability that an ID score exceeds an OOD score, ties counted half",
    "aupr_in": "average precision with ID as positive",
    "aupr_out": "average precision with OOD as positive",
    "near, far, all": "unweighted means over the near, the far, and all OOD sets",
    "full-spectrum": "the covariate-shifted sets count as ID beside the ID test set",
}


def _cells(rows: Sequence[BenchmarkRow]) -> list[_Cells]:
    """Lines of a table, those of a detector together."""
    by_score: dict[str, list[_Cells]] = {}
    for row in rows:
        own = {name: getattr(row, name) for name in _Cells._fields if name != "ood_set"}
        by_score.setdefault(row.score, []).append(_Cells(row.column, **own))
    return [cells for lines in by_score.values() for cells in lines]


def _flat(value: Mapping[str, Any], where: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item and where.count(".") < 1:
            found += _flat(item, f"{where}{key}.")
        elif isinstance(item, Mapping):
            found.append((f"{where}{key}", ", ".join(f"{k} {v}" for k, v in item.items())))
        else:
            shown = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)
            found.append((f"{where}{key}", shown))
    return found
