"""The table of results that papers print, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

AVERAGE = "average"
METRICS = ("fpr95", "auroc", "aupr_in", "aupr_out")
METRIC_NAMES = {"fpr95": "FPR95", "auroc": "AUROC", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
EVERY_NAME = {**METRIC_NAMES, "fpr95_ood": "FPR95-OOD"}
LOWER_IS_BETTER = frozenset({"fpr95", "fpr95_ood"})


class AnyRow(Protocol):
    """A line of a table, with a metric in each attribute of its name."""

    @property
    def ood_set(self) -> str: ...  # noqa: D102
    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> str: ...  # noqa: D102
    @property
    def id_accuracy(self) -> float: ...  # noqa: D102


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
        """Write in per cent, a dash where there is no value."""
        return "-" if math.isnan(self.value) else f"{100 * self.value:.2f}"


class Line(NamedTuple):
    """A method in the papers' table: accuracy, then every metric on every set."""

    model: str
    score: str
    accuracy: Cell
    cells: list[Cell]


def best(rows: Sequence[AnyRow], metrics: Sequence[str] = METRICS) -> dict[tuple[str, str], float]:
    """(OOD set, metric) -> best value over the methods; the smallest for FPR95, else the largest.

    For ``id_accuracy`` too. Where all methods are equal, none is the best; nor of averages, where
    methods were tried on different sets.
    """
    values: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        for metric in ("id_accuracy", *metrics):
            value = getattr(row, metric)
            if not math.isnan(value):
                values.setdefault((row.ood_set, metric), set()).add(value)
    if len({frozenset(names) for names in _sets(rows).values()}) > 1:
        values = {key: found for key, found in values.items() if key[0] != AVERAGE}
    return {
        key: (min if key[1] in LOWER_IS_BETTER else max)(found)
        for key, found in values.items()
        if len(found) > 1
    }


def _sets(rows: Iterable[AnyRow]) -> dict[tuple[str, str], list[str]]:
    """Model and score -> the sets that it was tried on."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        found.setdefault((row.model, row.score), []).append(row.ood_set)
    return found


def ood_sets(rows: Iterable[AnyRow]) -> list[str]:
    """The OOD sets in the order of the table; the average comes last."""
    return sorted(dict.fromkeys(row.ood_set for row in rows), key=lambda name: name == AVERAGE)


def lines(rows: Sequence[AnyRow], metrics: Sequence[str] = METRICS) -> list[Line]:
    """A line per method, with a cell for each metric on each of :func:`ood_sets`."""
    top = best(rows, metrics)

    def cell(row: AnyRow, metric: str) -> Cell:
        value: float = getattr(row, metric)
        return Cell(value, value == top.get((row.ood_set, metric)))

    found = []
    for (model, score), group in groupby(rows, lambda row: (row.model, row.score)):
        own = {row.ood_set: row for row in group}
        cells = [
            cell(own[name], metric) if name in own else Cell(math.nan, False)
            for name in ood_sets(rows)
            for metric in metrics
        ]
        found.append(Line(model, score, cell(next(iter(own.values())), "id_accuracy"), cells))
    return found


def printable(text: str) -> str:
    """A name as files and terminals take it: a byte that is not UTF-8 as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file: text that spreadsheets take for a formula behind an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def to_csv(rows: Sequence[Row]) -> str:
    """One line per method and OOD set, fractions in full precision, empty where not known."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else csv_cell(cell) for cell in row]
        for row in rows
    )
    return buffer.getvalue()


def to_markdown(rows: Sequence[AnyRow], metrics: Sequence[str] = METRICS) -> str:
    """One line per method in per cent, the best of each column in bold."""
    arrow = {metric: "↓" if metric in LOWER_IS_BETTER else "↑" for metric in metrics}
    header = ["model", "score", "ID acc. ↑"]
    for name in ood_sets(rows):
        header += [f"{_markdown(name)} {EVERY_NAME[m]} {arrow[m]}" for m in metrics]
    table = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    table += _body(rows, _markdown, "**{}**", metrics)
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def to_latex(rows: Sequence[AnyRow], metrics: Sequence[str] = METRICS) -> str:
    """One line per method in per cent, the best of each column in bold; for ``booktabs``."""
    names, width = ood_sets(rows), len(metrics)
    top = [
        rf"\multicolumn{{{width}}}{{c}}{{{name.capitalize() if name == AVERAGE else _latex(name)}}}"
        for name in names
    ]
    rules = [rf"\cmidrule(lr){{{4 + width * i}-{3 + width * (i + 1)}}}" for i in range(len(names))]
    arrow = {True: r"$\downarrow$", False: r"$\uparrow$"}
    heads = [f"{EVERY_NAME[metric]} {arrow[metric in LOWER_IS_BETTER]}" for metric in metrics]
    body = []
    model = None
    for line, (_, score, *cells) in zip(
        lines(rows, metrics), _body(rows, _latex, r"\textbf{{{}}}", metrics), strict=True
    ):
        if model not in (None, line.model):
            body.append(r"\midrule")
        shown = "" if line.model == model else _latex(line.model)
        model = line.model
        body.append(" & ".join([shown, score, *cells]) + r" \\")
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


def _body(
    rows: Sequence[AnyRow], escaped: Callable[[str], str], bold: str, metrics: Sequence[str]
) -> list[list[str]]:
    """The lines of a table as text, for a format with these means."""
    return [
        [
            *(escaped(line.model), escaped(line.score)),
            *(
                bold.format(c.percent) if c.best else c.percent
                for c in (line.accuracy, *line.cells)
            ),
        ]
        for line in lines(rows, metrics)
    ]


def _markdown(text: str) -> str:
    text = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return "".join(_ENTITIES.get(c, c) for c in text)


# As entities, because a backslash does not keep these from being HTML or the end of the row.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": "&#10;", "\r": "&#13;"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # A row that begins with one of these would be read as an argument of the \\ before it.
    **{c: f"{{{c}}}" for c in "[]*"},
    **{c: "\\" + c for c in "&%$#_{}"},
    **dict.fromkeys("\r\n", " "),
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
