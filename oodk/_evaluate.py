"""``oodk eval``, ``oodk score`` and ``oodk threshold``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.console import Console

from oodkernels._progress import progress
from oodk._common import (
    ConfigOption,
    GroupsOption,
    JsonOption,
    QuietOption,
    pairs,
    print_json,
    read_groups,
    require_writable,
    require_writable_file,
    write_config,
)

if TYPE_CHECKING:
    from torch import Tensor

    from oodkernels import Groups
    from oodkernels.data.samples import Samples
    from oodkernels.detectors import OODDetector
    from oodkernels.evaluation import Sweep
    from oodkernels.nn.heads import Head

DATA = "`.npy`, `.npz`, `.pt`, `.safetensors`, `.csv` or `.parquet`, or a folder of `oodk extract`"


class Kind(str, Enum):
    """What an array can be."""

    logits = "logits"
    features = "features"
    scores = "scores"


class Convention(str, Enum):
    """Of the metrics."""

    default = "default"
    mos = "mos"
    oe = "oe"
    dos = "dos"
    openood = "openood"
    pytorch_ood = "pytorch-ood"


DetectorsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        "-d",
        help="Name of a detector, or a file of one that was saved; give it again for more. By "
        "default msp, max-logit and energy where there are logits, mos and mos-log-odds where "
        "there are groups. All of them: `oodk info --detectors`.",
    ),
]
KindOption: TypeAlias = Annotated[
    Kind | None,
    typer.Option(
        help="What a file with one array without a telling name holds. By default two dimensions "
        "are logits, with --head features, and one is scores.",
    ),
]
ColumnOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE=NAME",
        help="Array or column that holds the logits, features, scores or labels, where it is "
        "called otherwise: --column scores=energy.",
    ),
]
HeadOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Head that `oodk train` made, for files with features.",
    ),
]
TrainOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        help="Training features or logits with labels, for detectors that are fitted (knn, "
        "mahalanobis).",
    ),
]


def evaluate(
    ctx: typer.Context,
    id_data: Annotated[
        Path,
        typer.Option("--id", exists=True, help=f"In-distribution (ID) test samples: {DATA}."),
    ],
    ood: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Out-of-distribution (OOD) samples, of the same kind; give it again for more "
            "sets.",
        ),
    ],
    detector: DetectorsOption = None,
    groups: GroupsOption = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Labels of the ID samples, for accuracy and reliability, where they "
            "are in a file of their own.",
        ),
    ] = None,
    train: TrainOption = None,
    head: HeadOption = None,
    kind: KindOption = None,
    column: ColumnOption = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Stream the scores in this much memory for each detector, such as 16MiB: then "
            "figures come with certain bounds. By default scores are kept and figures exact.",
        ),
    ] = None,
    convention: Annotated[
        Convention, typer.Option(help="Whose FPR95 and AUPR: code bases differ.")
    ] = Convention.default,
    name: Annotated[str, typer.Option(help="Of the model, in the table.")] = "model",
    sweep: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV with the columns x, method, value (a fraction), for a curve in the report, "
            "such as FPR95 by number of classes.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for results.csv, .json, .md, .tex, report.html and config.toml.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare detectors on logits, features or scores, and write the table and a report.

    Every file is read once, a chunk at a time, whatever its size. FPR95 is the share of OOD samples
    still kept when 95 % of ID samples are; AUPR-in and AUPR-out are average precisions. Scores are
    higher = more ID.

    **Examples**

    Logits, the usual scores, a report in `run/`:

        oodk eval --id val.npy --labels y.npy --ood svhn=svhn.npy --ood textures.npy --out run

    A MOS head, with scores of a flat one for comparison in another run:

        oodk eval --id val.safetensors --ood inat=inat.safetensors --groups groups.json

    Scores, such as those of `oodk score`; all columns of the tables, or one:

        oodk eval --id id.csv --ood ood.csv

        oodk eval --id id.csv --ood ood.csv --column scores=energy

    Again, with another convention:

        oodk eval --config run/config.toml --convention openood
    """
    from oodkernels.evaluation import evaluate as run

    sets = pairs("--ood", ood, stem=True)
    if out is not None:
        require_writable(out)
    common = _Common(detector, groups, train, head, kind, column)
    inside = common.open(id_data, labels)
    outside = {key: common.open(_existing("--ood", path)) for key, path in sets.items()}
    curve = None if sweep is None else _read_sweep(sweep)
    detectors = common.detectors(inside)
    with _watching(quiet, {"ID": inside, **outside}) as on_batch:
        found = run(
            common.head,
            inside,
            outside,
            detectors,
            groups=common.groups,
            model_name=name,
            memory=memory,
            convention=convention.value,
            on_batch=on_batch,
        )
    if curve is not None:
        from dataclasses import replace

        found = replace(found, sweep=curve)
    paths = [] if out is None else [*found.save(out), write_config(ctx, out)]
    if as_json:
        print_json(found.as_dict())
        return
    console = Console()
    console.print(results_table(found.rows))
    if not quiet:
        uncertain = found.uncertainty
        bounds = f" Certain to {100 * uncertain:.1e} points." if uncertain else ""
        console.print(f"In per cent, the best in bold; FPR95: lower is better.{bounds}")
        for path in paths:
            typer.echo(path, err=True)


def score(
    data: Annotated[Path, typer.Option("--data", exists=True, help=f"Samples: {DATA}.")],
    detector: DetectorsOption = None,
    groups: GroupsOption = None,
    train: TrainOption = None,
    head: HeadOption = None,
    kind: KindOption = None,
    column: ColumnOption = None,
    threshold: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File of `oodk threshold`: then a column is_ood is added, 1 = OOD. For one "
            "detector.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File for the scores: .csv, .npz, .npy (one detector), .pt, .safetensors or "
            ".parquet. By default CSV on standard output.",
        ),
    ] = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Score samples, higher = more in-distribution; a column for each detector.

    **Examples**

        oodk score --data new.npy --detector energy --out scores.csv

        oodk score --data new.npy -d energy --threshold threshold.json
    """
    import torch

    from oodkernels import Threshold
    from oodkernels.data import FORMATS, save_arrays

    if out is not None and out.suffix not in FORMATS:
        raise typer.BadParameter(f"must end in {', '.join(FORMATS)}", param_hint="'--out'")
    require_writable_file(out)
    limit = None if threshold is None else Threshold.load(threshold)
    common = _Common(detector, groups, train, head, kind, column)
    samples = common.open(data)
    scores = _scores(common, samples, quiet)
    if limit is not None:
        if len(scores) != 1:
            raise ValueError(f"a threshold is for one detector, got {', '.join(scores)}")
        scores["is_ood"] = limit.predict(next(iter(scores.values()))).to(torch.uint8)
    if out is not None:
        save_arrays(out, scores)
        typer.echo(out)
        return
    typer.echo(",".join(scores))
    for row in zip(*(values.tolist() for values in scores.values()), strict=True):
        typer.echo(",".join(map(str, row)))


def threshold(
    id_data: Annotated[
        Path, typer.Option("--id", exists=True, help=f"ID samples, not trained on: {DATA}.")
    ],
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON file for the threshold.")
    ] = None,
    detector: DetectorsOption = None,
    tpr: Annotated[float, typer.Option(help="Share of ID samples to keep, in (0, 1].")] = 0.95,
    confidence: Annotated[
        float, typer.Option(help="Of the interval for the share kept of new ID samples, in (0, 1).")
    ] = 0.95,
    groups: GroupsOption = None,
    train: TrainOption = None,
    head: HeadOption = None,
    kind: KindOption = None,
    column: ColumnOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Find the score below which a sample is called out-of-distribution.

    It keeps a share `--tpr` of the ID samples given. The interval says what share of new ones it
    keeps, whatever their distribution.

    **Example**

        oodk threshold --id val.npy --detector energy --tpr 0.95 --out threshold.json
    """
    from oodkernels import Threshold

    for option, value in (("--tpr", tpr), ("--confidence", confidence)):
        if not 0 < value <= 1 or (option == "--confidence" and value == 1):
            raise typer.BadParameter(
                f"must be between 0 and 1, got {value}", param_hint=f"'{option}'"
            )
    require_writable_file(out)
    common = _Common(detector, groups, train, head, kind, column)
    samples = common.open(id_data)
    scores = _scores(common, samples, quiet)
    if len(scores) != 1:
        raise typer.BadParameter(
            f"one is needed, got {', '.join(scores)}", param_hint="'--detector'"
        )
    ((name, values),) = scores.items()
    found = Threshold.calibrate(values, tpr, confidence)
    if out is not None:
        found.save(out)
    if as_json:
        import json

        print_json({"detector": name, **json.loads(found.to_json())})
        return
    low, high = found.interval
    typer.echo(f"{name} < {found.value:.9g} is OOD")
    typer.echo(
        f"keeps {100 * found.achieved_tpr:.2f} % of {found.n_id} ID samples; of new ones "
        f"{100 * low:.2f} to {100 * high:.2f} % ({100 * confidence:g} % confidence)"
    )


# --- shared -----------------------------------------------------------------------------------


class _Common:
    """What the commands read beside the samples."""

    def __init__(
        self,
        detector: Sequence[str] | None,
        groups: Path | None,
        train: Path | None,
        head: Path | None,
        kind: Kind | None,
        column: Sequence[str] | None,
    ) -> None:
        self.names = list(detector or ())
        self.columns = pairs("--column", column or ())
        self.train = train
        self.head = None if head is None else _load_head(head)
        self.kind = kind.value if kind is not None else None if head is None else "features"
        self.groups: Groups | None = None if groups is None else read_groups(groups)
        if self.groups is None and self.head is not None:
            self.groups = self.head.groups

    def open(self, path: Path, labels: Path | None = None) -> Samples:
        """The samples in a file or folder."""
        from oodkernels.data.samples import open_samples

        return open_samples(path, kind=self.kind, columns=self.columns, labels=labels)

    def detectors(self, samples: Samples) -> dict[str, OODDetector]:
        """Those asked for, fitted where they have to be."""
        from oodkernels.detectors import OODDetector
        from oodkernels.evaluation import DEFAULT_DETECTORS, as_detectors

        names = self.names
        if not names and (self.head is not None or "logits" in samples.arrays):
            names = [*DEFAULT_DETECTORS] if self.groups is None else ["mos", "mos-log-odds"]
        elif not names and not samples.arrays.keys() - {"features", "labels"}:
            raise typer.BadParameter("is needed for features", param_hint="'--detector'")
        chosen: dict[str, OODDetector | str] = {}
        for name in names:
            path = Path(name)
            is_file = path.suffix == ".safetensors"
            chosen[path.stem if is_file else name] = OODDetector.load(path) if is_file else name
        found = as_detectors(chosen, self.groups, self.head)
        unfitted = {n: d for n, d in found.items() if isinstance(chosen[n], str) and d.trained_on}
        if unfitted:
            self._fit(unfitted)
        return found

    def _fit(self, detectors: dict[str, OODDetector]) -> None:
        if self.train is None:
            raise typer.BadParameter(
                f"is needed for {', '.join(detectors)}", param_hint="'--train'"
            )
        from oodkernels.evaluation import fit_detectors

        fit_detectors("--train", detectors.values(), self.open(self.train), self.head)


def _scores(common: _Common, samples: Samples, quiet: bool) -> dict[str, Tensor]:
    """All scores of all samples."""
    import torch

    from oodkernels.evaluation import score_sets

    sets = {samples.name: samples}
    detectors = common.detectors(samples)
    kept: dict[str, list[Tensor]] = {}
    with _watching(quiet, sets) as on_batch:
        for found in score_sets("score", sets, detectors, model=common.head):
            for name, values in found.scores.items():
                kept.setdefault(name, []).append(values)
            on_batch(found.name, found.done)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _load_head(path: Path) -> Head:
    from oodkernels.nn.heads import Head

    return Head.load(path)


def _existing(option: str, path: str) -> Path:
    if not Path(path).exists():
        raise typer.BadParameter(f"there is no {path!r}", param_hint=f"'{option}'")
    return Path(path)


@contextmanager
def _watching(quiet: bool, sets: dict[str, Samples]) -> Iterator[Callable[[str, int], None]]:
    """A bar for each data set."""
    with progress(not quiet) as shown:
        tasks = {
            name: shown.add_task(name, total=samples.num_samples, start=False)
            for name, samples in sets.items()
        }

        def on_batch(name: str, done: int) -> None:
            shown.start_task(tasks[name])
            shown.update(tasks[name], completed=done)

        yield on_batch


def _read_sweep(path: Path) -> Sweep:
    from oodkernels.evaluation import Sweep

    with path.open(newline="", encoding="utf-8-sig") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    series: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(rows):
        try:
            point = float(row["x"]), float(row["value"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: row {i} must have numbers in the columns x and value, and a method"
            ) from None
        series.setdefault(str(row.get("method")), []).append(point)
    if not series:
        raise ValueError(f"{path} has no rows")
    return Sweep(series)
