"""``oodk train``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from oodk._training_data import TrainingData

if TYPE_CHECKING:
    from torch import nn


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
            help="What to minimise, of {objectives}; see above.",
        ),
    ] = "softmax",
    groups: GroupsOption = None,
    outliers: Annotated[
        str | None,
        typer.Option(help="Outliers of the same kind, for the objectives that need some."),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(help="Validation samples: then the best epoch is kept, not the last."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Train a whole model on images: a timm model, or package.module:callable. "
            "Without it a head is trained on features, which takes seconds.",
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
    hidden: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Width of a hidden layer of the head; give it again for more layers."
        ),
    ] = None,
    standardize: Annotated[
        bool,
        typer.Option(
            "--standardize",
            help="Bring each feature to mean 0 and standard deviation 1 first; the head keeps how.",
        ),
    ] = False,
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
            min=1, help="Outliers a step; by default as many for each sample as the authors'."
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="`sgd`, `adam` or `adamw`.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 0.05,
    momentum: Annotated[float, typer.Option(min=0, help="Of SGD.")] = 0.9,
    nesterov: Annotated[
        bool, typer.Option("--nesterov/--no-nesterov", help="Whether it is Nesterov's.")
    ] = True,
    weight_decay: Annotated[float, typer.Option(min=0, help="On every parameter.")] = 5e-4,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate: `cosine` to 0, `step` or `constant`.")
    ] = "cosine",
    milestones: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the steps after which `step` multiplies the learning rate by --gamma; "
            "give it again for more.  [default: 0.5, 0.75, 0.9]",
        ),
    ] = None,
    gamma: Annotated[float, typer.Option(help="Factor at each of --milestones.")] = 0.1,
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
    precision: Annotated[
        str, typer.Option(help="`32-true`, `64-true`, `bf16-mixed` or `bf16-true`.")
    ] = "32-true",
    accelerator: Annotated[
        str, typer.Option(help="auto, cpu, cuda ...; on several GPUs run it by torchrun.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints, beside one an epoch.")
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of log.csv.")] = 50,
    monitor: Annotated[
        str,
        typer.Option(help="What the best epoch is best in: `val_accuracy` or `val_loss`."),
    ] = "val_accuracy",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Train a head on extracted features in seconds, or a model on images.

    Objectives, what they need, and their --option with defaults:

    {objective_options}

    Ctrl-C saves, and so does a kill at the last checkpoint: --resume goes on from there.

    **Examples**

        oodk train --data runs/train --objective mos --groups groups.json --out runs/mos

        oodk eval --head runs/mos/head.safetensors --id runs/val --ood runs/inat

        oodk train --data runs/train --objective dos --outliers runs/tiny --out runs/dos

        oodk train --model mypackage:make --data images/train --val images/val --out runs/flat
    """
    from oodkernels.nn import Head, save_weights
    from oodkernels.training import (
        OBJECTIVES,
        AbnormalityObjective,
        TrainConfig,
        Trainer,
        load_weights,
    )

    spec = OBJECTIVES[objective]
    for needed, flag, given in (
        ("outliers", "--outliers", outliers),
        ("groups", "--groups", groups),
        ("images", "--model", model),
    ):
        if needed in spec.needs and given is None:
            raise typer.BadParameter(
                f"is needed for --objective {objective}", param_hint=f"'{flag}'"
            )
        if needed not in spec.needs and given is not None and flag != "--model":
            raise typer.BadParameter(
                f"is of no use for --objective {objective}", param_hint=f"'{flag}'"
            )
    if model is not None and (hidden or standardize):
        flag = "--hidden" if hidden else "--standardize"
        raise typer.BadParameter("is of no use with --model", param_hint=f"'{flag}'")
    if epochs is not None and steps is not None:
        raise typer.BadParameter("give --epochs or --steps, not both", param_hint="'--steps'")
    options = {key: parse_toml(text) for key, text in pairs("--option", option or ()).items()}
    require_writable(out)
    sources = {"train": data, "val": val, "outliers": outliers}
    sizes = {"train": batch_size, "val": batch_size}
    sizes["outliers"] = outlier_batch_size or batch_size * spec.per_sample
    task = TrainingData(
        {key: value for key, value in sources.items() if value is not None},
        sizes,
        None if groups is None else read_groups(groups),
        "absent class" in spec.needs,
        classes,
    )
    if model is None:
        confidence = "confidence" in spec.needs
        network: nn.Module = task.head(confidence, hidden or (), standardize, seed)
    else:
        network = task.model(model, weights, size, augment, workers, objective == "synthetic")
    if task.groups is not None:
        options["groups"] = task.groups.to_json()
    own = {f.name: ctx.params.get(f.name) for f in fields(TrainConfig)}
    own |= {"objective": objective, "options": options}
    settings = TrainConfig(**{k: v for k, v in own.items() if v is not None})
    if resume or not (out / "last.pt").exists():  # else it is refused
        write_config(ctx, out)
    trainer = Trainer(network, config=settings, folder=out, progress=not quiet)
    with step("train on", data):
        result = trainer.fit(
            task.loaders["train"],
            task.loaders.get("outliers"),
            task.loaders.get("val"),
            resume=resume,
        )
    if not trainer.fabric.is_global_zero:
        return
    best = result.best_path or result.last_path
    if isinstance(trainer.objective, AbnormalityObjective):
        trainer.objective.detector.save(out / "abnormality.safetensors")
        best = result.last_path  # the best may be of the first phase, which the detector is not
    assert best is not None
    load_weights(network.cpu(), best)
    path = out / ("head.safetensors" if isinstance(network, Head) else "model.pt")
    with step("write", path):
        if isinstance(network, Head):
            network.save(path)
        else:
            save_weights(
                network,
                path,
                task.columns,
                absent=task.absent,
                groups=task.groups,
                class_names=task.names,
            )
    last = result.history[-1]
    if as_json:
        print_json({"path": str(path), "steps": result.steps, "best": result.best, **last})
        return
    shown = {k: v for k, v in last.items() if k not in ("step", "epoch", "lr")}
    figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    typer.echo(f"{result.steps} steps: {figures}", err=True)
    print_path(path)
