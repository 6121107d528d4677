"""What an objective is, its registration, and where in a run it stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels.detectors.model import Outputs, as_outputs
from oodkernels.groups import Groups
from oodkernels.training._plain import Recorded

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["OBJECTIVES", "Context", "Objective", "ObjectiveSpec", "make_objective", "register"]

Step = tuple[Tensor, dict[str, Tensor]]
Need = Literal["outliers", "absent class", "groups", "images", "confidence"]


class Context:
    """Where in the run a batch stands, and the means to update more than the model.

    Attributes:
        step: Optimiser steps before this one.
        steps: Of the whole run.
        epoch: From 0.
        fabric: Lightning Fabric.
    """

    def __init__(self, step: int, steps: int, epoch: int, fabric: Fabric) -> None:
        self.step, self.steps, self.epoch, self.fabric = step, steps, epoch, fabric

    def mean(self, value: Tensor) -> Tensor:
        """Average over processes."""
        if self.fabric.world_size == 1:
            return value
        mean = self.fabric.all_reduce(value.clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Take a step of an optimiser of the objective's own, by the mean over processes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Not backward(): the loss may depend on the model, which has a step of its own.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = self.mean(gradient)
        optimizer.step()
        optimizer.zero_grad()


class Objective(Recorded, nn.Module):
    """Base class. A subclass says in :meth:`step` what the loss of a batch is.

    Its arguments are kept in :attr:`options`, which go into checkpoints and are compared on
    resuming.

    Attributes:
        name: That of its :class:`ObjectiveSpec`; of an objective without one, its class's.
        options: The arguments that it was made with, as plain values.
        outliers: What is to come with a batch: None for nothing, "batch" for one of the outlier
            loader, "pool" for one of the outliers selected for the epoch.
        clusters_candidates: Whether a batch of outliers is clustered, so that a smaller one would
            be clustered otherwise.
        skips_parameters: Whether the loss may leave out parameters that are trained: then DDP has
            to search for them.
        absent: Whether the last column is that of an absent class.
        columns: Logits of the model; None until it has run.
    """

    name: ClassVar[str]
    outliers: ClassVar[Literal["batch", "pool"] | None] = None
    clusters_candidates: ClassVar[bool] = False
    skips_parameters: ClassVar[bool] = False
    absent: bool = False
    columns: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give it a name, until it is registered under one."""
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__

    @property
    def num_classes(self) -> int | None:
        """C; None until the model has run."""
        return None if self.columns is None else self.columns - self.absent

    @property
    def fixed_groups(self) -> Groups | None:
        """The groups of a MOS head, for the files of what is trained; None without any."""
        return None

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Called before a run, for what depends on the model or on the inputs.

        Args:
            model: The model, in whatever mode and on whatever device it is.
            sample: Gives a batch of training inputs.
        """

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """The loss of a batch.

        Args:
            model: x -> logits, in training mode.
            x: (N, ...) inputs.
            y: (N,) int64 class ids.
            outliers: (M, ...) inputs; None where the objective takes none.
            context: See there.

        Returns:
            The loss, a mean over samples, and further scalars for the log, the same each time.
        """
        raise NotImplementedError

    def undo(self) -> Callable[[], None]:
        """Called before a step; what it returns takes back what the step changes of the objective.

        Buffers are taken back by the Trainer.
        """
        return lambda: None

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss on ID samples of a model in evaluation mode, and their predicted class ids."""
        logits = self.outputs(model, x, y).logits
        known = logits[:, :-1] if self.absent else logits
        return F.cross_entropy(logits, y), known.argmax(1)

    def figures(self) -> dict[str, float]:
        """Further figures for a row of the log."""
        return {}

    def chance(self) -> float | None:
        """The loss of logits that say nothing, all 0; None where that is not known."""
        return None

    def outputs(self, model: nn.Module, x: Tensor, y: Tensor) -> Outputs:
        """What the model says; the first time, class ids are held against its columns.

        Args:
            model: The model.
            x: (N, ...) inputs.
            y: Class ids of some of them.

        Raises:
            ValueError: A class id is none of the model's classes.
        """
        found = as_outputs(model(x))
        if self.columns is None:
            self.columns = found.logits.shape[-1]
            if y.numel():
                self.check_labels("the training loader", *(int(v) for v in y.aminmax()))
        return found

    def check_absent(self, model: nn.Module) -> None:
        """Refuse a model that says otherwise than the objective whether it has an absent class.

        Raises:
            ValueError: It has an ``absent_column``, as :class:`~oodkernels.nn.Head` has, and that
                is None for an objective with an absent class, or a column for one without.
        """
        if not hasattr(model, "absent_column"):
            return
        found: Any = model.absent_column
        if (found is not None) != self.absent:
            expected = "the last column" if self.absent else "None"
            raise ValueError(
                f"Trainer.fit: the model's absent_column must be {expected} for the objective "
                f"{self.name!r}, got {found}"
            )

    def check_labels(self, source: str, lowest: int, highest: int) -> None:
        """Refuse class ids that the model has no column for, once its columns are known.

        Args:
            source: Where they come from, for the message.
            lowest: The least of them.
            highest: The greatest.

        Raises:
            ValueError: One is negative, or C or more.
        """
        classes = self.num_classes
        if classes is not None and (lowest < 0 or highest >= classes):
            why = f"of the model's {self.columns} columns"
            if self.absent:
                why += ", the last of which is the absent class's: it needs one more than classes"
            raise ValueError(
                f"Trainer.fit: {source} must give class ids in 0..{classes - 1}, {why}, got "
                f"{lowest if lowest < 0 else highest}"
            )


@dataclass(frozen=True)
class ObjectiveSpec:
    """What there is to know of an objective before it is made.

    Attributes:
        name: Short name, for configurations and command lines.
        make: The class.
        needs: What it cannot do without: "outliers" to train on; an "absent class", a column more
            than there are classes; "groups"; "images"; a model that gives a "confidence".
        per_sample: Outliers that the authors read for each ID sample.
        scores: Detectors that read what it trains, its own first.
    """

    name: str
    make: type[Objective]
    needs: frozenset[Need]
    per_sample: int
    scores: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first line of the class's description."""
        return (self.make.__doc__ or "").splitlines()[0]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments by name, with their defaults."""
        _, *parameters = inspect.signature(self.make.__init__).parameters.values()
        return {p.name: p.default for p in parameters}


OBJECTIVES: dict[str, ObjectiveSpec] = {}
"""Every objective by its short name."""

Kind = TypeVar("Kind", bound=type[Objective])


def register(
    name: str,
    *,
    needs: Iterable[Need] = (),
    per_sample: int = 1,
    scores: Sequence[str] = ("msp", "max-logit", "energy"),
) -> Callable[[Kind], Kind]:
    """Decorator that puts an objective into :data:`OBJECTIVES`.

    Args:
        name: As in :class:`ObjectiveSpec`.
        needs: As there.
        per_sample: As there.
        scores: As there.

    Raises:
        ValueError: There is an objective of that name.
    """
    if name in OBJECTIVES:
        raise ValueError(f"register: name must be a new one, got {name!r}")

    def add(kind: Kind) -> Kind:
        kind.name = name
        OBJECTIVES[name] = ObjectiveSpec(name, kind, frozenset(needs), per_sample, tuple(scores))
        return kind

    return add


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name in :data:`OBJECTIVES`.

    Raises:
        ValueError: Unknown name, or options it does not have.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"make_objective: name must be one of {', '.join(OBJECTIVES)}, got {name!r}; an "
            "objective of your own is given itself"
        )
    spec = OBJECTIVES[name]
    try:
        return spec.make(**(options or {}))
    except TypeError as error:
        raise ValueError(
            f"make_objective: {name}: {error}; it has {', '.join(spec.options)}"
        ) from error
