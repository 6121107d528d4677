"""What a run reads: its loaders, which batches are whose, labels that are class ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oodkernels.training._batches import Batches, Loader, LoaderBatch
from oodkernels.training.base import Objective
from oodkernels.training.config import TrainConfig
from oodkernels.training.objectives import PoolObjective

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class StepBatch(NamedTuple):
    """A batch of training data and what comes with it, on the device."""

    x: Tensor
    y: Tensor
    outliers: Tensor | None
    counted: int
    """Samples that count."""
    samples: Any
    """Their indices."""


@dataclass(frozen=True)
class Shares:
    """Which batches a process reads in a step.

    Attributes:
        batches: An epoch's, over all processes; None where that is not known.
        steps: Of the whole run.
        accumulate: Batches a step, on each process.
        rank: Of this process.
        world: Number of processes.
    """

    batches: int | None
    steps: int
    accumulate: int
    rank: int
    world: int

    @property
    def window(self) -> int:
        """Batches a step, over all processes."""
        return self.accumulate * self.world

    @property
    def per_epoch(self) -> int:
        """Steps an epoch."""
        return self.steps if self.batches is None else -(-self.batches // self.window)

    def of(self, step: int) -> tuple[list[int], list[bool]]:
        """Batches of this process in a step, and of each whether it counts.

        A process that gets one batch less than others repeats one without weight.
        """
        if self.batches is None:
            numbers = list(range(self.accumulate))
            return numbers, [True] * len(numbers)
        epoch, position = divmod(step, self.per_epoch)
        first = position * self.window
        end = min(first + self.window, self.batches)
        rounds = -(-(end - first) // self.world)
        mine = [epoch * self.batches + k for k in range(first + self.rank, end, self.world)]
        real = [True] * len(mine) + [False] * (rounds - len(mine))
        mine += [epoch * self.batches + first] * (rounds - len(mine))
        return mine, real

    def count(self, end: int) -> int:
        """Batches of this process in the steps before ``end``."""
        return sum(len(self.of(step)[0]) for step in range(end))

    def outliers(self, start: int, end: int, zero: int = 0) -> Iterator[int]:
        """Numbers of this process's outlier batches: (step * accumulate + i) * world + rank.

        Args:
            start: First step.
            end: Step after the last.
            zero: The step at which the numbers begin.
        """
        for step in range(start, end):
            for i in range(len(self.of(step)[0])):
                yield ((step - zero) * self.accumulate + i) * self.world + self.rank


class FitData:
    """The loaders of one call of ``Trainer.fit``.

    Raises:
        ValueError: A loader is missing or unfit.
        TypeError: One is none.
    """

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        config: TrainConfig,
        train_loader: Loader,
        outlier_loader: Loader | None,
        val_loader: Loader | None,
    ) -> None:
        self.fabric, self.objective, self.seed = fabric, objective, config.seed
        self.train = Batches(train_loader, "training", self.seed)
        self.validation = (
            None if val_loader is None else Batches(val_loader, "validation", self.seed)
        )
        self.outliers: Batches | None = None
        name = type(objective).__name__
        if objective.outliers is None:
            if outlier_loader is not None:
                raise ValueError(f"Trainer.fit: {name} takes no outliers, got an outlier_loader")
        elif outlier_loader is None:
            raise ValueError(f"Trainer.fit: {name} must have an outlier_loader, got None")
        else:
            self.outliers = Batches(outlier_loader, "outlier", self.seed + 1)
            pooled = isinstance(objective, PoolObjective)
            if pooled and (self.train.iterable or self.outliers.iterable):
                raise ValueError(
                    "Trainer.fit: data sets must have indices for a pool to be mined, got an "
                    "IterableDataset"
                )
            if objective.clusters_candidates and (found := self.outliers.leave_out_ragged()):
                warnings.warn(
                    f"Trainer.fit: the outlier loader's last batch has {found[0]} of {found[1]} "
                    "candidates and is left out, for they would be clustered by themselves; "
                    "drop_last=True says so too",
                    stacklevel=3,
                )
        # An iterable data set is divided by itself, so each process has batches of its own.
        batches = self.train.per_epoch
        world = fabric.world_size
        if self.train.iterable and batches is not None:
            batches *= world
        window = config.accumulate * world
        if config.steps is not None:
            steps = config.steps
        elif batches is not None and config.epochs is not None:
            steps = config.epochs * -(-batches // window)
        else:
            raise ValueError(
                "Trainer.fit: TrainConfig.steps must be given for training data without a length"
            )
        self.shares = Shares(batches, steps, config.accumulate, fabric.global_rank, world)

    def sample(self) -> Tensor:
        """A batch of training inputs."""
        return self._inputs(next(self.train.read(range(1))), self.train)[0]

    def drawn(self, step: int) -> int:
        """Batches of iterable data to read past before a step."""
        iterable = self.train.iterable or (self.outliers is not None and self.outliers.iterable)
        return self.shares.count(step) if iterable else 0

    def read_train(self, start: int) -> Iterator[LoaderBatch]:
        """Training batches of this process from a step on."""
        numbers = (k for step in range(start, self.shares.steps) for k in self.shares.of(step)[0])
        return self.train.read(numbers, self.drawn(start))

    def read_outliers(self, start: int, epoch: int) -> Iterator[LoaderBatch]:
        """Outlier batches of this process from a step on; of a mined pool, those of the epoch."""
        source, shares = self.outliers, self.shares
        assert source is not None
        if not isinstance(self.objective, PoolObjective):
            return source.read(shares.outliers(start, shares.steps), self.drawn(start))
        # Dealt out over the batches of the epoch, so that each is read once.
        seed, pool = self.seed + 2 + epoch, self.objective.pool
        source = Batches(source.loader, "outlier", seed, pool, shares.batches)
        zero = epoch * shares.per_epoch
        return source.read(shares.outliers(start, zero + shares.per_epoch, zero))

    def fetch(
        self, step: int, train: Iterator[LoaderBatch], outliers: Iterator[LoaderBatch] | None
    ) -> list[StepBatch]:
        """The batches of a step."""
        batches = []
        for real in self.shares.of(step)[1]:
            batch = next(train)
            x, y = self.labelled(batch, self.train)
            o = None
            if outliers is not None:
                assert self.outliers is not None
                o, _ = self._inputs(next(outliers), self.outliers)
            batches.append(StepBatch(x, y, o, len(x) * real, batch.samples))
        return batches

    def labelled(self, batch: LoaderBatch, source: Batches) -> tuple[Tensor, Tensor]:
        """Inputs and class ids of a batch, on the device.

        Raises:
            TypeError: It has no integer labels.
            ValueError: The model has no column for one of them.
        """
        x, y = self._inputs(batch, source)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != 1:
            found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"Trainer.fit: the {source.name} loader must give (x, y, ...) with integer labels "
                f"(N,), got {found} for them"
            )
        given = batch.data[1]  # where the loader left it: on the CPU nothing has to be waited for
        if len(given):
            ends = (int(value) for value in given.aminmax())
            self.objective.check_labels(f"the {source.name} loader", *ends)
        return x, y.long()

    def _inputs(self, batch: LoaderBatch, source: Batches) -> tuple[Tensor, Any]:
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

    # What two runs that are one have in common

    def facts(self) -> dict[str, Any]:
        """Facts of the loaders, for a checkpoint."""
        found = {"training": self.train, "validation": self.validation, "outlier": self.outliers}
        return {name: source.facts() for name, source in found.items() if source is not None}

    def check(self, then: dict[str, dict[str, Any]]) -> None:
        """Refuse to go on with other data than a checkpoint's.

        Raises:
            ValueError: Order or content of a loader's batches is not what it was.
        """
        sources = {"training": self.train, "validation": self.validation, "outlier": self.outliers}
        for name, source in sources.items():
            before = then.get(name, {})
            if source is None or source.iterable or not before:
                continue
            if before["order"] != source.facts()["order"]:
                raise ValueError(
                    f"Trainer.fit: the {name} loader must give the batches that the run began "
                    "with, got others in number, size or order: its data set, batch size and "
                    "sampler have to be the same"
                )
            if before["first batch"] is None:
                continue
            source.read_first()
            if source.first != before["first batch"]:
                raise ValueError(
                    f"Trainer.fit: the {name} loader must give the data that the run began with, "
                    "got others in its first batch"
                )

    # Mining from a pool

    def mine(self, model: torch.nn.Module, epoch: int) -> None:
        """Select the outliers of an epoch."""
        objective, source = self.objective, self.outliers
        assert isinstance(objective, PoolObjective)
        assert source is not None
        if source.first is None:
            source.read_first()
        pool, train = source.samples_of(epoch), self.train.samples_of(epoch)
        if objective.candidates is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            pool = pool[torch.randperm(len(pool), generator=generator)[: objective.candidates]]
            pool = pool.sort().values
        # What is remembered need not be among this epoch's candidates.
        past = objective.remembered
        asked = torch.cat([pool, past]).unique()
        features, logits = self._outputs(model, objective, source, asked)
        at = torch.searchsorted(asked, pool)
        remembered = None
        if len(past):
            assert features is not None
            remembered = features[torch.searchsorted(asked, past)]
        trained = None
        if objective.reads_training_data:
            trained = self._outputs(model, objective, self.train, train)[0]
        n = max(round(objective.per_sample * len(train)), 1)
        features = None if features is None else features[at]
        logits = None if logits is None else logits[at]
        objective.mine(pool, features, logits, trained, n, remembered)

    def _outputs(
        self, model: torch.nn.Module, objective: PoolObjective, source: Batches, samples: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features and logits of samples, as needed, read by all processes together."""
        world = self.shares.world
        batches = Batches(source.loader, source.name, source.seed, samples)
        parts: list[list[Tensor]] = [[], [], []]
        with torch.no_grad(), self.fabric.autocast():
            for batch in batches.read(range(self.shares.rank, batches.per_epoch or 0, world)):
                x, _ = self._inputs(batch, source)
                found = objective.read(model, x)
                for part, values in zip(parts, (torch.tensor(batch.samples), *found), strict=True):
                    if values is not None:
                        part.append(values.cpu())
        if world > 1:
            shares: list[Any] = [None] * world
            torch.distributed.all_gather_object(shares, parts)
            parts = [[t for share in shares for t in share[i]] for i in range(3)]
        order = torch.cat(parts[0]).argsort()
        features, logits = (torch.cat(part)[order] if part else None for part in parts[1:])
        return features, logits
