"""``oodk tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._command import step
from oodk._common import ConfigOption, JsonOption, QuietOption, pairs, require_writable_file
from oodk._inputs import DATA, Inputs, read_detector, watching, with_inputs
from oodk._output import print_json, print_path, print_table, printable

if TYPE_CHECKING:
    from torch import nn

    from oodkernels import Groups


@with_inputs
def tune(
    id_data: Annotated[
        str, typer.Option("--id", help=f"ID validation samples, not for testing: {DATA}.")
    ],
    inputs: Inputs,
    ood_val: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="OOD validation samples, of the same kind, which are no test set either; give it "
            "again for more.",
        ),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise", help="Choose on noise of the ID samples, their columns shuffled, instead."
        ),
    ] = False,
    by: Annotated[
        str, typer.Option(metavar="FIGURE", help="What settings are chosen by: auroc or fpr95.")
    ] = "auroc",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="JSON file for `oodk eval --tuned`."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Choose detectors' settings on validation data, from one walk over them.

    `--detector` names options with values to try, separated by `/`, or `all` for every dimension:
    `-d scale:percentile=80/85/90`, `-d vim:dim=all`, `-d react:percentile=85/90+gen`. Without
    options a detector's own grid is tried, and `-d all`, the default, tries those of all detectors
    that have one.

    What settings share is computed once, so that hundreds cost little more than one. The file says
    on what data, with which training data and for which model they were chosen; `oodk eval` refuses
    it for others, and refuses to test on what they were chosen on.

    **Examples**

        oodk tune --id val --ood-val tin --train train --head head.safetensors --out tuned.json

        oodk tune --id val --noise --train train --head head.safetensors -d knn:k=1/10/50/200

        oodk eval --id test --ood svhn --train train --head head.safetensors --tuned tuned.json
    """
    from oodkernels.detectors import sweep

    if (ood_val is None) != noise:
        raise typer.BadParameter(
            "is needed, or --noise" if ood_val is None else "is of no use with --noise",
            param_hint="'--ood-val'",
        )
    if by not in ("auroc", "fpr95"):
        raise typer.BadParameter(f"must be auroc or fpr95, got {by!r}", param_hint="'--by'")
    require_writable_file(out)
    model = inputs.one_model
    inside = inputs.open("--id", id_data)
    groups = inputs.groups_of(model, inside)
    outside: Any = "noise"
    if not noise:
        sets = pairs("--ood-val", ood_val or (), lambda path: path.stem)
        outside = {printable(name): inputs.open("--ood-val", path) for name, path in sets.items()}
    shown = {"ID": inside, **({"noise": inside} if noise else outside)}
    train = None if inputs.train is None else inputs.open("--train", inputs.train)
    grid = _grid(inputs, inside, model, groups)
    with watching(quiet, shown) as on_batch, step("tune on", id_data):
        found = sweep(
            grid,
            id=inside,
            ood_val=outside,
            train=train,
            model=model,
            groups=groups,
            by="auroc" if by == "auroc" else "fpr95",
            seed=seed,
            on_batch=on_batch,
        )
    if out is not None:
        with step("write", out):
            found.save(out)
    if as_json:
        import json

        print_json(json.loads(found.to_json()))
        return
    headings = ("detector", "setting", "AUROC", "FPR95", "tried")
    print_table(headings, [(*row[:-1], str(row[-1])) for row in found.rows()], numbers=3)
    if not quiet:
        typer.echo(f"Chosen by {found.by} on {found.chosen_on}.")
        for name, one in found.detectors.items():
            if one.left_out:
                typer.echo(
                    f"{name}: {len(one.left_out)} of its own settings are left out, the first "
                    f"{one.left_out[0]}",
                    err=True,
                )
        if out is not None:
            print_path(out, err=True)


def _grid(
    inputs: Inputs, samples: Any, model: nn.Module | None, groups: Groups | None
) -> dict[str, Any]:
    """Detector -> option -> values; None for its own grid."""
    from oodkernels.detectors import DETECTORS
    from oodkernels.detectors.compose import spec_of

    asked = list(inputs.detector or ["all"])
    if "all" in asked:
        at = asked.index("all")
        every = inputs.all_names(samples, model, groups)
        asked[at : at + 1] = [name for name in every if DETECTORS[name].spec.grid]
    grid: dict[str, Any] = {}
    for text in asked:
        name, settings = read_detector(text)
        if name in grid:
            raise typer.BadParameter(f"{name!r} is there twice", param_hint="'--detector'")
        known = spec_of("--detector", name).options
        grid[name] = {} if settings else None
        for option, values in settings.items():
            if option not in known:
                raise ValueError(
                    f"--detector: {name} has no option {option!r}, only {', '.join(known)}"
                )
            grid[name][option] = (
                values
                if values == "all"
                else [known[option].read("--detector", value) for value in values.split("/")]
            )
    return grid
