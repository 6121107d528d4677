"""How to train: the settings of a run, to and from a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from oodkernels._optional import require
from oodkernels.training._plain import plain_option

__all__ = ["TrainConfig"]

_FROM_TOML = "TrainConfig.from_toml"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Plain values only: :meth:`to_toml` gives a file that gives it back.

    Attributes:
        objective: Name in :data:`oodkernels.training.OBJECTIVES`.
        options: Of the objective, by name: numbers, text, lists and tables, of NumPy too.
        epochs: Passes over the training data; or give ``steps``.
        steps: Optimiser steps; or give ``epochs``.
        optimizer: "sgd", "adam" or "adamw".
        lr: Learning rate after the warm-up.
        momentum: Of SGD, 0 for none.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: L2 penalty (AdamW: decay) on every parameter.
        schedule: How the learning rate goes over the steps: "cosine" to 0, "step", or "constant".
        milestones: Shares of the steps after which "step" multiplies by ``gamma``.
        gamma: Factor of the learning rate at each milestone.
        warmup: Steps over which the learning rate first rises linearly.
        accumulate: Batches a step, on each process. The gradient is that of one batch of all their
            samples; the last step of an epoch takes the batches that are left.
        clip_norm: Largest norm of the gradient; None: any.
        ema: Decay of an exponential moving average of the weights, which is then what is validated;
            None: no average.
        precision: "32-true", "64-true", "bf16-mixed" or "bf16-true".
        accelerator: "auto", "cpu", "cuda" ..., as Lightning Fabric has it.
        seed: That of the order of samples and all random numbers of the run, but not of the model's
            initial weights.
        log_every: Steps between rows of the log; there is one at the end of every epoch too.
        checkpoint_every: Steps between checkpoints; there is one at the end of every epoch too.
        monitor: What the best checkpoint is best in: "val_accuracy" or "val_loss".

    Raises:
        ValueError: A value is out of range, or both ``epochs`` and ``steps`` are given.
        TypeError: A value is none that a file gives back.
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
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_option(value, f"TrainConfig: {name}"))
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
            self._check(name, value is None or type(value) is int, "an integer")
            self._check(name, value is None or value >= 1, "at least 1")
        for name in ("warmup", "seed"):
            self._check(name, type(getattr(self, name)) is int, "an integer")
        for name in ("warmup", "seed", "weight_decay", "momentum", "gamma"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        self._check("lr", 0 < self.lr < math.inf, "positive and finite")
        self._check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive")
        self._check("ema", self.ema is None or 0 <= self.ema < 1, "in [0, 1)")
        self._check("milestones", all(0 < m < 1 for m in self.milestones), "in (0, 1)")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Names and values, without those that are None: what a file holds."""
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
        """Write it as a TOML file."""
        text: str = require("tomli_w", "train", "TrainConfig.to_toml").dumps(self.to_dict())
        return text

    @classmethod
    def from_toml(cls, text: str) -> TrainConfig:
        """The configuration of :meth:`to_toml`.

        Raises:
            ValueError: Not TOML, a name is unknown, or a value out of range.
        """
        toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train", _FROM_TOML)
        return cls.from_dict(toml.loads(text))
