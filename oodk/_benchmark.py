"""``oodk benchmark``."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._command import step
from oodk._common import ConfigOption, JsonOption, QuietOption, require_writable, write_config
from oodk._extract import DType, SkipBadOption
from oodk._images import DeviceOption, Images, SizeOption, WeightsOption, WorkersOption
from oodk._inputs import named_detectors, watching
from oodk._output import print_json, print_path, print_table, printable

if TYPE_CHECKING:
    from torch import nn

    from oodkernels.detectors import OODDetector
    from oodkernels.evaluation.benchmarks import (
        Benchmark,
        BenchmarkModel,
        BenchmarkResult,
        BenchmarkRun,
        OpenSet,
    )


class Preparation(str, Enum):
    """Whose way images are made ready by."""

    benchmark = "benchmark"
    model = "model"


def benchmark(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE.toml",
            help="One of {benchmarks}; or a file of your own, see docs/benchmarks-howto.md.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for all that is made.")],
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder that the benchmark's paths are relative to, OpenOOD's `data`; by default "
            "that of the file.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a timm model, or package.module:callable, as for `oodk extract`; none "
            "where the sets were extracted before."
        ),
    ] = None,
    weights: WeightsOption = None,
    head: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Head that `oodk train` made, for sets of features.",
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detectors",
            "--detector",
            "-d",
            metavar="NAME[:SETTING=VALUE,...]",
            help="As for `oodk eval`; `all` that can score what there is is the default.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A detector to leave out of `all`; give it again."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            help="Choose settings on the validation sets, where the benchmark has one of ID and "
            "one of OOD, for detectors that are asked for without settings and have a grid."
        ),
    ] = True,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND/NAME",
            help="A set to leave out, such as shifted/cifar10c; give it again. The result says so.",
        ),
    ] = None,
    preprocess: Annotated[
        Preparation | None,
        typer.Option(
            help="Whose way images are made ready by. By default the benchmark's, and the model's "
            "where the benchmark has none.",
            show_default=False,
        ),
    ] = None,
    size: SizeOption = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer whose output are the features. By default they are what the classifier "
            "reads."
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Type of what is extracted; float16 takes half the space.")
    ] = DType.float32,
    other_counts: Annotated[
        bool,
        typer.Option(
            "--other-counts",
            help="Go on where a list has another number of images than the benchmark says.",
        ),
    ] = False,
    skip_bad: SkipBadOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="Look at all lists and images, and do no more.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images sent through the model at once.")
    ] = 64,
    part_size: Annotated[
        int, typer.Option(min=1, help="Images after which progress is safe on disk.")
    ] = 8192,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Run a benchmark, from lists of images to the table: extract, tune, fit, score, average.

    All lists and images are looked at first: what is missing is named before anything is run. Each
    step is kept in `--out`: killed and started again, or with more detectors, it goes on where it
    was, and to the same bytes. The result says what it measured: digests of lists, counts, images
    left out, preprocessing, weights and versions. Nothing is downloaded.

    FPR95 takes ID for positive, FPR95-OOD is OpenOOD's, with OOD positive. Averages are over near,
    far and all OOD sets; full-spectrum ones count covariate-shifted samples as ID.

    **Examples**

        oodk benchmark openood-imagenet --data data --model resnet50.tv_in1k --out runs/r50

        oodk benchmark mine.toml --model mypackage:make --weights model.pt -d knn --out runs/x

        torchrun --nproc-per-node=4 -m oodkernels benchmark openood-cifar10 --data data \\
            --model mypackage:make --out runs/c10
    """
    from oodkernels._files import locked
    from oodkernels._ranks import joined, on_first
    from oodkernels.evaluation.benchmarks import (
        BenchmarkResult,
        BenchmarkRun,
        failing_samples,
        read_benchmark,
        thumbnail,
    )

    with joined("oodk benchmark") as (rank, _), ExitStack() as lock:
        quiet = quiet or bool(rank)
        with step("read", source):
            found = read_benchmark(source)
            found = found.without(tuple(without or ()))
        folder = data or (Path(source).parent if source.endswith(".toml") else None)
        if folder is None:
            raise typer.BadParameter("is needed", param_hint="'--data'")
        require_writable(out)
        on_first(lambda: lock.enter_context(locked(out, "oodk benchmark")) or True)
        how = None
        if model is not None:
            how = Images(model, weights, size, batch_size, workers, device)
        made, transform = _model(found, how, preprocess, layer, dtype.value)
        sets = _opened(found, folder, out, made, transform, other_counts, skip_bad)
        if not quiet:
            _tell(found, sets, made)
        if check:
            return
        with step("run in", out):
            run = BenchmarkRun(found, sets, out, made, _head(head, how))
            on_first(lambda: write_config(ctx, out))
            sizes = {"batch_size": batch_size, "part_size": part_size, "workers": workers}
            _steps(run, detector or ["all"], exclude or [], tune, sizes, quiet)
            if rank:
                return
            label = model or (head.stem if head is not None else "model")
            result = BenchmarkResult.of(run, label)
            failing = failing_samples(run, result)
            paths = [*failing.save(out, partial(thumbnail, run)), *result.save(out)]
    if as_json:
        print_json(result.as_dict())
        return
    _print(result)
    for note in result.notes:
        typer.echo(note, err=quiet)
    if not quiet:
        for path in paths:
            print_path(path, err=True)


def _model(
    benchmark: Benchmark,
    how: Images | None,
    preprocess: Preparation | None,
    layer: str | None,
    dtype: str,
) -> tuple[BenchmarkModel | None, Any]:
    """The model and how its images are made ready."""
    from oodkernels.data import OnRGB
    from oodkernels.evaluation.benchmarks import BenchmarkModel

    if how is None:
        return None, None
    own = benchmark.preprocess
    if preprocess is Preparation.benchmark and own is None:
        raise typer.BadParameter(
            f"{benchmark.name} says nothing of it", param_hint="'--preprocess'"
        )
    if how.size is not None and own is not None and preprocess is not Preparation.model:
        raise typer.BadParameter(
            "is for --preprocess model: the benchmark has a size", param_hint="'--size'"
        )
    of_model = own is None or preprocess is Preparation.model
    transform = how.transform if of_model else own
    words = repr(transform.transform if isinstance(transform, OnRGB) else transform)
    words = "of the model" if " at 0x" in words else " ".join(words.split())
    network: Any = how.network
    made = BenchmarkModel(
        how.model,
        network,
        words,
        layer,
        getattr(network, "class_names", None),
        getattr(network, "absent_column", None),
        getattr(network, "groups", None),
        how.device,
        dtype,
    )
    return made, transform


def _opened(
    benchmark: Benchmark,
    folder: Path,
    out: Path,
    model: BenchmarkModel | None,
    transform: Any,
    other_counts: bool,
    skip_bad: bool,
) -> dict[str, OpenSet]:
    """The sets; what is missing is named, all of it in a file."""
    from oodkernels._files import write_text
    from oodkernels._ranks import ranks
    from oodkernels.evaluation.benchmarks import MissingDataError, open_sets

    try:
        with step("open", benchmark.name):
            return open_sets(
                benchmark,
                folder,
                transform,
                model_classes=None if model is None else model.class_names,
                other_counts=other_counts,
                skip_bad=skip_bad,
            )
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, MissingDataError) and not ranks()[0]:
            lines = [f"{key}\t{path}\n" for key, paths in cause.missing.items() for path in paths]
            write_text(out / "missing.txt", printable("".join(lines)))
            typer.echo(f"all that is missing: {out / 'missing.txt'}", err=True)
        raise


def _tell(benchmark: Benchmark, sets: dict[str, OpenSet], model: BenchmarkModel | None) -> None:
    typer.echo(f"{benchmark.name}:", err=True)
    for key, each in sets.items():
        count, wanted = each.identity.count, each.definition.count
        shown = "samples" if count is None else f"{count} samples"
        of = f" of {wanted}" if wanted is not None and wanted != count else ""
        gone = f", {len(each.missing)} missing" if each.missing else ""
        typer.echo(f"  {key}: {shown}{of}{gone}, digest {each.identity.digest}", err=True)
    if model is not None:
        typer.echo(f"  images: {model.transform}", err=True)


def _head(path: Path | None, how: Images | None) -> nn.Module | None:
    from oodkernels.nn import Head

    if path is None:
        return None
    if how is not None:
        raise typer.BadParameter("is of no use with --model", param_hint="'--head'")
    with step("read", path):
        return Head.load(path)


def _steps(
    run: BenchmarkRun,
    asked: list[str],
    exclude: list[str],
    tune: bool,
    sizes: dict[str, int],
    quiet: bool,
) -> None:
    """Extract, choose settings, fit and score."""
    with watching(quiet, {key: _Count(s.identity.count) for key, s in run.sets.items()}) as shown:
        run.extract(**sizes, on_batch=shown)
    model = run.model.network if run.model is not None else run.head
    names = _asked(run, asked, exclude, model)
    _check(run, named_detectors(names, model, run.groups)[0])
    tuning = None
    if tune:
        with watching(quiet, _validation(run)) as shown:
            tuning = run.tune(names, shown)
    chosen = {} if tuning is None else tuning.settings
    detectors, _ = named_detectors(names, model, run.groups, chosen)
    if not quiet:
        typer.echo(f"{len(detectors)} detectors: {', '.join(detectors)}", err=True)
    run.fit(detectors, detectors.keys() - set(asked))
    tested = {f"score {key}": _Count(run.samples[key].num_samples) for key in run.tested}
    with watching(quiet, tested) as shown:
        run.score(lambda key, done: shown(f"score {key}", done))


def _validation(run: BenchmarkRun) -> dict[str, _Count]:
    sets = {"ID": "id/val", "ood/val": "ood/val"}
    found = {name: run.samples.get(key) for name, key in sets.items()}
    return {name: _Count(None if s is None else s.num_samples) for name, s in found.items()}


class _Count:
    def __init__(self, num_samples: int | None) -> None:
        self.num_samples = num_samples


def _reads(run: BenchmarkRun) -> set[str]:
    """What detectors can read."""
    if run.head is not None:
        return {"logits", "features"}
    return {*run.samples["id/test"].arrays} - {"labels"}


def _asked(
    run: BenchmarkRun, asked: list[str], exclude: list[str], model: nn.Module | None
) -> list[str]:
    """Names of detectors, ``all`` spelt out."""
    from oodkernels.detectors import DETECTORS, applicable, linear_head

    if unknown := set(exclude) - DETECTORS.keys():
        raise typer.BadParameter(f"there is no {min(unknown)!r}", param_hint="'--exclude'")
    if "all" not in asked:
        return asked
    test, train = run.samples["id/test"], run.samples.get("id/train")
    reads = _reads(run)
    fits = set() if train is None else reads | ({"labels"} & train.arrays.keys())
    absent = test.absent_column if model is None else getattr(model, "absent_column", None)
    every = applicable(
        reads,
        trained_on=fits,
        groups=run.groups,
        head=model is not None and linear_head(model) is not None,
        absent=absent is not None,
    )
    at = asked.index("all")
    own = [name for name in every if name not in exclude and name not in asked]
    return [*asked[:at], *own, *asked[at + 1 :]]


def _check(run: BenchmarkRun, detectors: dict[str, OODDetector]) -> None:
    reads = _reads(run)
    for label, one in detectors.items():
        if lacking := one.needs - reads:
            raise ValueError(
                f"{label} reads {', '.join(sorted(lacking))}, which is not among what is "
                f"extracted, {', '.join(sorted(reads))}: oodk eval runs it on images"
            )


def _print(result: BenchmarkResult) -> None:
    """The averages, in per cent, the best in bold."""
    from rich.text import Text

    from oodkernels.evaluation.tables import EVERY_NAME, lines, ood_sets

    metrics = ("fpr95", "fpr95_ood", "auroc")
    rows = result.summary()
    columns = ood_sets(rows)
    shown = []
    for line in lines(rows, metrics):
        cells = [Text(c.percent, "bold green" if c.best else "") for c in line.cells]
        shown.append([line.score, line.accuracy.percent, *cells])
    names = [f"{name} {EVERY_NAME[metric]}" for name in columns for metric in metrics]
    print_table(["score", "acc.", *names], shown, numbers=1 + len(names))
