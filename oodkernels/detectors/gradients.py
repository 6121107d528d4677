"""ODIN: temperature and a step of the input towards the predicted class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.logits import check_temperature
from oodkernels.detectors.model import Model, run, to_model
from oodkernels.ops import logit_scores

__all__ = ["ODIN", "input_step"]


@register(
    "odin",
    "F",
    "Liang, Li & Srikant, ICLR 2018",
    grid={"temperature": (1, 10, 100, 1000), "eps": (0.0014, 0.0028)},
)
class ODIN(OODDetector):
    """Maximum softmax probability at temperature T of an input moved towards its class.

    Liang, Li & Srikant, Enhancing The Reliability of Out-of-distribution Image Detection in Neural
    Networks, ICLR 2018, equations 1 and 2: x~ = x - eps sign(grad_x CE(f(x) / T, argmax f(x))),
    score = max softmax(f(x~) / T). Gradients are taken with respect to x alone, so that the model's
    parameters collect none, sample by sample: a score does not depend on the others of its batch.
    The class predicted is that of x.

    Args:
        temperature: T > 0.
        eps: Size of the step >= 0, in the units of x before it was divided by ``std``.
        std: What x was divided by when it was normalised, a number or one for each channel of
            (N, channels, ...). The step is divided by it.
        absent: Column of the logits that stands for no class and is left out; None for the model's
            ``absent_column``, if it has one.
        model: As for :class:`OODDetector`; differentiable in x.

    Raises:
        ValueError: ``temperature``, ``eps`` or ``std`` is out of its range.
    """

    needs = frozenset({"x"})

    def __init__(
        self,
        temperature: float = 1000.0,
        eps: float = 0.0014,
        std: float | Sequence[float] | None = None,
        *,
        absent: int | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(model, absent)
        self.temperature = check_temperature("ODIN", temperature)
        self.eps, self.std = check_step("ODIN", eps, std)

    def _check(self, where: str, batch: Batch) -> None:
        if self.model is None:
            raise ValueError(f"{where}: x needs a model: ODIN(..., model=model)")
        super()._check(where, batch)

    def _score(self, batch: Batch) -> Tensor:
        return self._perturbed(batch)[0]

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self._perturbed(batch)[1], None

    def _perturbed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.once(self, lambda: self._compute(batch))

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, away, labels = self._away(batch)
        return self._moved(x - self.eps * away), labels

    def _scorer(
        self, where: str, settings: Sequence[Mapping[str, Any]]
    ) -> Callable[[Batch], Tensor]:
        own = [self.varied(**one) for one in settings]

        def scores(batch: Batch) -> Tensor:
            steps = {}  # one gradient for all sizes of a step
            found = []
            for v in own:
                key = (v.temperature, str(v.std), v.absent)
                if key not in steps:
                    steps[key] = v._away(batch)
                x, away, _ = steps[key]
                found.append(v._moved(x - v.eps * away))
            return torch.stack(found, 1)

        return scores

    def _class_logits(self, x: Tensor) -> Tensor:
        found = run(present(self.model), x, features=False)
        return Batch.of(x, found).class_logits(self.absent)

    def _moved(self, x: Tensor) -> Tensor:
        return logit_scores(self._class_logits(x), self.temperature).msp

    def _away(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs, the direction that raises the loss, and the classes predicted."""
        model = present(self.model)
        labels: list[Tensor] = []

        def loss(x: Tensor) -> Tensor:
            logits = self._class_logits(x)
            logits = logits.to(accumulate_type(logits.dtype))
            labels.append(logits.detach().argmax(1))
            # Times T, which leaves the sign as it is and keeps half precision from underflow.
            return self.temperature * torch.nn.functional.cross_entropy(
                logits / self.temperature, labels[0], reduction="sum"
            )

        x = to_model(model, present(batch.x))
        away = input_sign("ODIN.score", loss, x, self.std)
        return x.detach(), away, labels[0]


def input_step(
    where: str,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    std: float | Sequence[float] | None,
) -> Tensor:
    """Step to x - eps sign(grad_x loss(x)) / std, arguments as for :func:`input_sign`."""
    return x.detach() - eps * input_sign(where, loss, x, std)


def input_sign(
    where: str,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    std: float | Sequence[float] | None,
) -> Tensor:
    """The sign of :func:`input_gradient`, over ``std``.

    Args:
        where: What errors start with.
        loss: (N, ...) -> scalar, a sum over the samples.
        x: (N, ...), floating-point.
        std: None, a number, or one for each channel of (N, channels, ...).

    Raises:
        ValueError: The loss is not differentiable in x, or ``std`` does not match the channels.
        TypeError: ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating-point, got {x.dtype}")
    step = torch.tensor(1.0 if std is None else std, dtype=x.dtype, device=x.device).reciprocal()
    if step.dim():
        if x.dim() < 2 or x.shape[1] != len(step):
            raise ValueError(
                f"{where}: x must have a channel for each of the {len(step)} std, got "
                f"{tuple(x.shape)}"
            )
        step = step.reshape(-1, *[1] * (x.dim() - 2))
    return step * input_gradient(where, loss, x).sign()


def input_gradient(where: str, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A loss's gradient in x, with gradients for nothing but x.

    Args:
        where: What errors start with.
        loss: (N, ...) -> scalar, a sum over the samples.
        x: (N, ...), floating-point.

    Raises:
        ValueError: The loss is not differentiable in x.
        TypeError: ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating-point, got {x.dtype}")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x.detach()
        x.requires_grad_()
        value = loss(x)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{where}: model must be differentiable in x")
    return gradient


def check_step(
    where: str, eps: float, std: float | Sequence[float] | None
) -> tuple[float, float | list[float] | None]:
    """Size of an input step and what inputs were divided by, if they are in range."""
    eps = check_real(where, "eps", eps)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"{where}: eps must be >= 0 and finite, got {eps:g}")
    if std is None:
        return eps, None
    several = isinstance(std, Sequence) or getattr(std, "ndim", 0) == 1
    every: Any = std if several else [std]
    values = [check_real(where, "std", s) for s in every]
    if not values or not all(s > 0 and math.isfinite(s) for s in values):
        raise ValueError(f"{where}: std must be positive and finite, got {std}")
    return eps, values if several else values[0]
