"""Training: a loop over Lightning Fabric for every objective.

Needs the extra ``train``: ``pip install oodkernels[train]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from oodkernels._optional import require
from oodkernels.training._batches import Loader
from oodkernels.training._data import FitData
from oodkernels.training._fit import Fit
from oodkernels.training.base import Objective
from oodkernels.training.checkpoint import PathLike
from oodkernels.training.config import TrainConfig
from oodkernels.training.objectives import make_objective

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

OnEpoch: TypeAlias = Callable[[int], None]

__all__ = ["FitResult", "Trainer"]


class FitResult(NamedTuple):
    """What :meth:`Trainer.fit` returns."""

    steps: int
    """Optimiser steps done, those of the runs before included."""
    history: list[dict[str, float]]
    """Rows of the log: "step", "epoch", "lr", "loss" and the objective's figures, each the mean
    since the row before; at the end of an epoch "val_loss" and "val_accuracy"."""
    best: float | None
    """The best ``TrainConfig.monitor``; None without validation."""
    last_path: Path | None
    """The last checkpoint; None without a folder."""
    best_path: Path | None
    """The best checkpoint; None without a folder or validation."""


class Trainer:
    """Trains a classifier by an objective, on one device or, under ``torchrun``, on several.

    It gives the same result for the same seed, and a run that was killed and is resumed ends as one
    that was not interrupted; on the CPU and on one machine with the same number of threads, bit by
    bit. Several processes see the batches that one would with as many times ``accumulate``.

    A folder gets ``last.pt``, ``best.pt``, the log ``log.csv`` and the configuration
    ``train.toml``. The two checkpoints, and nothing but tensors and plain values in them, replace
    the ones before whole or not at all; :func:`load_weights` reads a model from one.

    Args:
        model: x -> logits, trained in place. Objectives that read features take the input of its
            last linear layer.
        objective: What to minimise, or its name in :data:`oodkernels.training.OBJECTIVES`; None:
            as the configuration names it.
        config: How; None: all defaults.
        optimizer: Parameters -> optimiser; None: as the configuration has it.
        folder: Where to write; None: nowhere.
        progress: Whether to show a bar on standard error; needs rich.
        tensorboard: Whether to write for TensorBoard into the folder; needs tensorboard.
        loggers: Of Lightning Fabric, given every row of the log.
        on_epoch: Called with the number of epochs done.

    Example:
        >>> config = TrainConfig(epochs=100, lr=0.1, schedule="step", weight_decay=1e-4)
        >>> trainer = Trainer(model, "dos", config, folder="run", progress=True)
        >>> trainer.fit(id_loader, candidate_loader, val_loader, resume=True)

    Raises:
        ModuleNotFoundError: lightning-fabric is missing.
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: Unknown objective or options, an objective given twice, or ``tensorboard``
            without a folder.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | str | None = None,
        config: TrainConfig | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        folder: PathLike | None = None,
        progress: bool = False,
        tensorboard: bool = False,
        loggers: Sequence[Logger] = (),
        on_epoch: OnEpoch = lambda epoch: None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Trainer: model must be an nn.Module, got {type(model).__name__}")
        if tensorboard and folder is None:
            raise ValueError("Trainer: tensorboard must have a folder to write to, got None")
        self.model = model
        config = config or TrainConfig()
        if isinstance(objective, Objective):
            if config.options or config.objective not in ("softmax", objective.name):
                raise ValueError(
                    "Trainer: objective must be given itself or in the configuration, got both, "
                    f"{objective.name!r} and {config.objective!r} with options {config.options}"
                )
        else:
            if objective is not None and config.objective not in ("softmax", objective):
                raise ValueError(
                    f"Trainer: objective must be given once, got {objective!r} and, in the "
                    f"configuration, {config.objective!r}"
                )
            objective = make_objective(objective or config.objective, config.options)
        self.config = replace(config, objective=objective.name, options=objective.options)
        self.objective = objective
        self.folder = None if folder is None else Path(folder)
        self.ema: AveragedModel | None = None
        self.make_optimizer = optimizer or self._default_optimizer
        self.progress, self.on_epoch = progress, on_epoch
        self.tensorboard, self.loggers = tensorboard, list(loggers)
        self.fabric = _fabric(self.config, self.objective)

    def fit(
        self,
        train_loader: Loader,
        outlier_loader: Loader | None = None,
        val_loader: Loader | None = None,
        *,
        resume: bool | PathLike = False,
    ) -> FitResult:
        """Train, and leave the model in evaluation mode.

        Of a model in training mode, parts that are in evaluation mode stay there; of one that is in
        evaluation mode as a whole, parts whose parameters are all frozen. So the statistics of a
        frozen part's BatchNorm are left alone. Where training fails, each part gets its mode back.

        torch's, NumPy's and Python's global random numbers are left as they were. Ctrl-C ends the
        step, saves and raises ``KeyboardInterrupt``; pressed again it stops at once.

        Args:
            train_loader: Batches (x, y, ...) of inputs and class ids. Its sampler gives the order,
                drawn anew each epoch; batch sizes are per process.
            outlier_loader: Batches x or (x, ...) of outliers for objectives that take them, paired
                with those of ``train_loader`` and begun again when they end. DOS: the candidates of
                a step. NTOM and POEM: its data set is the pool, read in its batches to be mined;
                what is selected is dealt out over the epoch, each outlier once.
            val_loader: Batches (x, y, ...), for loss and accuracy at the end of every epoch.
            resume: Go on from a checkpoint: its path, or True for the folder's last one, if any.
                Objective and options, configuration, order and first batch of the data have to be
                the same; only the number of epochs or steps, ``monitor`` and what does not change
                the result may differ.

        Raises:
            ValueError: The folder holds a run and ``resume`` is False, a checkpoint is not of this
                objective, configuration, model and data, a loader is missing or unfit, or the model
                has no column for a class id.
            TypeError: What the optimiser or objective keeps could not be read back from a file.
            FloatingPointError: Loss or gradient is not finite; model, objective and checkpoints are
                those before the step that the message names.
            RuntimeError: A sample could not be read, or another run writes to the folder; the
                message names it.
            OSError: A file could not be written; what was there before still is.
        """
        self.fabric.launch()
        loaders = (train_loader, outlier_loader, val_loader)
        run = Fit(self, FitData(self.fabric, self.objective, self.config, *loaders))
        run.run(resume)
        folder = self.folder
        return FitResult(
            steps=run.step,
            history=run.log.rows,
            best=run.best,
            last_path=None if folder is None else folder / "last.pt",
            best_path=None if folder is None or run.best is None else folder / "best.pt",
        )

    def _default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, c.lr, c.momentum, 0, c.weight_decay, c.nesterov and c.momentum > 0
            )
        kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, c.lr, weight_decay=c.weight_decay)


def _fabric(config: TrainConfig, objective: Objective) -> Fabric:
    require("lightning_fabric", "train", "Trainer")
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    if not torch.distributed.is_torchelastic_launched():
        return Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return Fabric(
        accelerator=config.accelerator,
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        strategy=DDPStrategy(find_unused_parameters=objective.skips_parameters),
        precision=config.precision,
    )
