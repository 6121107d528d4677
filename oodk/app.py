"""The commands under one roof."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from oodk import (
    _benchmark,
    _bundle,
    _compare,
    _convert,
    _demo,
    _evaluate,
    _extract,
    _group,
    _train,
    _tune,
)
from oodk._command import Command, Group

__all__ = ["app"]

app = typer.Typer(
    name="oodk",
    cls=Group,
    help="Out-of-distribution detection: fast, exact kernels and what is needed around them.\n\n"
    "A run, from images to a report:\n\n"
    "* `oodk extract` sends images through a model, once;\n"
    "* `oodk group`, `oodk train` make a MOS head on the features in seconds;\n"
    "* `oodk benchmark` runs one of the field's benchmarks from images to tables;\n"
    "* `oodk eval` compares detectors, `oodk score` and `oodk threshold` put one to work;\n"
    "* `oodk bundle` puts all of it into one folder for production.",
    epilog="Start with: oodk demo. Each command has examples: oodk eval --help",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        spec = find_spec("oodkernels")
        folder = Path(str(spec and spec.origin)).parent
        found = runpy.run_path(str(folder / "_version.py"))
        typer.echo(f"oodkernels {found['__version__']}")
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


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": _demo.demo,
    "extract": _extract.extract,
    "train": _train.train,
    "tune": _tune.tune,
    "eval": _evaluate.evaluate,
    "benchmark": _benchmark.benchmark,
    "compare": _compare.compare,
    "score": _evaluate.score,
    "threshold": _evaluate.threshold,
    "bundle": _bundle.bundle,
    "info": _demo.info,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(_group.app, name="group")
app.add_typer(_convert.app, name="convert")
