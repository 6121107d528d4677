"""What goes to the terminal, or to where its output is sent: tables, paths, JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from oodkernels.evaluation.tables import Row


def printable(text: str) -> str:
    """Text with what is not UTF-8, as parts of a file's name may be, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_path(path: str | Path, err: bool = False) -> None:
    """A path in a line, byte for byte."""
    typer.echo(os.fsencode(path), err=err)


def print_json(value: Mapping[str, Any]) -> None:
    """JSON on standard output; null for NaN."""
    from oodkernels.evaluation import plain

    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0, lines: bool = False
) -> None:
    """A table on standard output, of which no cell is ever cut.

    Off a terminal it is as wide as it has to be. On one, text is broken, and numbers are not.

    Args:
        headings: One a column; all empty for a table without a head.
        rows: Cells, text or rich's ``Text``.
        numbers: How many of the last columns hold numbers.
        lines: Whether a row whose first cell is not empty has space above it.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD if any(headings) else None,
        show_header=any(headings),
        pad_edge=False,
        padding=(0, 1 if numbers else 2, 0, 0),
    )
    rows = [[printable(c) if isinstance(c, str) else c for c in row] for row in rows]
    for i, heading in enumerate(headings):
        longest = max((len(row[i]) for row in rows), default=0)
        number = i >= len(headings) - numbers
        table.add_column(
            heading,
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
            min_width=min(longest, 12),
        )
    for i, row in enumerate(rows):
        if lines and i and str(row[0]):
            table.add_section()
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    needed = Measurement.get(console, console.options.update(width=1 << 20), table)
    least = needed.minimum if console.is_terminal else needed.maximum
    console.width = max(console.width, least)
    console.print(table)


def print_results(rows: Sequence[Row]) -> None:
    """The table of results, in per cent, the best in bold."""
    from rich.text import Text

    from oodkernels.evaluation.tables import METRIC_NAMES, METRICS, Cell, best, ood_sets

    top = best(rows)
    shown = []
    for ood_set in ood_sets(rows):
        for i, row in enumerate(row for row in rows if row.ood_set == ood_set):
            cells = []
            for metric in ("id_accuracy", *METRICS):
                cell = Cell(value := getattr(row, metric), value == top.get((ood_set, metric)))
                cells.append(Text(cell.percent, "bold green" if cell.best else ""))
            shown.append(["" if i else ood_set, row.model, row.score, *cells])
    headings = ["OOD set", "model", "score", "acc.", *(METRIC_NAMES[m] for m in METRICS)]
    print_table(headings, shown, numbers=1 + len(METRICS), lines=True)
