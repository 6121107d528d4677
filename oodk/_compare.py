"""``oodk compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._command import step
from oodk._common import ConfigOption, JsonOption, QuietOption, pairs, require_writable_file
from oodk._convert import read_openood
from oodk._output import print_json, print_path, print_table

if TYPE_CHECKING:
    from oodkernels.evaluation.benchmarks import RunComparison
    from oodkernels.evaluation.tables import Row

_AVERAGES = {"nearood": "near", "farood": "far"}
"""OpenOOD's names of averages."""
_SETS = ("near", "far", "all")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...", help="Folders of `oodk benchmark`, two or more."
        ),
    ],
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            "-d",
            metavar="LABEL",
            help="A detector as the runs call it; give it again for more. By default those that "
            "all runs have.",
        ),
    ] = None,
    published: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Results of OpenOOD (`ood.csv`) to stand beside; their samples are not at hand, "
            "so they are in no test.",
        ),
    ] = None,
    mean: Annotated[
        bool,
        typer.Option(
            "--mean",
            help="Mean and standard deviation over the runs, which are replicates: models of "
            "several seeds.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="JSON file for the figures and all pairs' tests."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Put runs of `oodk benchmark` side by side, with paired tests on the same samples.

    Runs that measured on different data are refused: the line says which sets differ. What else
    differs, such as weights or preprocessing, is told. `=` marks what is not told from the best of
    its column, by DeLong's test on AUROCs and Holm's correction over all pairs on all sets.

    **Examples**

        oodk compare runs/r50 runs/vit

        oodk compare a=runs/a b=runs/b -d energy -d knn --published paper=ood.csv

        oodk compare runs/seed0 runs/seed1 runs/seed2 --mean
    """
    from oodkernels.evaluation import plain
    from oodkernels.evaluation.benchmarks import compare_runs, read_finished

    folders = pairs("RUNS", runs, lambda path: path.absolute().name)
    require_writable_file(out)
    with step("compare", ", ".join(folders.values())):
        found = compare_runs([read_finished(p, n) for n, p in folders.items()], detector)
        tables = {
            name: read_openood(Path(path), name)
            for name, path in pairs("--published", published or (), lambda p: p.stem).items()
        }
        record = found.as_dict()
        if mean:
            record["mean"] = {
                ood_set: {figure: found.means(ood_set, figure) for figure in ("auroc", "fpr95")}
                for ood_set in _SETS
            }
    record["published"] = {
        name: [row._asdict() | {"fpr95": None, "fpr95_ood": row.fpr95} for row in rows]
        for name, rows in tables.items()
    }
    if out is not None:
        import json

        from oodkernels._files import write_text

        with step("write", out):
            write_text(out, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")
    if as_json:
        print_json(record)
        return
    if mean:
        _print_means(record["mean"], len(folders))
    else:
        _print_sides(found, tables)
    for text in found.differing:
        typer.echo(f"differs: {text}", err=quiet)
    if out is not None and not quiet:
        print_path(out, err=True)


def _print_sides(found: RunComparison, published: dict[str, list[Row]]) -> None:
    """The averages of each run, and AUROCs with what is not told from the best."""
    figures = ("auroc", "fpr95", "fpr95_ood")
    rows: list[list[Any]] = []
    for detector in found.detectors:
        for i, run in enumerate(found.runs):
            cells = [_percent(run.figure(detector, s, f)) for s in _SETS for f in figures]
            rows.append(["" if i else detector, run.name, *cells])
    for name, table in published.items():
        known = {_AVERAGES.get(row.ood_set, row.ood_set): row for row in table}
        cells = []
        for ood_set in _SETS:
            row = known.get(ood_set)
            cells += ["-"] * 3 if row is None else [_percent(row.auroc), "-", _percent(row.fpr95)]
        rows.append([f"published: {name}", "", *cells])
    names = ("AUROC", "FPR95", "FPR95-OOD")
    headings = ["score", "run", *(f"{s} {name}" for s in _SETS for name in names)]
    print_table(headings, rows, numbers=9, lines=True)
    typer.echo(str(found.paired))


def _print_means(means: dict[str, Any], count: int) -> None:
    scores = list(means["all"]["auroc"])
    rows = []
    for score in scores:
        cells = []
        for ood_set in _SETS:
            for figure in ("auroc", "fpr95"):
                value, spread = means[ood_set][figure].get(score, (float("nan"),) * 2)
                cells.append(f"{_percent(value)} ± {_percent(spread)}")
        rows.append([score, *cells])
    headings = ["score", *(f"{s} {name}" for s in _SETS for name in ("AUROC", "FPR95"))]
    print_table(headings, rows, numbers=6)
    typer.echo(f"Mean and standard deviation over {count} runs, in per cent.")


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"
