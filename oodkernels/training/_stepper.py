"""Steps of the optimiser, each of which is done whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from oodkernels.training import _modes
from oodkernels.training._data import FitData, Shares, StepBatch
from oodkernels.training._random import seeded
from oodkernels.training.base import Context, Objective
from oodkernels.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class _Step(nn.Module):
    """Model and objective as one module, whose forward is a step's loss: what DDP has to wrap."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.step(self.model, x, y, outliers, context)


class Stepper:
    """Model, objective, optimiser, schedule and average, made ready to train.

    Raises:
        ValueError: There is nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        fabric: Fabric,
        shares: Shares,
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.fabric, self.shares = fabric, shares
        _modes.train(model)
        objective.train()
        module = _Step(model, objective)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("Trainer.fit: the model must have a parameter to train, got none")
        self.optimizer = make_optimizer(self._parameters)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self._module, self._stepper = fabric.setup(module, self.optimizer)
        self.lr = 0.0
        self.ema = (
            None
            if config.ema is None
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        )

    def take(self, step: int, epoch: int, batches: Sequence[StepBatch]) -> dict[str, float]:
        """A step on these batches.

        Returns:
            Loss, norm of the gradient and the objective's figures, over all processes.

        Raises:
            FloatingPointError: Loss or gradient is not finite; all is as it was before.
        """
        fabric = self.fabric
        context = Context(step, self.shares.steps, epoch, fabric)
        total = self.sum(torch.tensor(float(sum(b.counted for b in batches)))).item()
        figures: dict[str, Tensor] = {}
        undo = self.undo()
        for i, batch in enumerate(batches):
            with fabric.no_backward_sync(self._module, enabled=i + 1 < len(batches)):
                loss, logs = self._module(batch.x, batch.y, batch.outliers, context)
                share = batch.counted / total
                # DDP takes the mean over processes.
                fabric.backward(loss * (share * self.shares.world))
            for name, value in {"loss": loss, **logs}.items():
                value = value.detach().float() * share
                figures[name] = figures[name] + value if name in figures else value
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        sums = self.sum(torch.stack(list(figures.values()))).tolist()
        values = dict(zip(figures, sums, strict=True)) | {"grad_norm": norm.item()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                undo()
                self._stepper.zero_grad()
                what = "loss" if name == "loss" else "norm of the gradient"
                samples = [batch.samples for batch in batches]
                raise FloatingPointError(
                    f"Trainer.fit: the {what} is {values[name]} at step {step} (epoch "
                    f"{epoch}), training samples {_shorten(samples)}; the weights are "
                    "those before the step. A smaller lr, a warm-up or clip_norm may help"
                )
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self._stepper.step()
        self._stepper.zero_grad()
        self._scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return values

    def undo(self) -> Callable[[], None]:
        """What takes back all that a step changes before its loss is known: BatchNorm's means."""
        kept = [
            (module, name, buffer, buffer.clone())
            for part in (self.model, self.objective)
            for module in part.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        of_objective = self.objective.undo()

        def back() -> None:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
            of_objective()

        return back

    def check_single(self, data: FitData) -> None:
        """Refuse a batch of one sample that the model cannot be trained on, before it comes."""
        if data.train.iterable or data.outliers is not None:
            return
        sizes = [len(b) if isinstance(b, (list, tuple)) else 1 for b in data.train.order(0)]
        if 1 not in sizes or not any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
            for m in self.model.modules()
        ):
            return
        undo = self.undo()
        try:
            with torch.no_grad(), seeded((self.config.seed,)), self.fabric.autocast():
                self.model(data.sample()[:1])
        except ValueError as error:
            raise ValueError(
                "Trainer.fit: training batches must have more than one sample for the model's "
                f"BatchNorm, got one of one: another batch size, or drop_last=True, leaves none "
                f"over ({error})"
            ) from None
        finally:
            undo()

    def _factor(self, step: int) -> float:
        """Factor of the learning rate, in a step."""
        c = self.config
        if step < c.warmup:
            return (step + 1) / c.warmup
        if c.schedule == "step":
            return float(c.gamma ** sum(step >= m * self.shares.steps for m in c.milestones))
        if c.schedule == "constant":
            return 1.0
        share = (step - c.warmup) / max(self.shares.steps - c.warmup, 1)
        return (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.shares.world == 1:
            return values
        found = self.fabric.all_reduce(values.to(self.fabric.device), reduce_op="sum")
        assert isinstance(found, Tensor)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {
            "model": self.model.state_dict(),
            "objective_state": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: It is of another model, objective or optimiser.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.objective.load_state_dict(state["objective_state"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Trainer.fit: the checkpoint is of another model: {error}") from error


def _shorten(samples: Sequence[Any], most: int = 10) -> str:
    found: list[Any] = []
    for batch in samples:
        if batch is not None:
            found += batch if isinstance(batch, (list, tuple)) else [batch]
    if not found:
        return "of an iterable data set"
    text = ", ".join(str(i) for i in found[:most])
    return text + (f" and {len(found) - most} more" if len(found) > most else "")
