"""The command line, ``oodk``."""

from __future__ import annotations

from typing import Annotated

import typer

import oodkernels
from oodkernels.cli import _convert, _demo, _evaluate, _extract, _group, _train
from oodkernels.cli._common import Group

__all__ = ["app"]

app = typer.Typer(
    name="oodk",
    cls=Group,
    help="Out-of-distribution detection: fast, exact kernels and what is needed around them.\n\n"
    "A run, from images to a report:\n\n"
    "* `oodk extract` sends images through a model, once;\n"
    "* `oodk group`, `oodk train` make a MOS head on the features in seconds;\n"
    "* `oodk eval` compares detectors, `oodk score` and `oodk threshold` put one to work.",
    epilog="Start with: oodk demo. Each command has examples: oodk eval --help",
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


app.command()(_demo.demo)
app.command()(_extract.extract)
app.add_typer(_group.app, name="group")
app.command()(_train.train)
app.command("eval")(_evaluate.evaluate)
app.command()(_evaluate.score)
app.command()(_evaluate.threshold)
app.add_typer(_convert.app, name="convert")
app.command()(_demo.info)
