"""``oodk convert``."""

from __future__ import annotations

import csv
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oodk._command import Command
from oodk._common import ConfigOption, read_groups, require_writable_file
from oodk._output import print_path

if TYPE_CHECKING:
    from oodkernels.evaluation.tables import Row

app = typer.Typer(
    help="Bring files of other code bases into this one's form, and back.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Form(str, Enum):
    """What a .npy file with groups holds."""

    sizes = "sizes"
    slices = "slices"


@app.command(cls=Command)
def groups(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Official MOS groups: an image list (.txt with `folder/image group index`), "
            "`taxonomy_level0.npy` (classes per group, (K,)) or `group_slices` (first and "
            "past-the-end column, (K, 2)); or .json, .csv.",
        ),
    ],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="File to write: .json or .npy.")],
    names: Annotated[
        str | None, typer.Option(help="Names of the groups, separated by commas.")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file with the class names or WordNet ids of a .npy, one a line, in the "
            "order of the columns.",
        ),
    ] = None,
    order: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file with the same class names in the order of your class ids, one a line.",
        ),
    ] = None,
    form: Annotated[Form, typer.Option(help="What a .npy file is to hold.")] = Form.sizes,
    config: ConfigOption = None,
) -> None:
    """Groups of the official MOS code, and back.

    Its .npy files count classes in the order of the columns of the authors' models, which is not
    that of ImageNet's class ids; its image lists name them, and become groups in ImageNet's order.

    **Examples**

        oodk convert groups imagenet2012_group_softmax_val_list.txt groups.json

        oodk convert groups taxonomy_level0.npy groups.json --class-names names.txt

        oodk convert groups groups.json group_slices.npy --form slices
    """
    import torch

    from oodkernels import Groups
    from oodkernels.data.samples import save_arrays

    if target.suffix not in (".json", ".npy"):
        raise typer.BadParameter("must end in .json or .npy", param_hint="'TARGET'")
    if class_names is not None and source.suffix != ".npy":
        raise typer.BadParameter("is for .npy alone", param_hint="'--class-names'")
    require_writable_file(target, "TARGET")
    found = read_groups(source, _lines(class_names))
    if order is not None:
        found = found.matched(_lines(order) or ())
    if names is not None:
        given = [name.strip() for name in names.split(",")]
        if len(given) != len(found):
            raise typer.BadParameter(
                f"must be {len(found)}, got {len(given)}", param_hint="'--names'"
            )
        found = Groups(found.class_to_group, given, found.index_in_group, found.class_names)
    if target.suffix == ".json":
        found.save(target)
    else:
        if not torch.equal(found.classes, torch.arange(found.num_classes)):
            raise ValueError(
                f"{source}: the official form knows classes in grouped order only; these are "
                "in another"
            )
        save_arrays(target, {form.value: found.sizes if form is Form.sizes else found.slices()})
    print_path(target)


def _lines(path: Path | None) -> list[str] | None:
    return None if path is None else path.read_text(encoding="utf-8").splitlines()


@app.command(cls=Command)
def openood(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Scores of OpenOOD (`scores/*.npz` with conf, pred, label), or its results "
            "(`ood.csv`).",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            dir_okay=False,
            help="For scores .csv, .npz, .pt, .safetensors or .parquet; for results .csv, .md or "
            ".tex.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Of the score, in a table of results.")] = "OpenOOD",
    config: ConfigOption = None,
) -> None:
    """Scores and results of OpenOOD.

    Scores keep their sign: OpenOOD's confidence is higher = more ID too. Its figures follow its own
    convention (`oodk eval --convention openood`).

    **Examples**

        oodk convert openood scores/cifar10.npz cifar10.csv

        oodk convert openood ood.csv results.md
    """
    from oodkernels.data import FORMATS, open_arrays, save_arrays

    is_results = source.suffix == ".csv"
    suffixes = (".csv", ".md", ".tex") if is_results else tuple(FORMATS)
    if target.suffix not in suffixes:
        raise typer.BadParameter(f"must end in {', '.join(suffixes)}", param_hint="'TARGET'")
    require_writable_file(target, "TARGET")
    if is_results:
        _convert_results(source, target, name)
    else:
        found = open_arrays(source)
        if "conf" not in found:
            raise ValueError(f"{source} must hold conf, got {', '.join(found) or 'nothing'}")
        kept = {"conf": "score", "label": "label", "pred": "prediction"}
        save_arrays(target, {new: found[old].read() for old, new in kept.items() if old in found})
    print_path(target)


_OPENOOD = {
    "fpr95": "FPR@95",
    "auroc": "AUROC",
    "aupr_in": "AUPR_IN",
    "aupr_out": "AUPR_OUT",
    "id_accuracy": "ACC",
}


def read_openood(source: Path, name: str) -> list[Row]:
    """Rows of OpenOOD's results (`ood.csv`); FPR95 is by its own rule, with OOD positive."""
    from oodkernels.evaluation.tables import Row

    with source.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    rows = []
    for i, line in enumerate(lines):
        dataset = line.get("dataset") or line.get("") or str(i)
        try:
            values = {ours: float(line[theirs]) / 100 for ours, theirs in _OPENOOD.items()}
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{source}: row {i} must have numbers in the columns {', '.join(_OPENOOD.values())}"
            ) from None
        rows.append(Row(ood_set=dataset, model="", score=name, n_id=0, n_ood=0, **values))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _convert_results(source: Path, target: Path, name: str) -> None:
    from oodkernels._files import write_text
    from oodkernels.evaluation.tables import to_csv, to_latex, to_markdown

    rows = read_openood(source, name)
    writers = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}
    write_text(target, writers[target.suffix](rows).rstrip("\n") + "\n")
