"""The table of results that papers print, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

AVERAGE = "average"
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
METRIC_NAMES = {"fpr95": "FPR95", "auroc": "AUROC", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
LOWER_IS_BETTER = frozenset({"fpr95"})


class Row(NamedTuple):
    """One line of a results table: one method on one OOD set, or its average over them.

    ``id_accuracy`` is NaN where it is not known.
    """

    ood_set: str
    model: str
    score: str
    id_accuracy: float
    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float
    n_id: int
    n_ood: int


class Cell(NamedTuple):
    """A fraction in a table, and whether it is the best of its column."""

    value: float
    best: bool

    @property
    def percent(self) -> str:
        """In per cent, a dash where there is no value."""
        return "-" if math.isnan(self.value) else f"{100 * self.value:.2f}"


class Line(NamedTuple):
    """A method in the papers' table: accuracy, then every metric on every set."""

    model: str
    score: str
    accuracy: Cell
    cells: list[Cell]


def best(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(OOD set, metric) -> best value over the methods; the smallest for FPR95, else the largest.

    For ``id_accuracy`` too. Where all methods are equal, none is the best.
    """
    values: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        for metric in ("id_accuracy", *METRICS):
            value = getattr(row, metric)
            if not math.isnan(value):
                values.setdefault((row.ood_set, metric), set()).add(value)
    return {
        key: (min if key[1] in LOWER_IS_BETTER else max)(found)
        for key, found in values.items()
        if len(found) > 1
    }


def ood_sets(rows: Iterable[Row]) -> list[str]:
    """The OOD sets in the order of the table; the average comes last."""
    return list(dict.fromkeys(row.ood_set for row in rows))


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line per method, with a cell for each metric on each of :func:`ood_sets`."""
    top = best(rows)

    def cell(row: Row, metric: str) -> Cell:
        value: float = getattr(row, metric)
        return Cell(value, value == top.get((row.ood_set, metric)))

    found = []
    for (model, score), group in groupby(rows, lambda row: (row.model, row.score)):
        own = list(group)
        cells = [cell(row, metric) for row in own for metric in METRICS]
        found.append(Line(model, score, cell(own[0], "id_accuracy"), cells))
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """One line per method and OOD set, fractions in full precision, empty where not known."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row]
        for row in rows
    )
    return buffer.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """One line per method in per cent, the best of each column in bold."""
    header = ["model", "score", "ID acc. ↑"]
    for name in ood_sets(rows):
        header += [f"{name} {METRIC_NAMES[metric]} {_arrow(metric)}" for metric in METRICS]
    written = [
        [line.model, line.score, *(_bold(cell, "**{}**") for cell in (line.accuracy, *line.cells))]
        for line in lines(rows)
    ]
    table = [header, ["---", "---", *["---:"] * (len(header) - 2)], *written]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table)


def to_latex(rows: Sequence[Row]) -> str:
    """One line per method in per cent, the best of each column in bold; for ``booktabs``."""
    names = ood_sets(rows)
    width = len(METRICS)
    top = [
        rf"\multicolumn{{{width}}}{{c}}{{{_escaped(name)}}}"
        for name in (*names[:-1], names[-1].capitalize())
    ]
    rules = [rf"\cmidrule(lr){{{4 + width * i}-{3 + width * (i + 1)}}}" for i in range(len(names))]
    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    heads = [f"{METRIC_NAMES[metric]} {arrows[_arrow(metric)]}" for metric in METRICS]
    body = []
    model = None
    for line in lines(rows):
        if model not in (None, line.model):
            body.append(r"\midrule")
        shown = "" if line.model == model else _escaped(line.model)
        model = line.model
        cells = [_bold(cell, r"\textbf{{{}}}") for cell in (line.accuracy, *line.cells)]
        body.append(" & ".join([shown, _escaped(line.score), *cells]) + r" \\")
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}; in per cent",
            rf"\begin{{tabular}}{{ll{'r' * (1 + width * len(names))}}}",
            r"\toprule",
            " & ".join(["", "", "", *top]) + r" \\",
            " ".join(rules),
            " & ".join(["Model", "Score", r"ID acc. $\uparrow$", *heads * len(names)]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _arrow(metric: str) -> str:
    return "↓" if metric in LOWER_IS_BETTER else "↑"


def _bold(cell: Cell, form: str) -> str:
    return form.format(cell.percent) if cell.best else cell.percent


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
