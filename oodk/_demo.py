"""``oodk demo`` and ``oodk info``."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from oodk._command import one_of, step
from oodk._common import JsonOption, QuietOption, require_writable
from oodk._output import print_json, print_path, print_results, print_table


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
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            parser=one_of("objectives"),
            metavar="NAME",
            help="What to compare the flat softmax with, of {objectives}; give it again for "
            "more.  [default: all]",
            show_default=False,
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Train and compare all methods on small real images: two minutes, nothing to download.

    A small network learns scikit-learn's handwritten digits once by each method: flat softmax, MOS
    (with random groups of digits, and with groups found by clustering features), confidence branch,
    abnormality module, synthetic outliers; and with outliers to train on, Outlier Exposure,
    energy-bounded learning, an absent class, NTOM, POEM and DOS. Then each score has to tell digits
    from faces, textures and photos, none of which any model has seen.

    FPR95 is the share of those still taken for digits when 95 % of the digits are accepted: lower
    is better. AUROC and AUPR: higher is better. The table is of the mean over the three; the HTML
    report shows each, with score distributions, ROC curves and MOS's "others" probabilities.

    **Examples**

        oodk demo --out oodk-demo

        oodk demo --method mos --method dos --seed 1
    """
    from oodkernels._optional import require
    from oodkernels._progress import progress

    for module in ("jinja2", "matplotlib", "skimage", "sklearn"):
        require(module, "demo", "oodk demo")
    from oodkernels.demo import METHODS, Settings, run
    from oodkernels.demo.report import averages, kinds, write_report
    from oodkernels.training import TrainConfig

    require_writable(out)
    start = time.perf_counter()
    recipe = TrainConfig(epochs=epochs, accelerator="cpu")
    methods = method or tuple(METHODS)
    settings = Settings(seed=seed, num_groups=groups, recipe=recipe, methods=methods)
    with progress(not quiet, remaining=False) as shown:
        tasks = {model: shown.add_task(f"train {model}", total=epochs) for model in settings.models}
        writing = shown.add_task("write report", total=1, start=False)
        with step("train on", "the digits"):
            result = run(settings, lambda model, epoch: shown.update(tasks[model], completed=epoch))
        shown.start_task(writing)
        with step("write to", out):
            paths = write_report(result, out)
        shown.update(writing, completed=1)

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
