"""The log of a run: its rows, the means in them, and the CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oodkernels._files import write_text

Row = dict[str, float]


class Log:
    """The rows so far, and the figures of the steps since.

    Args:
        path: Of the CSV file; None: none.
        write: Whether this process writes it.
    """

    def __init__(self, path: Path | None, write: bool) -> None:
        self.path = path if write else None
        self.rows: list[Row] = []
        self._names: list[str] = []
        self._sums: Row = {}
        self._steps = 0

    def step(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def add(self, before: Mapping[str, float], after: Mapping[str, float]) -> Row:
        """Add a row: the means of the steps since the last one, between other figures."""
        means = {name: value / self._steps for name, value in self._sums.items()}
        row = {**before, **means, **after}
        self._sums, self._steps = {}, 0
        if not self.rows or row.keys() - set(self._names):
            self._restore([*self.rows, row])
        else:
            self.rows.append(row)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    file.write(self._text([row], header=False))
        return row

    def state_dict(self) -> dict[str, Any]:
        """All there is, for a checkpoint."""
        return {"rows": self.rows, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, the file included."""
        self._sums, self._steps = state["sums"], state["steps"]
        self._restore(state["rows"])

    def _restore(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        if self.path is not None:
            write_text(self.path, self._text(self.rows, header=True))

    def _text(self, rows: Sequence[Row], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._names, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
