"""The command line, ``oodk``."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

import oodkernels

if TYPE_CHECKING:
    from oodkernels.evaluation import Row

app = typer.Typer(
    name="oodk",
    help="Out-of-distribution detection: fast, exact kernels and what is needed around them.",
    epilog="Start with: oodk demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"oodkernels {oodkernels.build_info()['version']}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder for results.csv, results.json and report.html; made where missing, "
            "files of these names are replaced.",
        ),
    ] = Path("oodk-demo"),
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help="Sets the train/test split, initial weights, order of images and random groups. "
            "The same seed gives the same numbers.",
        ),
    ] = 0,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training images, for each model.")
    ] = 20,
    groups: Annotated[
        int, typer.Option(min=2, max=10, help="Groups into which MOS divides the ten digits.")
    ] = 3,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress, no table: only the paths, one a line."),
    ] = False,
) -> None:
    """Train, evaluate and report on small real images: under a minute, nothing to download.

    A small network learns scikit-learn's handwritten digits three times: with a flat softmax, and
    with MOS on random groups of digits and on groups found by clustering features. Then each
    score (MSP, max logit, energy, MOS) has to tell digits from faces, textures and photos.

    FPR95 is the share of those still taken for digits when 95 % of the digits are accepted: lower
    is better. AUROC and AUPR: higher is better. The HTML report shows the score distributions, ROC
    curves and MOS's "others" probabilities.
    """
    try:
        _demo(out, seed, epochs, groups, quiet)
    except KeyboardInterrupt:
        typer.echo("oodk: interrupted", err=True)
        raise typer.Exit(130) from None


def _demo(out: Path, seed: int, epochs: int, groups: int, quiet: bool) -> None:
    # Not at the top, so that `oodk info` needs neither scikit-learn nor matplotlib.
    from oodkernels.demo import STAGES, Settings, run
    from oodkernels.report import write_report
    from oodkernels.training import TrainConfig

    _require_writable(out)
    start = time.perf_counter()
    recipe = TrainConfig(epochs=epochs, accelerator="cpu")
    settings = Settings(seed=seed, num_groups=groups, recipe=recipe)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks = {stage: progress.add_task(f"train {stage}", total=epochs) for stage in STAGES}
        writing = progress.add_task("write report", total=1, start=False)
        result = run(settings, lambda stage, epoch: progress.update(tasks[stage], completed=epoch))
        progress.start_task(writing)
        try:
            paths = write_report(result, out)
        except OSError as error:
            progress.stop()
            typer.echo(f"oodk demo: cannot write to {out}: {error.strerror or error}", err=True)
            raise typer.Exit(1) from None
        progress.update(writing, completed=1)

    if not quiet:
        console = Console()
        console.print(_results_table(result.rows))
        console.print(
            "In per cent, the best in bold; FPR95: lower is better. "
            f"Done in {time.perf_counter() - start:.0f} s; written:"
        )
    for path in paths:
        typer.echo(path)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"cannot write to {folder}: {error.strerror or error}", param_hint="'--out'"
        ) from None


def _results_table(rows: Sequence[Row]) -> Table:
    from oodkernels.evaluation import METRICS, best

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("OOD set", "model", "score"):
        table.add_column(heading, no_wrap=True)
    for heading in ("acc.", "FPR95", "AUROC", "AUPR-in", "AUPR-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    top = best(rows)
    for ood_set in dict.fromkeys(row.ood_set for row in rows):
        section = [row for row in rows if row.ood_set == ood_set]
        for i, row in enumerate(section):
            cells = []
            for metric in ("id_accuracy", *METRICS):
                value = getattr(row, metric)
                style = "bold green" if value == top[ood_set, metric] else ""
                cells.append(Text(f"{100 * value:.2f}", style))
            table.add_row(ood_set if i == 0 else "", row.model, row.score, *cells)
        table.add_section()
    return table


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show how this installation was built and what it runs on: paste it into a bug report."""
    facts = {
        **oodkernels.build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(value)
        table.add_row(name.replace("_", " "), str(value or "none"))
    Console().print(table, highlight=False)
