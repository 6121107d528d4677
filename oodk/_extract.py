"""``oodk extract``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from oodk._command import step
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


class Format(str, Enum):
    """Of the output."""

    safetensors = "safetensors"
    npy = "npy"


class DType(str, Enum):
    """Of the output."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


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
        Format,
        typer.Option(
            "--format",
            help="One samples.safetensors, or a .npy for each of logits, features and labels.",
        ),
    ] = Format.safetensors,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images sent through the model at once.")
    ] = 64,
    part_size: Annotated[
        int, typer.Option(min=1, help="Images after which progress is safe on disk.")
    ] = 8192,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Send images through a model once, and keep its logits and penultimate features.

    Killed and started again, it goes on where it was; no file is ever half-written under its final
    name. What it writes is read by all other commands: give them the folder.

    **Examples**

        oodk extract --model resnet50.a1_in1k --data imagenet/val --out runs/val --workers 8

        oodk extract --model mypackage.models:make --data list.txt --out runs/svhn --device cuda

        oodk extract --model vit_base_patch16_224 --data 'shards/{000..099}.tar' --out runs/train
    """
    from oodkernels._progress import progress
    from oodkernels.data.extract import (
        Plan,
        Shards,
        ToTensor,
        extract_images,
        is_extracted,
    )

    if dtype is DType.bfloat16 and file_format is Format.npy:
        raise typer.BadParameter(".npy has no bfloat16", param_hint="'--dtype'")
    require_writable(out)
    how = Images(str(model), weights, size, batch_size, workers, device)
    network, transform = how.network, how.transform
    images = how.open(data, root).images
    plan = Plan(
        model=str(model),
        weights=None if weights is None else str(weights.resolve()),
        layer=layer,
        data=f"{data} {images.digest()}",
        transform=repr(transform) if isinstance(transform, ToTensor) else "of the model",
        dtype=dtype.value,
    )
    if not is_extracted(out, plan, file_format.value):
        write_config(ctx, out)
    total = None if isinstance(images, Shards) else len(images)
    with step("extract from", data), progress(not quiet) as shown:
        task = shown.add_task("extract", total=total)
        paths = extract_images(
            network,
            images,
            out,
            plan,
            file_format=file_format.value,
            batch_size=batch_size,
            part_size=part_size,
            workers=workers,
            device=how.device,
            on_batch=lambda done: shown.update(task, completed=done),
        )
    for path in paths:
        print_path(path)
