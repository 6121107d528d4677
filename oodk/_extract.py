"""``oodk extract``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from oodk._command import one_of, step
from oodk._common import (
    ConfigOption,
    QuietOption,
    require_writable,
    write_config,
)
from oodk._images import (
    DeviceOption,
    Images,
    ModelOption,
    SizeOption,
    WeightsOption,
    WorkersOption,
)
from oodk._output import print_path

SkipBadOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out images that cannot be read, and name them in skipped.txt, instead of "
        "stopping at the first.",
    ),
]


class DType(str, Enum):
    """Type of the output."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def _said_here(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    """A configuration file may come from somebody else, and is not to run commands."""
    source = ctx.get_parameter_source(str(param.name))
    if value and source is not None and source.name != "COMMANDLINE":
        raise typer.BadParameter("must be given on the command line, got it from a file")
    return value


def extract(
    ctx: typer.Context,
    model: ModelOption,
    data: Annotated[
        str,
        typer.Option(
            help="Folder with a folder of images per class; text file with `path` or `path label` "
            "a line; or WebDataset shards, as in 'train-{000..099}.tar'.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for what is extracted.")],
    weights: WeightsOption = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer whose output are the features. By default they are what the classifier "
            "reads.",
        ),
    ] = None,
    axis: Annotated[
        int | None,
        typer.Option(
            help="Axis of the features where the layer gives more than two and does not tell: 1 "
            "for (N, d, H, W), -1 for (N, T, d).",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="What the paths of a list are relative to; by default its folder.",
        ),
    ] = None,
    size: SizeOption = None,
    dtype: Annotated[DType, typer.Option(help="Type of what is written.")] = DType.float16,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            parser=one_of("extract_formats"),
            metavar="NAME",
            help="Of {extract_formats}: one samples.safetensors, or a .npy for each of logits, "
            "features and labels.",
        ),
    ] = "safetensors",
    classes: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Names of the model's classes in their order, to which those of the folders are "
            "matched: a text file with one a line, or the folder that the model was trained on. By "
            "default those in the weights of `oodk train`, or ImageNet's for a model of timm.",
        ),
    ] = None,
    allow_shell: Annotated[
        bool,
        typer.Option(
            "--allow-shell",
            callback=_said_here,
            help="Let shards be more than files: commands (`pipe:`) and addresses. Only on the "
            "command line.",
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images sent through the model at once.")
    ] = 64,
    part_size: Annotated[
        int, typer.Option(min=1, help="Images after which progress is safe on disk.")
    ] = 8192,
    skip_bad: SkipBadOption = False,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Send images through a model once, and keep its logits and penultimate features.

    Killed and started again, it goes on where it was; no file is ever half-written under its final
    name. What it writes is read by all other commands: give them the folder. Several processes,
    `torchrun --nproc-per-node=4 -m oodkernels extract ...`, each take a share of the files or
    shards, and write the same bytes as one.

    **Examples**

        oodk extract --model resnet50.a1_in1k --data imagenet/val --out runs/val --workers 8

        oodk extract --model mypackage.models:make --data list.txt --out runs/svhn --device cuda

        oodk extract --model vit_base_patch16_224 --data 'shards/{000..099}.tar' --out runs/train
    """
    from oodkernels._files import file_digest
    from oodkernels._progress import progress
    from oodkernels._ranks import joined
    from oodkernels.data import (
        EXTRACT_FORMATS,
        ExtractionPlan,
        ImageFiles,
        Shards,
        ToTensor,
        extract_images,
        is_extracted,
        open_samples,
        read_class_names,
    )

    if dtype.value not in (types := EXTRACT_FORMATS[file_format]):
        raise typer.BadParameter(
            f"must be one of {', '.join(types)} for {file_format}, got {dtype.value}",
            param_hint="'--dtype'",
        )
    require_writable(out)
    how = Images(str(model), weights, size, batch_size, workers, device, allow_shell)
    network, transform = how.network, how.transform
    images = how.open(data, root).images
    images.skip_bad = skip_bad
    own_names = getattr(network, "class_names", None)
    names = own_names if classes is None else read_class_names(classes)
    own = images.class_names or ()
    if names is not None and isinstance(images, ImageFiles) and not set(names).isdisjoint(own):
        images = images.matched(names, data)
    meaning = how.meaning
    plan = ExtractionPlan(
        model=str(model),
        weights=None if weights is None else f"{weights.resolve()} {file_digest(weights)}",
        layer=layer,
        data=f"{data} {images.digest()}",
        transform=repr(transform) if isinstance(transform, ToTensor) else "of the model",
        dtype=dtype.value,
        model_classes=names,
        absent_column=None if meaning is None else meaning.absent_column,
        groups=None if meaning is None or meaning.groups is None else meaning.groups.to_json(),
        axis=axis,
    )
    total = None if isinstance(images, Shards) else len(images)
    with joined("oodk extract") as (rank, _), step("extract to", out):
        if not rank and not is_extracted(out, plan, file_format):
            write_config(ctx, out)
        with progress(not quiet and not rank) as shown:
            task = shown.add_task("extract", total=total)
            paths = extract_images(
                network,
                images,
                out,
                plan,
                file_format=file_format,
                batch_size=batch_size,
                part_size=part_size,
                workers=workers,
                device=how.device,
                on_batch=lambda done: shown.update(task, completed=done),
            )
        if rank:
            return
    found = open_samples(out)
    if (why := found.without_accuracy) is not None:
        typer.echo(f"no accuracy later on: {why} (--classes says which they are)", err=True)
    if (out / "skipped.txt").exists():
        count = len((out / "skipped.txt").read_text(encoding="utf-8").splitlines())
        typer.echo(f"left out {count} images that cannot be read: {out / 'skipped.txt'}", err=True)
    for path in paths:
        print_path(path)
