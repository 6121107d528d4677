"""``oodk demo`` and ``oodk info``."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodk._command import one_of, step
from oodk._common import JsonOption, QuietOption, require_writable
from oodk._output import print_json, print_path, print_results, print_table

if TYPE_CHECKING:
    from rich.progress import TaskID


def demo(
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder for results.csv, results.json and report.html; made where missing, "
            "files of these names are replaced. The backbone and the features go there too, and a "
            "second run uses the backbone that it finds.",
        ),
    ] = Path("oodk-demo"),
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help="Sets the classes held out, distortions, initial weights, order of images and "
            "random groups. The same seed gives the same numbers.",
        ),
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="200 classes and fewer images, in a minute.")
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            parser=one_of("demo_methods"),
            metavar="NAME",
            help="What to compare the flat softmax with, of {demo_methods}; give it again for "
            "more.  [default: all]",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that train heads; the numbers are the same.")
    ] = 2,
    quiet: QuietOption = False,
) -> None:
    """Train and compare all methods on 1,258 classes of characters: some minutes, no download.

    The fonts that matplotlib ships draw characters of ten blocks of Unicode, distorted, before
    photographs; test images are of faces that training does not see. A small network learns all
    classes flat, and on its features each method trains a head: flat softmax, MOS (with groups by
    block, by features and at random); and with outliers to train on, Outlier Exposure,
    energy-bounded learning, an absent class, NTOM, POEM and DOS. All detectors that read logits and
    features score the flat head. OOD are characters held out of the blocks, other scripts, symbols,
    handwritten digits, photographs and textures.

    Each method tries four settings; which of them counts is decided by other OOD characters, which
    are in no test set.

    FPR95 is the share of OOD still taken for ID when 95 % of ID is accepted: lower is better.
    AUROC and AUPR: higher is better. The table is of the mean over the OOD sets; the HTML report
    shows each, FPR95 against the number of classes, and which characters are taken for which.

    **Examples**

        oodk demo --out oodk-demo

        oodk demo --quick --method "MOS taxonomy" --method DOS --seed 1
    """
    from oodkernels._optional import require
    from oodkernels._progress import progress

    for module in ("jinja2", "matplotlib", "skimage", "sklearn"):
        require(module, "demo", "oodk demo")
    from oodkernels.demo import METHODS, Settings, run
    from oodkernels.demo.report import averages, kinds, write_report

    require_writable(out)
    start = time.perf_counter()
    make = Settings.quick if quick else Settings
    settings = make(seed=seed, methods=method or tuple(METHODS), jobs=jobs)
    with progress(not quiet, remaining=False) as shown:
        tasks: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        with step("train on", "the characters"):
            result = run(settings, out, told)
        told("write the report", 0, 1)
        with step("write to", out):
            paths = write_report(result, out)
        told("write the report", 1, 1)

    if not quiet:
        for kind in kinds(result.evaluation):
            typer.echo(f"\nTrained on {kind}; mean over the OOD sets:")
            print_results(averages(result.evaluation, kind))
        typer.echo(
            "In per cent, the best in bold; FPR95: lower is better. "
            f"Done in {time.perf_counter() - start:.0f} s; written:"
        )
    for path in paths:
        print_path(path)


def info(
    detectors: Annotated[
        bool, typer.Option("--detectors", help="List the detectors and what they need instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how this installation was built and what it runs on: paste it into a bug report."""
    if detectors:
        _list_detectors(as_json)
        return
    import oodkernels

    facts = {
        **oodkernels.build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if as_json:
        print_json(facts)
        return
    shown = {n: ", ".join(v) if isinstance(v, list) else str(v or "none") for n, v in facts.items()}
    print_table(("", ""), [(name.replace("_", " "), value) for name, value in shown.items()])


def _list_detectors(as_json: bool) -> None:
    from oodkernels.detectors import DETECTORS

    found = {
        name: {
            "what": kind.spec.summary,
            "family": kind.spec.family,
            "needs": sorted(kind.needs),
            "trained_on": sorted(kind.trained_on),
            "settings": [str(option.name) for option in kind.spec.options.values()],
            "paper": kind.spec.paper,
        }
        for name, kind in DETECTORS.items()
    }
    if as_json:
        print_json(found)
        return
    lists = ("needs", "trained_on", "settings")
    print_table(
        ("detector", "family", "needs", "is fitted on", "settings", "", "by"),
        [
            (
                *(name, facts["family"]),
                *(", ".join(facts[key]) for key in lists),
                *(facts["what"], facts["paper"]),
            )
            for name, facts in found.items()
        ],
    )
