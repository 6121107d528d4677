"""One call of ``Trainer.fit``: steps, validation, checkpoints."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from oodkernels._files import locked, write_text
from oodkernels._optional import require
from oodkernels._progress import progress
from oodkernels.training import _modes
from oodkernels.training._batches import LoaderBatch
from oodkernels.training._data import FitData
from oodkernels.training._log import Log
from oodkernels.training._plain import plain
from oodkernels.training._random import global_seed, rng_state, seeded, set_rng_state
from oodkernels.training._signals import Interruption, first_is_a_wish
from oodkernels.training._stepper import MakeOptimizer, Stepper
from oodkernels.training.base import Objective
from oodkernels.training.checkpoint import PathLike, load_checkpoint, save_checkpoint
from oodkernels.training.config import TrainConfig
from oodkernels.training.objectives import PoolObjective

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

# What a resumed run may have otherwise than the run before.
_FREE = frozenset(
    {"accelerator", "accumulate", "checkpoint_every", "epochs", "log_every", "monitor", "steps"}
)
_RECENT = 20  # steps whose loss says whether it has left that of guessing


class Setup(Protocol):
    """What a run asks of its Trainer."""

    model: nn.Module
    objective: Objective
    config: TrainConfig
    fabric: Fabric
    folder: Path | None
    ema: AveragedModel | None
    make_optimizer: MakeOptimizer
    progress: bool
    tensorboard: bool
    loggers: list[Logger]
    on_epoch: Callable[[int], None]


class Fit:
    """A run: what is read, the steps, and what is written."""

    def __init__(self, trainer: Setup, data: FitData) -> None:
        self.trainer, self.data, self.shares = trainer, data, data.shares
        self.config, self.objective, self.fabric = trainer.config, trainer.objective, trainer.fabric
        self.model = trainer.model
        self.step = 0
        self.best: float | None = None
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self.log = Log(self._path("log.csv"), self.fabric.is_global_zero)

    def run(self, resume: bool | PathLike) -> None:
        """Train the model."""
        trainer, fabric, config = self.trainer, self.fabric, self.config
        with ExitStack() as stack:
            checkpoint = self._open(resume, stack)
            stack.enter_context(_modes.own_modes(self.model))
            stack.enter_context(global_seed(config.seed + fabric.global_rank, fabric.device))
            self.objective.check_absent(self.model)
            with seeded((config.seed,)):  # the same on every process
                self.objective.columns = None
                self.objective.prepare(self.model, self.data.sample)
            self.stepper = Stepper(
                self.model, self.objective, config, fabric, self.shares, trainer.make_optimizer
            )
            self.stepper.check_single(self.data)
            trainer.ema = self.stepper.ema
            if checkpoint is not None:
                self._restore(checkpoint)
            plain(self._state([]), "Trainer.fit: checkpoint")
            self.loggers = [*trainer.loggers, *self._tensorboard()]
            for logger in self.loggers:
                stack.callback(logger.finalize, "finished")
            interruption = stack.enter_context(first_is_a_wish())
            self._loop(interruption, stack.enter_context(self._bar()))
            fabric.barrier()  # no process is to go on before the files are there
        self.model.eval()
        self.objective.eval()

    # The loop

    def _loop(self, interruption: Interruption, show: Callable[[int, float], None]) -> None:
        train = self.data.read_train(self.step)
        outliers: Iterator[LoaderBatch] | None = None
        while self.step < self.shares.steps:
            epoch, position = divmod(self.step, self.shares.per_epoch)
            if self.data.outliers is not None:
                mined = isinstance(self.objective, PoolObjective) and position == 0
                if mined:
                    self.data.mine(self.model, epoch)
                if outliers is None or mined:
                    outliers = self.data.read_outliers(self.step, epoch)
            try:
                batches = self.data.fetch(self.step, train, outliers)
            except RuntimeError:
                if not interruption.wanted or self.shares.world > 1:
                    raise
                # An iterable data set's workers got the Ctrl-C too.
                self._save("last.pt")
                raise KeyboardInterrupt(self._farewell()) from None
            figures = self.stepper.take(self.step, epoch, batches)
            self.step += 1
            show(self.step, figures["loss"])
            self.log.step(figures)
            self.recent.append(figures["loss"])

            ended = self.step % self.shares.per_epoch == 0 or self.step == self.shares.steps
            if self.step == self.shares.per_epoch:
                self._check_chance()
            validation = self._validate() if ended else {}
            if ended or self.step % self.config.log_every == 0:
                self._write_row(epoch, validation)
            if self._is_best(validation):
                self._save("best.pt")
            stop = self._any(interruption.wanted)
            every = self.config.checkpoint_every
            if ended or stop or (every is not None and self.step % every == 0):
                self._save("last.pt")
            if ended and self.fabric.is_global_zero:
                self.trainer.on_epoch(epoch + 1)
            if stop and self.step < self.shares.steps:
                raise KeyboardInterrupt(self._farewell())

    def _check_chance(self) -> None:
        """Say when an epoch has taught nothing."""
        chance = self.objective.chance()
        if chance is None or len(self.recent) < _RECENT // 2:
            return
        loss = sum(self.recent) / len(self.recent)
        if loss > 0.98 * chance and self.fabric.is_global_zero:
            warnings.warn(
                f"Trainer.fit: after an epoch the loss is {loss:.4g}, no less than the "
                f"{chance:.4g} of guessing among {self.objective.num_classes} classes: a larger "
                "lr, more epochs or inputs of mean 0 and standard deviation 1 may help",
                stacklevel=5,
            )

    # Validation and log

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        source = self.data.validation
        if source is None:
            return {}
        if source.per_epoch is None:
            raise ValueError("Trainer.fit: the validation loader must have a length")
        ema = self.stepper.ema
        model = self.model if ema is None else ema.module
        sums = torch.zeros(3, dtype=torch.float64)
        own = range(source.per_epoch)
        numbers = own if source.iterable else own[self.shares.rank :: self.shares.world]
        with _modes.own_modes(model):
            model.eval()
            for batch in source.read(numbers):
                x, y = self.data.labelled(batch, source)
                with self.fabric.autocast():
                    loss, labels = self.objective.validate(model, x, y)
                right = (labels == y).sum().item()
                sums += torch.tensor([loss.item() * len(y), right, len(y)], dtype=sums.dtype)
        loss_sum, right_sum, n = self.stepper.sum(sums).tolist()
        return {"val_loss": loss_sum / n, "val_accuracy": right_sum / n}

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        value = figures.get(self.config.monitor)
        sign = -1 if self.config.monitor == "val_loss" else 1
        if value is None or math.isnan(value):
            return False
        if self.best is not None and sign * value <= sign * self.best:
            return False
        self.best = value
        return True

    def _write_row(self, epoch: int, validation: dict[str, float]) -> None:
        before = {"step": self.step, "epoch": epoch, "lr": self.stepper.lr}
        own = {name: float(value) for name, value in self.objective.figures().items()}
        with self._writing("log"):
            row = self.log.add(before, {**own, **validation})
        if self.fabric.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics({k: v for k, v in row.items() if k != "step"}, self.step)

    # Checkpoints

    def _state(self, rng: list[Any]) -> dict[str, Any]:
        groups = self.objective.fixed_groups
        return {
            "config": self.config.to_dict(),
            "groups": None if groups is None else groups.to_json(),
            "columns": self.objective.columns,
            "absent": self.objective.absent,
            "data": self.data.facts(),
            "step": self.step,
            "batches": self.shares.batches,
            "window": self.shares.window,
            "best": self.best,
            "recent": list(self.recent),
            "log": self.log.state_dict(),
            "rng": rng,
            **self.stepper.state_dict(),
        }

    def _save(self, name: str) -> None:
        path = self._path(name)
        if path is None:
            return
        states = [rng_state(self.fabric.device)]
        if self.shares.world > 1:
            shares: list[Any] = [None] * self.shares.world
            torch.distributed.all_gather_object(shares, states[0])
            states = shares
        if self.fabric.is_global_zero:
            with self._writing(name):
                save_checkpoint(self._state(states), path)

    def _open(self, resume: bool | PathLike, stack: ExitStack) -> dict[str, Any] | None:
        """The checkpoint to go on from; and the folder, made and kept for this run alone."""
        last = self._path("last.pt")
        if last is not None and self.fabric.is_global_zero:
            with self._writing("folder"):
                last.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(last.parent, "Trainer.fit"))
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
        """Refuse to go on as another run than that of the checkpoint."""
        then, now = (_flat(c) for c in (checkpoint["config"], self.config.to_dict()))
        facts = {
            **{
                f"TrainConfig.{name}": (then.get(name), now.get(name))
                for name in sorted((then.keys() | now.keys()) - _FREE)
            },
            "batches an epoch": (checkpoint["batches"], self.shares.batches),
            "batches a step": (checkpoint["window"], self.shares.window),
        }
        for name, (before, here) in facts.items():
            if before != here:
                raise ValueError(
                    f"Trainer.fit: the run must be that of the checkpoint, where {name} was "
                    f"{before!r:.300}, got {here!r:.300}"
                )
        self.data.check(checkpoint["data"])

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.recent.extend(checkpoint["recent"])
        self.objective.columns = checkpoint["columns"]
        self.stepper.load_state_dict(checkpoint)
        groups = self.objective.fixed_groups
        if (None if groups is None else groups.to_json()) != checkpoint["groups"]:
            raise ValueError(
                "Trainer.fit: the groups must be those of the checkpoint, got others: classes or "
                "their order differ"
            )
        if self.shares.rank < len(checkpoint["rng"]):
            set_rng_state(checkpoint["rng"][self.shares.rank], self.fabric.device)
        with self._writing("log"):
            self.log.load_state_dict(checkpoint["log"])

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
            f"Trainer.fit: interrupted after step {self.step} of {self.shares.steps}, saved as "
            f"{self._path('last.pt')}; go on by the same call with resume=True"
        )

    # Small things

    def _path(self, name: str) -> Path | None:
        return None if self.trainer.folder is None else self.trainer.folder / name

    def _any(self, flag: bool) -> bool:
        return (
            bool(self.stepper.sum(torch.tensor(float(flag))) > 0) if self.shares.world > 1 else flag
        )

    def _tensorboard(self) -> list[Logger]:
        if not (self.trainer.tensorboard and self.fabric.is_global_zero):
            return []
        require("tensorboard", "train", "Trainer: tensorboard=True")
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        folder = self.trainer.folder or "."
        return [TensorBoardLogger(folder, "tensorboard", "", purge_step=self.step + 1)]

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int, float], None]]:
        if not (self.trainer.progress and self.fabric.is_global_zero):
            yield lambda step, loss: None
            return
        with progress(field="loss") as shown:
            name, total = f"train {self.objective.name}", self.shares.steps
            task = shown.add_task(name, total=total, completed=self.step, loss="")
            yield lambda step, loss: shown.update(task, completed=step, loss=f"loss {loss:.4f}")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its options beside the other names."""
    options = config.get("options", {})
    rest = {name: value for name, value in config.items() if name != "options"}
    return rest | {f"options.{name}": value for name, value in options.items()}


def _os_error(error: BaseException) -> OSError | None:
    """The system's error that an error is or came of: torch.save hides it in a RuntimeError."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return found
