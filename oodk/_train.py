"""``oodk train``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oodk._command import one_of, step
from oodk._common import (
    ConfigOption,
    GroupsOption,
    JsonOption,
    QuietOption,
    pairs,
    parse_toml,
    read_groups,
    require_writable,
    write_config,
)
from oodk._output import print_json, print_path

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from oodkernels import Groups

_ABSENT = ("absent-class", "dos", "ntom")
_CANDIDATES = {"dos": 6}
"""Outliers read for each ID sample: DOS selects one of six (Jiang et al., ICLR 2024)."""


class Optimizer(str, Enum):
    """Of the weights."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class Schedule(str, Enum):
    """Of the learning rate."""

    cosine = "cosine"
    step = "step"
    constant = "constant"


class Precision(str, Enum):
    """Of the arithmetic."""

    float32 = "32-true"
    bf16_mixed = "bf16-mixed"
    bf16 = "bf16-true"
    float64 = "64-true"


def train(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="Training samples with labels: features as `oodk extract` writes them; with "
            "--model images, as `oodk extract` reads them.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder for the result: head.safetensors (features) or model.pt (images), "
            "checkpoints, log.csv, config.toml.",
        ),
    ],
    objective: Annotated[
        str,
        typer.Option(
            parser=one_of("objectives"),
            metavar="NAME",
            help="What to minimise, of {objectives}; see below.",
        ),
    ] = "softmax",
    groups: GroupsOption = None,
    outliers: Annotated[
        str | None,
        typer.Option(
            help="Outliers of the same kind, for oe, energy, absent-class, dos, ntom, poem."
        ),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(help="Validation samples: then the best epoch is kept, not the last."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Train a whole model on images: a timm model, or package.module:callable. "
            "Without it a linear head is trained on features, which takes seconds.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="State dict for --model to start from."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Setting of the objective: --option mixup=0.1."),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="Number of classes; by default those of the groups or labels."),
    ] = None,
    size: Annotated[
        int, typer.Option(min=1, help="Side of images, for a --model without a transform.")
    ] = 224,
    augment: Annotated[
        bool, typer.Option("--augment", help="Random crops and flips of the training images.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the samples.  [default: 20]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the optimiser, instead of epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 128,
    outlier_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Outliers a step; by default as many as samples, dos: six times that."
        ),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Of the weights.")] = Optimizer.sgd,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 0.05,
    momentum: Annotated[float, typer.Option(min=0, help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(min=0, help="On every parameter.")] = 5e-4,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = Schedule.cosine,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps over which the learning rate rises.")
    ] = 0,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches whose gradients make a step.")
    ] = 1,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the arithmetic.")] = Precision.float32,
    accelerator: Annotated[
        str, typer.Option(help="auto, cpu, cuda ...; on several GPUs run it by torchrun.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints, beside one an epoch.")
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of log.csv.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Train a head on extracted features in seconds, or a model on images.

    Objectives: `softmax`; `mos` (Huang & Li 2021, needs --groups); with --outliers `oe` (outlier
    exposure), `energy`, `absent-class`, `dos`, `ntom`, `poem`; `confidence` (a branch beside the
    logits); on images `synthetic` (outliers from a GAN) and `abnormality`.

    Ctrl-C saves, and so does a kill at the last checkpoint: --resume goes on from there.

    **Examples**

        oodk train --data runs/train --objective mos --groups groups.json --out runs/mos

        oodk eval --head runs/mos/head.safetensors --id runs/val --ood runs/inat

        oodk train --data runs/train --objective dos --outliers runs/tiny --out runs/dos

        oodk train --model mypackage:make --data images/train --val images/val --out runs/flat
    """
    name = objective
    needs_outliers = name in ("oe", "energy", "ntom", "poem", *_ABSENT[:2])
    if needs_outliers != (outliers is not None):
        what = "is needed" if needs_outliers else "is of no use"
        raise typer.BadParameter(f"{what} for --objective {name}", param_hint="'--outliers'")
    if (name == "mos") != (groups is not None):
        what = "is needed" if name == "mos" else "is of no use"
        raise typer.BadParameter(f"{what} for --objective {name}", param_hint="'--groups'")
    if model is None and name in ("synthetic", "abnormality"):
        raise typer.BadParameter(f"is needed for --objective {name}", param_hint="'--model'")
    if epochs is not None and steps is not None:
        raise typer.BadParameter("give --epochs or --steps, not both", param_hint="'--steps'")
    options = {key: parse_toml(text) for key, text in pairs("--option", option or ()).items()}
    require_writable(out)
    from oodkernels.training import (
        AbnormalityObjective,
        MOSObjective,
        TrainConfig,
        Trainer,
        load_weights,
    )

    found_groups = None if groups is None else read_groups(groups)
    sources = {"train": data, "outliers": outliers, "val": val}
    sizes = {"train": batch_size, "val": batch_size}
    sizes["outliers"] = outlier_batch_size or batch_size * _CANDIDATES.get(name, 1)
    given = {key: value for key, value in sources.items() if value is not None}
    if model is None:
        network, loaders = _on_features(name, given, sizes, found_groups, classes)
    else:
        columns = None if found_groups is None else found_groups.width
        network, loaders = _on_images(
            name, model, weights, given, sizes, columns, classes, size, augment, workers
        )
    settings = TrainConfig(
        objective=name,
        options={} if name == "mos" else options,
        epochs=epochs,
        steps=steps,
        optimizer=optimizer.value,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule.value,
        warmup=warmup,
        accumulate=accumulate,
        clip_norm=clip_norm,
        ema=ema,
        precision=precision.value,
        accelerator=accelerator,
        seed=seed,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
    )
    if resume or not (out / "last.pt").exists():  # else it is refused
        write_config(ctx, out)
    made = None if found_groups is None else MOSObjective(found_groups, **options)
    trainer = Trainer(network, made, settings, folder=out, progress=not quiet)
    with step("train on", data):
        result = trainer.fit(
            loaders["train"], loaders.get("outliers"), loaders.get("val"), resume=resume
        )
    if not trainer.fabric.is_global_zero:
        return
    best = result.best_path or result.last_path
    if isinstance(trainer.objective, AbnormalityObjective):
        trainer.objective.detector.save(out / "abnormality.safetensors")
        best = result.last_path  # the best may be of the first phase, which the detector is not
    assert best is not None
    load_weights(network.cpu(), best)
    path = _save(network, out)
    last = result.history[-1]
    if as_json:
        print_json({"path": str(path), "steps": result.steps, "best": result.best, **last})
        return
    shown = {k: v for k, v in last.items() if k not in ("step", "epoch", "lr")}
    figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    typer.echo(f"{result.steps} steps: {figures}", err=True)
    print_path(path)


def _on_features(
    name: str,
    sources: dict[str, str],
    sizes: dict[str, int],
    groups: Groups | None,
    classes: int | None,
) -> tuple[nn.Module, dict[str, DataLoader[Any]]]:
    """A head, and loaders of what it is trained on."""
    from oodkernels.data.samples import open_samples
    from oodkernels.nn.heads import Head
    from oodkernels.training import tensor_loader

    loaders = {}
    names: tuple[str, ...] | None = None
    width = 0
    for key, path in sources.items():
        if not Path(path).exists():
            option = "--data" if key == "train" else f"--{key}"
            raise typer.BadParameter(f"there is no {path!r}", param_hint=f"'{option}'")
        with step("read", path):
            samples = open_samples(path, kind="features")
            if key == "train":
                names = samples.class_names
            elif key == "val" and names is not None and samples.class_names is not None:
                samples = samples.with_classes(names)
            tensors = [samples.read("features")]
            if key != "outliers":
                tensors.append(samples.read("labels"))
        if key == "train":
            width = tensors[0].shape[1]
            if groups is not None:
                classes = groups.num_classes
            classes = classes or (len(names) if names else int(tensors[1].max()) + 1)
        wrong = (tensors[-1] < 0) | (tensors[-1] >= (classes or 0))
        if key != "outliers" and bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"{path}: labels must be class ids 0..{(classes or 0) - 1}, got "
                f"{int(tensors[1][first])} for sample {first}"
            )
        if tensors[0].shape[1] != width:
            raise ValueError(
                f"{path}: features must have width {width}, as those of --data, got "
                f"{tensors[0].shape[1]}"
            )
        loaders[key] = tensor_loader(*tensors, batch_size=sizes[key], shuffle=key != "val")
    assert classes is not None
    columns = groups.width if groups is not None else classes + (name in _ABSENT)
    head = Head(
        width,
        columns,
        groups,
        name == "confidence",
        absent=groups is None and name in _ABSENT,
        class_names=names,
    )
    return head, loaders


def _on_images(
    name: str,
    spec: str,
    weights: Path | None,
    sources: dict[str, str],
    sizes: dict[str, int],
    columns: int | None,
    classes: int | None,
    size: int,
    augment: bool,
    workers: int,
) -> tuple[nn.Module, dict[str, DataLoader[Any]]]:
    """A model, and loaders of the images it is trained on."""
    from torch.utils.data import DataLoader

    from oodkernels.data import (
        ImageFiles,
        Shards,
        ToTensor,
        augmented,
        load_model,
        open_images,
    )

    opened = {}
    names: Sequence[str] | None = (
        None  # of the classes of the training set, to which those of the others are matched
    )
    for key in sorted(sources, key=("train", "val", "outliers").index):
        opened[key] = open_images(sources[key], class_names=names if key == "val" else None)
        names = opened["train"].class_names
    for key, images in opened.items():
        if key != "outliers" and isinstance(images, ImageFiles) and min(images.labels) < 0:
            raise ValueError(f"{sources[key]}: images must have labels")
    if classes is None and isinstance(images := opened["train"], ImageFiles):
        classes = len(names) if names is not None else max(images.labels) + 1
    if columns is None and classes is not None:
        columns = classes + (name in _ABSENT)
    network, transform = load_model(spec, weights, columns)
    if transform is None and name == "synthetic":  # whose generator makes values in [0, 1]
        transform = ToTensor(size, mean=(0, 0, 0), std=(1, 1, 1))
    transform = transform or ToTensor(size)
    loaders = {}
    for key, images in opened.items():
        random = augment and key != "val"
        images.transform = augmented(network, transform) if random else transform
        loaders[key] = DataLoader(
            images,
            sizes[key],
            shuffle=None if isinstance(images, Shards) else key != "val",
            num_workers=workers,
            collate_fn=_pairs,
        )
    return network, loaders


def _pairs(samples: Sequence[Any]) -> Any:
    """Images and labels of samples."""
    import torch

    images, labels, _ = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _save(network: nn.Module, out: Path) -> Path:
    import torch

    from oodkernels._files import replacing
    from oodkernels.nn.heads import Head

    if isinstance(network, Head):
        path = out / "head.safetensors"
        network.save(path)
        return path
    path = out / "model.pt"
    with replacing(path) as temporary:
        torch.save(network.state_dict(), temporary)
    return path
