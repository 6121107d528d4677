"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from oodkernels.evaluation.tables import METRICS, Cell, Row, best, ood_sets


def results_table(rows: Sequence[Row]) -> Table:
    """The table of results for a terminal, in per cent, the best in bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("OOD set", "model", "score"):
        table.add_column(heading, no_wrap=True)
    for heading in ("acc.", "FPR95", "AUROC", "AUPR-in", "AUPR-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    top = best(rows)
    for ood_set in ood_sets(rows):
        section = [row for row in rows if row.ood_set == ood_set]
        for i, row in enumerate(section):
            cells = []
            for metric in ("id_accuracy", *METRICS):
                cell = Cell(value := getattr(row, metric), value == top.get((ood_set, metric)))
                cells.append(Text(cell.percent, "bold green" if cell.best else ""))
            table.add_row(ood_set if i == 0 else "", row.model, row.score, *cells)
        table.add_section()
    return table
