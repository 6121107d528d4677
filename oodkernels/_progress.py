"""The progress bar, on standard error; needs rich."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from oodkernels._optional import require

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress(
    show: bool = True, *, remaining: bool = True, field: str | None = None
) -> Iterator[Progress]:
    """A display of tasks, each with a bar, what is done of what, and times.

    Args:
        show: False: nothing is displayed, and tasks can be added all the same.
        remaining: Whether the time that is left is estimated.
        field: Name of a text that ``add_task`` and ``update`` give, shown at the end of the line.

    Raises:
        ModuleNotFoundError: rich is missing.
    """
    rich = require("rich.progress", "train", "a progress bar")
    console = require("rich.console", "train", "a progress bar").Console(stderr=True)
    columns = [
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        *([rich.TimeRemainingColumn()] if remaining else []),
        *([rich.TextColumn(f"{{task.fields[{field}]}}")] if field is not None else []),
    ]
    with rich.Progress(*columns, console=console, disable=not show) as shown:
        yield shown
