"""Training: a loop over Lightning Fabric for every objective.

Needs the extra ``train``: ``pip install oodkernels[train]``.
"""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from oodkernels._files import replacing, write_text
from oodkernels._progress import progress
from oodkernels.training._batches import Batch, Batches, rng_state, seeded, set_rng_state
from oodkernels.training.objectives import (
    OBJECTIVES,
    Context,
    Objective,
    PoolObjective,
    make_objective,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

PathLike: TypeAlias = str | os.PathLike[str]
Loader: TypeAlias = DataLoader[Any]
OnEpoch: TypeAlias = Callable[[int], None]

__all__ = [
    "FitResult",
    "TrainConfig",
    "Trainer",
    "load_checkpoint",
    "load_weights",
    "reproducible",
    "tensor_loader",
]

_FORMAT, _VERSION = "oodkernels.training", 1
# What a resumed run may have otherwise than the run before.
_FREE = frozenset(
    {"accelerator", "accumulate", "checkpoint_every", "epochs", "log_every", "monitor", "steps"}
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Plain values only: :meth:`to_toml` gives a file that gives it back.

    Attributes:
        objective: Name in :data:`oodkernels.training.OBJECTIVES`.
        options: Of the objective, by name.
        epochs: Passes over the training data; or give ``steps``.
        steps: Optimiser steps; or give ``epochs``.
        optimizer: "sgd", "adam" or "adamw".
        lr: Learning rate after the warm-up.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: L2 penalty (AdamW: decay) on every parameter.
        schedule: Of the learning rate over the steps: "cosine" to 0, "step", or "constant".
        milestones: Shares of the steps after which "step" multiplies by ``gamma``.
        gamma: See ``milestones``.
        warmup: Steps over which the learning rate first rises linearly.
        accumulate: Batches a step, on each process. The gradient is that of one batch of all their
            samples; the last step of an epoch takes the batches that are left.
        clip_norm: Largest norm of the gradient; None: any.
        ema: Decay of an exponential moving average of the weights, which is then what is validated;
            None: no average.
        precision: "32-true", "64-true", "bf16-mixed" or "bf16-true".
        accelerator: "auto", "cpu", "cuda" ..., as Lightning Fabric has it.
        seed: Of the order of samples and all random numbers of the run, but not of the model's
            initial weights.
        log_every: Steps between rows of the log; there is one at the end of every epoch too.
        checkpoint_every: Steps between checkpoints; there is one at the end of every epoch too.
        monitor: What the best checkpoint is best in: "val_accuracy" or "val_loss".

    Raises:
        ValueError: A value is out of range, or both ``epochs`` and ``steps`` are given.
    """

    objective: str = "softmax"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    steps: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    gamma: float = 0.1
    warmup: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    precision: Literal["32-true", "64-true", "bf16-mixed", "bf16-true"] = "32-true"
    accelerator: str = "auto"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int | None = None
    monitor: Literal["val_accuracy", "val_loss"] = "val_accuracy"

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 20)
        elif self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"TrainConfig: epochs or steps must be given, got both, {self.epochs} and "
                f"{self.steps}"
            )
        for name, choices in (
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("cosine", "step", "constant")),
            ("precision", ("32-true", "64-true", "bf16-mixed", "bf16-true")),
            ("monitor", ("val_accuracy", "val_loss")),
        ):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("epochs", "steps", "accumulate", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        for name in ("warmup", "seed", "weight_decay", "momentum"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("lr", 0 < self.lr < math.inf, "positive and finite")
        self._check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive")
        self._check("ema", self.ema is None or 0 <= self.ema < 1, "in [0, 1)")
        self._check("milestones", all(0 < m < 1 for m in self.milestones), "in (0, 1)")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Names and values, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of :meth:`to_dict`.

        Raises:
            ValueError: A name is unknown, or a value out of range.
        """
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"TrainConfig.from_dict: unknown {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_toml(self) -> str:
        """As a TOML file."""
        tomli_w = _import("tomli_w", "TrainConfig.to_toml")
        text: str = tomli_w.dumps(self.to_dict())
        return text

    @classmethod
    def from_toml(cls, text: str) -> TrainConfig:
        """The configuration of :meth:`to_toml`.

        Raises:
            ValueError: Not TOML, a name is unknown, or a value out of range.
        """
        return cls.from_dict(_toml().loads(text))


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
        ValueError: Unknown objective or options, or ``tensorboard`` without a folder.
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
            # Whatever the configuration says.
            kind = type(objective)
            names = [name for name, made in OBJECTIVES.items() if made is kind]
            config = replace(config, objective=(names or [kind.__name__])[0], options={})
        else:
            config = replace(config, objective=objective or config.objective)
            objective = make_objective(config.objective, config.options)
        self.config, self.objective = config, objective
        self.folder = None if folder is None else Path(folder)
        self.ema: AveragedModel | None = None
        self._optimizer = optimizer or self._default_optimizer
        self._progress, self._on_epoch = progress, on_epoch
        self._tensorboard, self._loggers = tensorboard, list(loggers)
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

        torch's, NumPy's and Python's global random numbers are left as they were. Ctrl-C ends the
        step, saves and raises ``KeyboardInterrupt``; pressed again it stops at once.

        Args:
            train_loader: Batches (x, y, ...) of inputs and class ids. Its sampler gives the order,
                drawn anew each epoch; batch sizes are per process.
            outlier_loader: Batches x or (x, ...) of outliers for objectives that take them, paired
                with those of ``train_loader`` and begun again when they end. DOS: the candidates of
                a step. NTOM and POEM: its data set is the pool.
            val_loader: Batches (x, y, ...), for loss and accuracy at the end of every epoch.
            resume: Go on from a checkpoint: its path, or True for the folder's last one, if any.

        Raises:
            ValueError: The folder holds a run and ``resume`` is False, a checkpoint does not fit,
                or a loader is missing or unfit.
            FloatingPointError: Loss or gradient is not finite; weights and checkpoints are those
                before the step that the message names.
            RuntimeError: A sample could not be read; the message names it.
            OSError: A file could not be written; what was there before still is.
        """
        run = _Run(self, train_loader, outlier_loader, val_loader)
        return run.fit(resume)

    def _default_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, c.lr, c.momentum, 0, c.weight_decay, c.nesterov and c.momentum > 0
            )
        kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, c.lr, weight_decay=c.weight_decay)


class _Step(nn.Module):
    """Model and objective as one module, whose forward is a step's loss: what DDP has to wrap."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.step(self.model, x, y, outliers, context)


class _Data(NamedTuple):
    """A batch, on the device."""

    x: Tensor
    y: Tensor
    outliers: Tensor | None
    counted: int
    """Samples that count."""
    samples: Any
    """Their indices."""


class _Run:
    """One call of :meth:`Trainer.fit`."""

    def __init__(
        self,
        trainer: Trainer,
        train_loader: Loader,
        outlier_loader: Loader | None,
        val_loader: Loader | None,
    ) -> None:
        self.trainer = trainer
        self.config, self.objective = trainer.config, trainer.objective
        self.fabric = trainer.fabric
        self.fabric.launch()
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        seed = self.config.seed
        self.train = Batches(train_loader, "training", seed)
        self.validation = None if val_loader is None else Batches(val_loader, "validation", seed)
        self.outliers: Batches | None = None
        if self.objective.outliers is not None:
            if outlier_loader is None:
                raise ValueError(
                    f"Trainer.fit: {type(self.objective).__name__} must have an outlier_loader, "
                    "got None"
                )
            self.outliers = Batches(outlier_loader, "outlier", seed + 1)
            mined = isinstance(self.objective, PoolObjective)
            if mined and (self.train.iterable or self.outliers.iterable):
                raise ValueError(
                    "Trainer.fit: data sets must have indices for a pool to be mined, got an "
                    "IterableDataset"
                )
        elif outlier_loader is not None:
            raise ValueError(
                f"Trainer.fit: {type(self.objective).__name__} takes no outliers, got an "
                "outlier_loader"
            )

        # An iterable data set is divided by itself, so each process has batches of its own.
        batches = self.train.per_epoch
        if self.train.iterable and batches is not None:
            batches *= self.world
        self.window = self.config.accumulate * self.world
        self.batches = batches
        if self.config.steps is not None:
            self.steps = self.config.steps
        elif batches is not None and self.config.epochs is not None:
            self.steps = self.config.epochs * -(-batches // self.window)
        else:
            raise ValueError(
                "Trainer.fit: TrainConfig.steps must be given for training data without a length"
            )
        self.per_epoch = self.steps if batches is None else -(-batches // self.window)

        self.step = 0
        self.best: float | None = None
        self.meter: dict[str, float] = {}
        self.metered = 0
        self.log = _Log(self._path("log.csv"))

    def fit(self, resume: bool | PathLike) -> FitResult:
        trainer, fabric, config = self.trainer, self.fabric, self.config
        checkpoint = self._open(resume)
        with ExitStack() as stack:
            stack.enter_context(_global_rng(config.seed + self.rank, fabric.device))
            with seeded((config.seed,)):  # the same on every process
                self.objective.prepare(trainer.model, self._sample)
            module = _Step(trainer.model, self.objective).train()
            self.parameters = [p for p in module.parameters() if p.requires_grad]
            if not self.parameters:
                raise ValueError("Trainer.fit: the model must have a parameter to train, got none")
            self.optimizer = trainer._optimizer(self.parameters)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
            self.module, self.stepper = fabric.setup(module, self.optimizer)
            trainer.ema = self.ema = (
                None
                if config.ema is None
                else AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
            )
            if checkpoint is not None:
                self._restore(checkpoint)
            self.loggers = [*trainer._loggers, *self._tensorboard()]
            for logger in self.loggers:
                stack.callback(logger.finalize, "finished")
            interrupted = stack.enter_context(_sigint())
            show = stack.enter_context(self._bar())
            self._loop(interrupted, show)
        fabric.barrier()  # no process is to go on before the files are there
        module.eval()
        best_path = self._path("best.pt")
        return FitResult(
            steps=self.step,
            history=self.log.rows,
            best=self.best,
            last_path=self._path("last.pt"),
            best_path=best_path if self.best is not None else None,
        )

    def _sample(self) -> Tensor:
        return self._unpack(next(self.train.read(range(1))), self.train)[0]

    # The loop

    def _loop(self, interrupted: _Interrupted, show: Callable[[int, float], None]) -> None:
        train = self.train.read(
            (k for step in range(self.step, self.steps) for k in self._share(step)[0]),
            self._drawn(self.step),
        )
        outliers: Iterator[Batch] | None = None
        while self.step < self.steps:
            epoch, position = divmod(self.step, self.per_epoch)
            context = Context(self.step, self.steps, epoch, self.fabric)
            if self.outliers is not None:
                pooled = isinstance(self.objective, PoolObjective)
                if pooled and position == 0:
                    self._mine(epoch)
                if outliers is None or (pooled and position == 0):
                    outliers = self._read_outliers(epoch if pooled else None)
            try:
                batches = self._fetch(train, outliers)
            except RuntimeError:
                if not interrupted.wanted or self.world > 1:
                    raise
                # An iterable data set's workers got the Ctrl-C too.
                self._save("last.pt")
                raise KeyboardInterrupt(self._farewell()) from None
            figures = self._train_step(context, batches)
            self.step += 1
            show(self.step, figures["loss"])
            for name, value in figures.items():
                self.meter[name] = self.meter.get(name, 0.0) + value
            self.metered += 1

            ended = self.step % self.per_epoch == 0 or self.step == self.steps
            validation = self._validate() if ended else {}
            if ended or self.step % self.config.log_every == 0:
                self._write_row(epoch, validation)
            if self._is_best(validation):
                self._save("best.pt")
            stop = self._any(interrupted.wanted)
            if ended or stop or self._due():
                self._save("last.pt")
            if ended and self.fabric.is_global_zero:
                self.trainer._on_epoch(epoch + 1)
            if stop and self.step < self.steps:
                raise KeyboardInterrupt(self._farewell())

    def _fetch(self, train: Iterator[Batch], outliers: Iterator[Batch] | None) -> list[_Data]:
        batches = []
        for real in self._share(self.step)[1]:
            batch = next(train)
            x, y = self._unpack(batch, self.train)
            o = None
            if outliers is not None:
                assert self.outliers is not None
                o, _ = self._unpack(next(outliers), self.outliers)
            batches.append(_Data(x, self._labels(y, self.train), o, len(x) * real, batch.samples))
        return batches

    def _train_step(self, context: Context, batches: Sequence[_Data]) -> dict[str, float]:
        fabric = self.fabric
        total = self._sum(torch.tensor(float(sum(b.counted for b in batches)))).item()
        figures: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            with fabric.no_backward_sync(self.module, enabled=i + 1 < len(batches)):
                loss, logs = self.module(batch.x, batch.y, batch.outliers, context)
                share = batch.counted / total
                # DDP takes the mean over processes.
                fabric.backward(loss * (share * self.world))
            for name, value in {"loss": loss, **logs}.items():
                value = value.detach().float() * share
                figures[name] = figures[name] + value if name in figures else value
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        sums = self._sum(torch.stack(list(figures.values()))).tolist()
        values = dict(zip(figures, sums, strict=True)) | {"grad_norm": norm.item()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                what = "loss" if name == "loss" else "norm of the gradient"
                samples = [batch.samples for batch in batches]
                raise FloatingPointError(
                    f"Trainer.fit: the {what} is {values[name]} at step {self.step} (epoch "
                    f"{context.epoch}), training samples {_shorten(samples)}; the weights are "
                    "those before the step. A smaller lr, a warm-up or clip_norm may help"
                )
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.stepper.step()
        self.stepper.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.trainer.model)
        return values

    def _share(self, step: int) -> tuple[list[int], list[bool]]:
        """Batches of this process in a step, and of each whether it counts.

        A process that gets one batch less than others repeats one without weight.
        """
        if self.batches is None:
            numbers = list(range(self.config.accumulate))
            return numbers, [True] * len(numbers)
        epoch, position = divmod(step, self.per_epoch)
        first = position * self.window
        end = min(first + self.window, self.batches)
        rounds = -(-(end - first) // self.world)
        mine = [epoch * self.batches + k for k in range(first + self.rank, end, self.world)]
        real = [True] * len(mine) + [False] * (rounds - len(mine))
        mine += [epoch * self.batches + first] * (rounds - len(mine))
        return mine, real

    def _drawn(self, end: int) -> int:
        """Batches that this process drew in the steps before ``end``."""
        if not (self.train.iterable or (self.outliers is not None and self.outliers.iterable)):
            return 0
        return sum(len(self._share(step)[0]) for step in range(end))

    def _read_outliers(self, epoch: int | None) -> Iterator[Batch]:
        """Batch (step * accumulate + i) * world + rank for the step's i-th batch.

        Args:
            epoch: Of a mined pool, whose steps count from its own start; None without.
        """
        source = self.outliers
        assert source is not None
        start, end = 0, self.steps
        if epoch is not None:
            objective = self.objective
            assert isinstance(objective, PoolObjective)
            start, end = epoch * self.per_epoch, (epoch + 1) * self.per_epoch
            seed = self.config.seed + 2 + epoch
            source = Batches(source.loader, "outlier", seed, objective.pool)
        numbers = (
            ((step - start) * self.config.accumulate + i) * self.world + self.rank
            for step in range(self.step, end)
            for i in range(len(self._share(step)[0]))
        )
        return source.read(numbers, self._drawn(self.step))

    def _unpack(self, batch: Batch, source: Batches) -> tuple[Tensor, Any]:
        data = batch.data
        x, y = data, None
        if isinstance(data, (tuple, list)) and data:
            x, y = data[0], data[1] if len(data) > 1 else None
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Trainer.fit: the {source.name} loader must give tensors x or (x, y, ...), got "
                f"{type(data).__name__}"
            )
        x, y = self.fabric.to_device((x, y))
        return self.fabric.strategy.precision.convert_input(x), y

    def _labels(self, y: Any, source: Batches) -> Tensor:
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != 1:
            found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"Trainer.fit: the {source.name} loader must give (x, y, ...) with integer labels "
                f"(N,), got {found} for them"
            )
        return y.long()

    # Mining from a pool

    def _mine(self, epoch: int) -> None:
        """Select the outliers of an epoch."""
        objective, source = self.objective, self.outliers
        assert isinstance(objective, PoolObjective)
        assert source is not None
        pool, train = source.samples_of(epoch), self.train.samples_of(epoch)
        if objective.candidates is not None:
            generator = torch.Generator().manual_seed(self.config.seed + epoch)
            pool = pool[torch.randperm(len(pool), generator=generator)[: objective.candidates]]
        samples, features, logits = self._outputs(objective, source, pool)
        trained = None
        if objective.reads_training_data:
            trained = self._outputs(objective, self.train, train)[1]
        n = max(round(objective.per_sample * len(train)), 1)
        objective.mine(samples, features, logits, trained, n)

    def _outputs(
        self, objective: PoolObjective, source: Batches, samples: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Samples in ascending order, features and logits as needed, by all processes together."""
        batches = Batches(source.loader, source.name, source.seed, samples)
        parts: list[list[Tensor]] = [[], [], []]
        with torch.no_grad(), self.fabric.autocast():
            for batch in batches.read(range(self.rank, batches.per_epoch or 0, self.world)):
                x, _ = self._unpack(batch, source)
                found = objective.read(self.trainer.model, x)
                for part, values in zip(parts, (torch.tensor(batch.samples), *found), strict=True):
                    if values is not None:
                        part.append(values.cpu())
        if self.world > 1:
            shares: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(shares, parts)
            parts = [[t for share in shares for t in share[i]] for i in range(3)]
        order = torch.cat(parts[0]).argsort()
        rows, features, logits = (torch.cat(part)[order] if part else None for part in parts)
        assert rows is not None
        return rows, features, logits

    # Validation and log

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        source = self.validation
        if source.per_epoch is None:
            raise ValueError("Trainer.fit: the validation loader must have a length")
        model = self.trainer.model if self.ema is None else self.ema.module
        training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        own = range(source.per_epoch)
        for batch in source.read(own if source.iterable else own[self.rank :: self.world]):
            x, y = self._unpack(batch, source)
            y = self._labels(y, source)
            with self.fabric.autocast():
                loss, labels = self.objective.validate(model, x, y)
            right = (labels == y).sum().item()
            sums += torch.tensor([loss.item() * len(y), right, len(y)], dtype=sums.dtype)
        model.train(training)
        loss_sum, right_sum, n = self._sum(sums).tolist()
        return {"val_loss": loss_sum / n, "val_accuracy": right_sum / n}

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        value = figures.get(self.config.monitor)
        sign = -1 if self.config.monitor == "val_loss" else 1
        if value is None or (self.best is not None and sign * value <= sign * self.best):
            return False
        self.best = value
        return True

    def _write_row(self, epoch: int, validation: dict[str, float]) -> None:
        row: dict[str, float] = {
            "step": self.step,
            "epoch": epoch,
            "lr": self.lr,
            **{name: value / self.metered for name, value in self.meter.items()},
            **self.objective.figures(),
            **validation,
        }
        self.meter, self.metered = {}, 0
        with self._writing("log"):
            self.log.add(row, write=self.fabric.is_global_zero)
        if self.fabric.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics({k: v for k, v in row.items() if k != "step"}, self.step)

    # Checkpoints

    def _due(self) -> bool:
        every = self.config.checkpoint_every
        return every is not None and self.step % every == 0

    def _save(self, name: str) -> None:
        path = self._path(name)
        if path is None:
            return
        states = [rng_state(self.fabric.device)]
        if self.world > 1:
            shares: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(shares, states[0])
            states = shares
        if not self.fabric.is_global_zero:
            return
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config.to_dict(),
            "step": self.step,
            "batches": self.batches,
            "window": self.window,
            "best": self.best,
            "meter": self.meter,
            "metered": self.metered,
            "history": self.log.rows,
            "rng": states,
            "model": self.trainer.model.state_dict(),
            "objective_state": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        with self._writing(name), replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def _open(self, resume: bool | PathLike) -> dict[str, Any] | None:
        """The checkpoint to go on from; and the folder, made and without what a killed run left."""
        last = self._path("last.pt")
        if last is not None and self.fabric.is_global_zero:
            with self._writing("folder"):
                last.parent.mkdir(parents=True, exist_ok=True)
                for left in last.parent.glob(".*.tmp"):
                    left.unlink(missing_ok=True)
        self.fabric.barrier()
        path = Path(resume) if not isinstance(resume, bool) else last if resume else None
        if resume and path is None:
            raise ValueError("Trainer.fit: resume=True must have a folder, got None")
        if last is not None and last.exists():
            if path is None or path.parent.resolve() != last.parent.resolve():
                raise ValueError(
                    f"Trainer.fit: {self.trainer.folder} holds a run: go on with it by "
                    "resume=True, or give another folder"
                )
        elif resume is True:
            path = None
        checkpoint = None if path is None else load_checkpoint(path)
        if checkpoint is not None:
            self._check(checkpoint)
        config = self._path("train.toml")
        if config is not None and self.fabric.is_global_zero:
            with self._writing("configuration"):
                write_text(config, self.config.to_toml())
        return checkpoint

    def _check(self, checkpoint: dict[str, Any]) -> None:
        then, now = checkpoint["config"], self.config.to_dict()
        facts = {
            **{
                f"TrainConfig.{name}": (then.get(name), now.get(name))
                for name in sorted((then.keys() | now.keys()) - _FREE)
            },
            "batches an epoch": (checkpoint["batches"], self.batches),
            "batches a step": (checkpoint["window"], self.window),
        }
        for name, (before, here) in facts.items():
            if before != here:
                raise ValueError(
                    f"Trainer.fit: the run must be that of the checkpoint, where {name} was "
                    f"{before!r}, got {here!r}"
                )

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.step = checkpoint["step"]
        self.best = checkpoint["best"]
        self.meter, self.metered = checkpoint["meter"], checkpoint["metered"]
        try:
            self.trainer.model.load_state_dict(checkpoint["model"])
            self.objective.load_state_dict(checkpoint["objective_state"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Trainer.fit: the checkpoint is of another model: {error}") from error
        if self.rank < len(checkpoint["rng"]):
            set_rng_state(checkpoint["rng"][self.rank], self.fabric.device)
        with self._writing("log"):
            self.log.restore(checkpoint["history"], write=self.fabric.is_global_zero)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(
                cause.errno,
                f"Trainer.fit: {what} could not be written at step {self.step}: {cause.strerror}; "
                "what was there before still is, and a run can go on from last.pt",
                cause.filename or str(self.trainer.folder),
            ) from error

    def _farewell(self) -> str:
        if self.trainer.folder is None:
            return f"Trainer.fit: interrupted after step {self.step}; nothing saved, for no folder"
        return (
            f"Trainer.fit: interrupted after step {self.step} of {self.steps}, saved as "
            f"{self._path('last.pt')}; go on by the same call with resume=True"
        )

    # Small things

    def _path(self, name: str) -> Path | None:
        return None if self.trainer.folder is None else self.trainer.folder / name

    def _factor(self, step: int) -> float:
        """Of the learning rate, in a step."""
        c = self.config
        if step < c.warmup:
            return (step + 1) / c.warmup
        if c.schedule == "step":
            return float(c.gamma ** sum(step >= m * self.steps for m in c.milestones))
        if c.schedule == "constant":
            return 1.0
        share = (step - c.warmup) / max(self.steps - c.warmup, 1)
        return (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def _sum(self, values: Tensor) -> Tensor:
        """Over the processes."""
        if self.world == 1:
            return values
        found = self.fabric.all_reduce(values.to(self.fabric.device), reduce_op="sum")
        assert isinstance(found, Tensor)
        return found

    def _any(self, flag: bool) -> bool:
        return bool(self._sum(torch.tensor(float(flag))) > 0) if self.world > 1 else flag

    def _tensorboard(self) -> list[Logger]:
        if not (self.trainer._tensorboard and self.fabric.is_global_zero):
            return []
        try:
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            logger = TensorBoardLogger(
                self.trainer.folder or ".", "tensorboard", "", purge_step=self.step + 1
            )
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Trainer: tensorboard=True needs tensorboard: pip install tensorboard"
            ) from error
        return [logger]

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int, float], None]]:
        if not (self.trainer._progress and self.fabric.is_global_zero):
            yield lambda step, loss: None
            return
        with progress(field="loss") as shown:
            name = f"train {self.config.objective}"
            task = shown.add_task(name, total=self.steps, completed=self.step, loss="")
            yield lambda step, loss: shown.update(task, completed=step, loss=f"loss {loss:.4f}")


class _Log:
    """The rows so far, and the CSV file of them."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.names: list[str] = []

    def restore(self, rows: Sequence[dict[str, float]], write: bool) -> None:
        self.rows = list(rows)
        self.names = list(dict.fromkeys(name for row in rows for name in row))
        if write and self.path is not None:
            write_text(self.path, self._text(self.rows, header=True))

    def add(self, row: dict[str, float], write: bool) -> None:
        if not self.rows or row.keys() - set(self.names):
            self.restore([*self.rows, row], write)
            return
        self.rows.append(row)
        if write and self.path is not None:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([row], header=False))

    def _text(self, rows: Sequence[dict[str, float]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.names, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def load_checkpoint(path: PathLike) -> dict[str, Any]:
    """What :class:`Trainer` saved, on the CPU; tensors and plain values only, no code is run.

    Raises:
        ValueError: Not a checkpoint of this version.
        OSError: The file cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"load_checkpoint: {path} must be a checkpoint, got {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"load_checkpoint: {path} must be a checkpoint of Trainer, got another")
    if state["version"] != _VERSION:
        raise ValueError(
            f"load_checkpoint: {path} must be of version {_VERSION}, got {state['version']}"
        )
    return state


def load_weights(model: nn.Module, path: PathLike, ema: bool = True) -> None:
    """Give a model the weights of a checkpoint, and put it into evaluation mode.

    Args:
        model: Of the architecture that was trained.
        path: ``best.pt`` or ``last.pt``.
        ema: Take the averaged weights, where there are any.

    Raises:
        ValueError: Not a checkpoint, or of another model.
        OSError: The file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint["model"]
    if ema and checkpoint["ema"] is not None:
        prefix = "module."
        averaged = checkpoint["ema"].items()
        state = {name[len(prefix) :]: v for name, v in averaged if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load_weights: {path} must be of the model: {error}") from error
    model.eval()


def tensor_loader(
    *tensors: Tensor, batch_size: int, shuffle: bool = False, drop_last: bool = False
) -> Loader:
    """A loader of tensors in memory that indexes whole batches, which is much the fastest.

    Args:
        tensors: Of equal length, such as (x, y).
        batch_size: Samples a batch.
        shuffle: Whether the order is drawn anew each epoch.
        drop_last: Whether a last batch that is not full is left out.

    Raises:
        ValueError: No batch: fewer samples than one takes.
    """
    dataset = TensorDataset(*tensors)
    if len(dataset) < (batch_size if drop_last else 1):
        raise ValueError(
            f"tensor_loader: tensors must fill a batch of {batch_size}, got {len(dataset)}"
        )
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, None, sampler=BatchSampler(order, batch_size, drop_last))


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch on the CPU and use one thread; on leaving, put both back as they were.

    One thread, because the reductions of some CPU layers depend on how many there are.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _fabric(config: TrainConfig, objective: Objective) -> Fabric:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Trainer needs lightning-fabric, and {error.name} is missing: "
            "pip install 'oodkernels[train]'",
            name=error.name,
        ) from error
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


@contextmanager
def _global_rng(seed: int, device: torch.device) -> Iterator[None]:
    state = rng_state(device)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(state, device)


class _Interrupted:
    wanted = False


@contextmanager
def _sigint() -> Iterator[_Interrupted]:
    """Makes the first Ctrl-C a wish, the second what it was before."""
    found = _Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        found.wanted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _import(module: str, who: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} needs {module}: pip install 'oodkernels[train]'", name=module
        ) from error


def _toml() -> Any:
    try:
        return _import("tomllib", "TrainConfig.from_toml")  # Python 3.11
    except ModuleNotFoundError:
        return _import("tomli", "TrainConfig.from_toml")


def _os_error(error: BaseException) -> OSError | None:
    """The system's error that an error is or came of: torch.save hides it in a RuntimeError."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def _shorten(samples: Sequence[Any], most: int = 10) -> str:
    flat = [i for batch in samples if batch is not None for i in _flat(batch)]
    if not flat:
        return "of an iterable data set"
    text = ", ".join(str(i) for i in flat[:most])
    return text + (f" and {len(flat) - most} more" if len(flat) > most else "")


def _flat(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, (list, tuple)) else [batch]
