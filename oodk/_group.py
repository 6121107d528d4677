"""``oodk group``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from oodk._command import Command, step
from oodk._common import ConfigOption, JsonOption, require_writable_file
from oodk._output import print_json, print_path, print_table

if TYPE_CHECKING:
    from oodkernels import Groups

app = typer.Typer(
    help="Divide classes into groups, for MOS: by a taxonomy, by features, or at random.",
    epilog="Then: oodk train --groups groups.json, oodk eval --groups groups.json",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

OutOption: TypeAlias = Annotated[Path, typer.Option(dir_okay=False, help="File to write, .json.")]
CountOption: TypeAlias = Annotated[int, typer.Option("-k", "--groups", min=1, help="How many.")]
SeedOption: TypeAlias = Annotated[int, typer.Option(min=0, help="The same seed, the same groups.")]


@app.command(cls=Command)
def taxonomy(
    table: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="CSV with a row per class in the order of class ids and a column `group`; or a "
            "text file with a WordNet id such as n01440764 a line.",
        ),
    ],
    out: OutOption = Path("groups.json"),
    wordnet: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of WordNet 3.0's data.noun; by default where systems keep it.",
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--groups",
            min=1,
            help="Cut WordNet's hierarchy into so many groups, instead of MOS's super-classes.",
        ),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Groups from a table, or MOS's super-classes of WordNet ids.

    MOS's super-classes are made for ImageNet-1k: what belongs to none is put into "misc", and how
    much that is is said. Where it is much, cut the hierarchy itself by -k.

    **Examples**

        oodk group taxonomy classes.csv --out groups.json

        oodk group taxonomy wnids.txt --wordnet /usr/share/wordnet

        oodk group taxonomy wnids.txt -k 12
    """
    from oodkernels import Groups

    require_writable_file(out)
    if table.suffix == ".csv" and k is not None:
        raise typer.BadParameter("is for WordNet ids, not for a table", param_hint="'-k'")
    with step("read", table):
        if table.suffix == ".csv":
            groups = Groups.from_table(table)
        else:
            wnids = table.read_text(encoding="utf-8").split()
            groups = Groups.from_wordnet(wnids, wordnet, k)
    _finish(groups, out, as_json)


@app.command(cls=Command)
def features(
    data: Annotated[
        Path,
        typer.Argument(
            exists=True, help="Training features with labels: a file, or a folder of oodk extract."
        ),
    ],
    k: CountOption = 8,
    seed: SeedOption = 0,
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, help="Labels, where they are in a file of their own."),
    ] = None,
    out: OutOption = Path("groups.json"),
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Groups by K-means on the classes' mean features, as in the MOS paper.

    **Example**

        oodk group features runs/train -k 8 --out groups.json
    """
    from oodkernels import Groups
    from oodkernels.data.samples import open_samples
    from oodkernels.detectors.statistics import ClassStatistics

    require_writable_file(out)
    with step("read", data):
        samples = open_samples(data, kind="features", labels=labels).only("features", "labels")
    statistics = ClassStatistics()
    with step("read", data):
        for batch in samples:
            statistics.update(batch["features"], batch["labels"])
    if statistics.missing:
        raise ValueError(f"{data} has no samples of class {statistics.missing[0]}")
    _finish(Groups.from_features(statistics.means, k, seed), out, as_json)


@app.command(cls=Command)
def random(
    classes: Annotated[int, typer.Argument(min=1, help="Number of classes.")],
    k: CountOption = 8,
    seed: SeedOption = 0,
    out: OutOption = Path("groups.json"),
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Groups at random, of equal size to within one class.

    **Example**

        oodk group random 1000 -k 8 --seed 0 --out groups.json
    """
    from oodkernels import Groups

    require_writable_file(out)
    _finish(Groups.random(classes, k, seed), out, as_json)


def _finish(groups: Groups, out: Path, as_json: bool) -> None:
    groups.save(out)
    sizes = dict(zip(groups.names, groups.sizes.tolist(), strict=True))
    share = sizes.get("misc", 0) / groups.num_classes
    if as_json:
        facts = {"num_classes": groups.num_classes, "sizes": sizes, "misc": share}
        print_json({"path": str(out), **facts})
        return
    print_table(("", ""), [(name, str(size)) for name, size in sizes.items()])
    if "misc" in sizes:
        cure = "; -k cuts the hierarchy into groups of its own" if share > 0.1 else ""
        typer.echo(f"{100 * share:.1f} % of the classes are in misc, with none of the names{cure}")
    print_path(out)
