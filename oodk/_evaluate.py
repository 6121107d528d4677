"""``oodk eval``, ``oodk score`` and ``oodk threshold``."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._bundle import score_bundle
from oodk._command import one_of, step
from oodk._common import (
    ConfigOption,
    JsonOption,
    QuietOption,
    pairs,
    require_writable,
    require_writable_file,
    write_config,
)
from oodk._inputs import DATA, Inputs, TunedOption, read_tuning, watching, with_inputs
from oodk._output import print_json, print_path, print_results, printable

if TYPE_CHECKING:
    from torch import Tensor

    from oodkernels.evaluation import Sweep
    from oodkernels.metrics.threshold import ThresholdSource


@with_inputs
def evaluate(
    ctx: typer.Context,
    id_data: Annotated[
        str, typer.Option("--id", help=f"In-distribution (ID) test samples: {DATA}.")
    ],
    ood: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Out-of-distribution (OOD) samples, of the same kind; give it again for more "
            "sets.",
        ),
    ],
    inputs: Inputs,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Labels of the ID samples, for accuracy and reliability, where they "
            "are in a file of their own.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Stream the scores in this much memory for each detector, such as 16MiB: then "
            "figures come with certain bounds. By default scores are kept and figures exact.",
        ),
    ] = None,
    convention: Annotated[
        str,
        typer.Option(
            parser=one_of("conventions"),
            metavar="NAME",
            help="Whose FPR95 and AUPR, as code bases differ: {conventions}.",
        ),
    ] = "default",
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the model, in the table; by default that of --model or --head, or model."
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV with the columns x, method, value (a fraction), for a curve in the report, "
            "such as FPR95 by number of classes.",
        ),
    ] = None,
    tuned: TunedOption = None,
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
    """Compare detectors on logits, features, scores or images, and write the table and a report.

    Every file is read once, a chunk at a time, whatever its size; with several heads once for each.
    FPR95 is the share of OOD samples still kept when 95 % of ID samples are; AUPR-in and AUPR-out
    are average precisions. Scores are higher = more ID. The processes of `torchrun
    --nproc-per-node=4 -m oodkernels eval ...` share the batches, to the same figures.

    **Examples**

    Logits, the usual scores, a report in `run/`:

        oodk eval --id val.npy --labels y.npy --ood svhn=svhn.npy --ood textures.npy --out run

    A MOS head and a flat one on the same features:

        oodk eval --head runs/mos/head.safetensors --head flat=runs/flat/head.safetensors \\
            --id runs/val --ood inat=runs/inat

    Detectors that need the inputs, on images; settings of a detector:

        oodk eval --model mypackage:make --weights model.pt -d odin -d knn:k=10 \\
            --train images/train --id images/val --ood images/inat

    Scores, such as those of `oodk score`; all columns of the tables, or one:

        oodk eval --id id.csv --ood ood.csv

        oodk eval --id id.csv --ood ood.csv --column scores=energy

    Settings that were chosen on validation data:

        oodk tune --id val --ood-val tin --train train --head head.safetensors --out tuned.json

        oodk eval --id test --ood svhn --train train --head head.safetensors --tuned tuned.json

    Again, with another convention:

        oodk eval --config run/config.toml --convention openood
    """
    from oodkernels._files import write_text
    from oodkernels._ranks import ranks
    from oodkernels.evaluation import combine
    from oodkernels.evaluation import evaluate as run

    sets = pairs("--ood", ood, lambda path: path.stem)
    if out is not None:
        require_writable(out)
    if name is not None and len(inputs.models) > 1:
        raise typer.BadParameter(
            "is for one; name heads by --head NAME=PATH", param_hint="'--name'"
        )
    inside = inputs.open("--id", id_data, labels)
    outside = {printable(key): inputs.open("--ood", path) for key, path in sets.items()}
    curve = None if sweep is None else _read_sweep(sweep)
    parts = []
    for label, model in inputs.models.items():
        detectors = inputs.detectors(inside, model, tuned)
        with watching(quiet, {"ID": inside, **outside}) as on_batch, step("evaluate", id_data):
            parts.append(
                run(
                    model,
                    inside,
                    outside,
                    detectors,
                    groups=inputs.groups_of(model, inside),
                    model_name=name or label,
                    memory=memory,
                    convention=convention,
                    tuning=None if tuned is None else read_tuning(tuned),
                    shared=True,
                    on_batch=on_batch,
                )
            )
    if ranks()[0]:
        return
    found = replace(combine(*parts), sweep=curve)
    paths: list[Path] = []
    if out is not None:
        with step("write to", out):
            paths = [*found.save(out, report=False), write_config(ctx, out)]
    if as_json:
        print_json(found.as_dict())
    else:
        print_results(found.rows)
        uncertain = found.uncertainty
        bounds = f" Certain to {100 * uncertain:.1e} points." if uncertain else ""
        if not quiet:
            typer.echo(f"In per cent, the best in bold; FPR95: lower is better.{bounds}")
        for note in found.remarks:
            typer.echo(note, err=quiet)
    if out is not None:
        with step("draw the report in", out):
            write_text(out / "report.html", found.to_html())
        paths.append(out / "report.html")
    if not quiet and not as_json:
        for path in paths:
            print_path(path, err=True)


@with_inputs
def score(
    data: Annotated[str, typer.Option("--data", help=f"Samples: {DATA}.")],
    inputs: Inputs,
    tuned: TunedOption = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of `oodk bundle`: the table has the name of each image, its class, the "
            "scores, is_ood and the p-value.",
        ),
    ] = None,
    threshold: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File of `oodk threshold`: then a column is_ood is added, 1 = OOD. For one "
            "detector, the one it was made for.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File for the scores, one of {formats}; .npy is for one detector. By default CSV "
            "on standard output.",
        ),
    ] = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Score samples, higher = more in-distribution; a column for each detector.

    **Examples**

        oodk score --data new.npy --detector energy --out scores.csv

        oodk score --data new.npy -d energy --threshold threshold.json

        oodk score --model mypackage:make --weights model.pt -d odin --data images/new

        oodk score --bundle bundle --data images/new --out scores.csv
    """
    import torch

    from oodkernels import Threshold
    from oodkernels._ranks import ranks
    from oodkernels.data import FORMATS, save_arrays
    from oodkernels.data.formats.csv import text_cell

    if out is not None and out.suffix not in FORMATS:
        raise typer.BadParameter(f"must end in {', '.join(FORMATS)}", param_hint="'--out'")
    require_writable_file(out)
    if bundle is not None:
        if threshold is not None:
            raise typer.BadParameter("is in the bundle", param_hint="'--threshold'")
        if ranks()[1] > 1:
            raise ValueError("a bundle scores in one process: start it without torchrun")
        score_bundle(bundle, data, inputs, out, quiet)
        return
    limit = None
    if threshold is not None:
        with step("read", threshold):
            limit = Threshold.load(threshold)
    scores, sources = _scores(inputs, "--data", data, quiet, tuned)
    if ranks()[0]:
        return
    if limit is not None:
        if len(scores) != 1:
            raise ValueError(f"a threshold is for one detector, got {', '.join(scores)}")
        ((name, values),) = scores.items()
        with step("use", threshold):
            limit.check_source(sources[name], "oodk score")
        scores["is_ood"] = limit.predict(values).to(torch.uint8)
    if out is not None:
        with step("write", out):
            save_arrays(out, scores)
        print_path(out)
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(text_cell, scores))
    writer.writerows(zip(*(values.tolist() for values in scores.values()), strict=True))
    typer.echo(buffer.getvalue(), nl=False)


@with_inputs
def threshold(
    id_data: Annotated[str, typer.Option("--id", help=f"ID samples, not trained on: {DATA}.")],
    inputs: Inputs,
    tuned: TunedOption = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON file for the threshold.")
    ] = None,
    tpr: Annotated[float, typer.Option(help="Share of ID samples to keep, in (0, 1].")] = 0.95,
    confidence: Annotated[
        float, typer.Option(help="Of the interval for the share kept of new ID samples, in (0, 1).")
    ] = 0.95,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Find the score below which a sample is called out-of-distribution.

    It keeps a share `--tpr` of the ID samples given. The interval says what share of new ones it
    keeps, whatever their distribution. The file says of which detector, with which settings, groups
    and model, it is; `oodk score` refuses it for another.

    **Example**

        oodk threshold --id val.npy --detector energy --tpr 0.95 --out threshold.json
    """
    import json

    from oodkernels import Threshold
    from oodkernels._ranks import ranks

    for option, value in (("--tpr", tpr), ("--confidence", confidence)):
        if not 0 < value <= 1 or (option == "--confidence" and value == 1):
            raise typer.BadParameter(
                f"must be between 0 and 1, got {value}", param_hint=f"'{option}'"
            )
    require_writable_file(out)
    scores, sources = _scores(inputs, "--id", id_data, quiet, tuned)
    if ranks()[0]:
        return
    if len(scores) != 1:
        raise typer.BadParameter(
            f"one is needed, got {', '.join(scores)}", param_hint="'--detector'"
        )
    ((name, values),) = scores.items()
    with step("calibrate on", id_data):
        found = Threshold.calibrate(values, tpr, confidence, source=sources[name])
    if out is not None:
        with step("write", out):
            found.save(out)
    if as_json:
        print_json({"detector": name, **json.loads(found.to_json())})
        return
    low, high = found.interval
    typer.echo(f"{name} < {found.value:.9g} is OOD")
    typer.echo(
        f"keeps {100 * found.achieved_tpr:.2f} % of {found.n_id} ID samples; of new ones "
        f"{100 * low:.2f} to {100 * high:.2f} % ({100 * confidence:g} % confidence)"
    )


def _scores(
    inputs: Inputs, option: str, path: str, quiet: bool, tuned: Path | None
) -> tuple[dict[str, Tensor], dict[str, ThresholdSource]]:
    """All scores of all samples, and where each comes from."""
    import torch

    from oodkernels.evaluation import score_sets, source_of

    model = inputs.one_model
    samples = inputs.open(option, path)
    detectors = inputs.detectors(samples, model, tuned)
    groups = inputs.groups_of(model, samples)
    kept: dict[str, list[Tensor]] = {}
    sources: dict[str, ThresholdSource] = {}
    sets: dict[str, Any] = {samples.name: samples}
    with watching(quiet, sets) as on_batch, step("score", path):
        every = score_sets(option, sets, detectors, model=model, groups=groups, shared=True)
        for found in every:
            for name, values in found.scores.items():
                kept.setdefault(name, []).append(values)
                if name not in sources:
                    sources[name] = source_of(name, found.detectors.get(name), model)
            on_batch(found.name, found.done)
    return {name: torch.cat(parts) for name, parts in kept.items()}, sources


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
