"""Objectives that shape logits and features: LogitNorm, entropic open-set, objectosphere, VOS."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels._checks import check_count
from oodkernels.detectors import extract, linear_head
from oodkernels.detectors.model import Outputs
from oodkernels.nn.losses import LogitNormLoss, ObjectosphereLoss, OutlierExposureLoss
from oodkernels.training.base import Context, Objective, Step, register
from oodkernels.training.objectives import OutlierObjective

__all__ = [
    "EntropicOpenSetObjective",
    "LogitNormObjective",
    "ObjectosphereObjective",
    "VOSObjective",
]


def _with_features(objective: Objective, model: nn.Module, x: Tensor, y: Tensor) -> Outputs:
    """What the model says, with the features that its head reads, in the mode it is in."""
    found = extract(model, x, evaluate=False)
    if found.features is None:
        raise ValueError(
            f"{type(objective).__name__}: the model must have a linear layer whose input are the "
            f"features, got none"
        )
    return objective.outputs(nn.Identity(), found, y)  # type: ignore[arg-type]


@register("logitnorm")
class LogitNormObjective(Objective):
    """LogitNorm (Wei et al., ICML 2022): cross entropy of logits of one norm.

    Args:
        temperature: See :class:`~oodkernels.nn.LogitNormLoss`.
    """

    def __init__(self, temperature: float = 0.04) -> None:
        super().__init__()
        self.loss = LogitNormLoss(temperature)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        return self.loss(self.outputs(model, x, y).logits, y), {}

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        logits = self.outputs(model, x, y).logits
        return self.loss(logits, y), logits.argmax(1)

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        if self.columns is None:
            return None
        return float(self.loss(torch.zeros(1, self.columns), torch.tensor([0])))


@register("entropic-open-set", needs=["outliers"])
class EntropicOpenSetObjective(OutlierObjective):
    """Entropic open-set loss (Dhamija et al., NeurIPS 2018): outliers are to have no class.

    Cross entropy on ID samples, and to the uniform distribution on outliers, as Outlier Exposure
    with weight 1.

    Args:
        weight: Of the outliers' mean.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(OutlierExposureLoss(weight))


@register(
    "objectosphere", needs=["outliers"], scores=("objectosphere", "msp", "max-logit", "energy")
)
class ObjectosphereObjective(Objective):
    """Objectosphere (Dhamija et al., NeurIPS 2018): outliers are to have no class and no features.

    Args:
        weight: See :class:`~oodkernels.nn.ObjectosphereLoss`.
        xi: See there.
    """

    outliers = "batch"

    def __init__(self, weight: float = 1e-4, xi: float = 50.0) -> None:
        super().__init__()
        self.loss = ObjectosphereLoss(weight, xi)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        assert outliers is not None
        found = _with_features(self, model, torch.cat([x, outliers]), y)
        assert found.features is not None
        target = torch.cat([y, y.new_full((len(outliers),), -1)])
        norm = found.features.detach().float().norm(dim=-1)
        known = target >= 0
        return self.loss(found.logits, found.features, target), {
            "norm_id": norm[known].mean(),
            "norm_outliers": norm[~known].mean(),
        }


@register("vos", scores=("energy", "msp", "max-logit"))
class VOSObjective(Objective):
    """VOS (Du et al., ICLR 2022): outliers drawn from the tails of the classes' features.

    The last features of each class are kept. From a share ``start`` of the steps on, once all
    classes have as many as are kept, each step draws from a Gaussian about every class's mean, of
    one covariance, and takes the draws of the least density for outliers: their logits are the
    head's. A logistic layer of the weighted energy, log sum_c max(w_c, 0) exp(z_c), tells them from
    the ID samples, and its cross entropy is added. The layer and the w are trained with the model;
    the authors score by the plain energy.

    Args:
        weight: Of the term.
        start: Share of the steps before it counts, in [0, 1); the authors' 40 of 100 epochs.
        queue: Features kept of each class.
        draws: Draws for each class in a step.
        take: Of these, how many are taken for outliers.
        ridge: Added to the variances.

    Raises:
        ValueError: A number is out of range.
    """

    skips_parameters = True
    queue: Tensor
    filled: Tensor

    def __init__(
        self,
        weight: float = 0.1,
        start: float = 0.4,
        queue: int = 1000,
        draws: int = 10_000,
        take: int = 1,
        ridge: float = 1e-4,
    ) -> None:
        super().__init__()
        where = "VOSObjective"
        if not 0 <= start < 1:
            raise ValueError(f"{where}: start must be in [0, 1), got {start}")
        if not weight >= 0 or not ridge > 0:
            raise ValueError(
                f"{where}: weight must be at least 0 and ridge positive, got {weight} and {ridge}"
            )
        self.weight, self.start, self.ridge = float(weight), float(start), float(ridge)
        self.kept = check_count(where, "queue", queue, 2)
        self.draws, self.take = check_count(where, "draws", draws), check_count(where, "take", take)
        if self.take > self.draws:
            raise ValueError(f"{where}: take must be at most draws = {draws}, got {take}")
        self.logistic = nn.Linear(1, 2)
        self.energy_weights: nn.Parameter | None = None
        self._head: list[nn.Linear] = []  # not a module of its own
        self._warned = False

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Make room for the features of the model's head.

        Raises:
            ValueError: The logits do not come from a linear layer.
        """
        head = linear_head(model)
        if head is None:
            raise ValueError(
                "VOSObjective: the model's logits must come from an nn.Linear, got none"
            )
        self._head = [head]
        classes, width = head.out_features, head.in_features
        if self.energy_weights is None or self.queue.shape[::2] != (classes, width):
            self.energy_weights = nn.Parameter(torch.rand(classes))
            self.register_buffer("queue", torch.zeros(classes, self.kept, width))
            self.register_buffer("filled", torch.zeros(classes, dtype=torch.int64))

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        found = _with_features(self, model, x, y)
        assert found.features is not None
        loss = F.cross_entropy(found.logits, y)
        uncertainty = loss.new_zeros(())
        self._keep(found.features.detach(), y)
        begun = context.step >= self.start * context.steps
        if begun and not self._warned and bool((self.filled < self.kept).any()):
            self._warned = True
            warnings.warn(
                f"VOSObjective: at step {context.step} of {context.steps} a class has "
                f"{int(self.filled.min())} of {self.kept} features, and nothing is drawn until all "
                f"have as many: a smaller queue, or a later start",
                stacklevel=2,
            )
        if begun and bool((self.filled >= self.kept).all()):
            virtual = self._outliers().to(found.features)
            logits = torch.cat([found.logits, self._head[0](virtual)])
            is_id = torch.arange(len(logits), device=logits.device) < len(y)
            answers = self.logistic(self._energy(logits.float())[:, None])
            uncertainty = F.cross_entropy(answers, is_id.long())
        return loss + self.weight * uncertainty, {"uncertainty": uncertainty.detach()}

    def _energy(self, logits: Tensor) -> Tensor:
        assert self.energy_weights is not None
        most = logits.detach().amax(1, keepdim=True)
        total = (self.energy_weights.relu() * (logits - most).exp()).sum(1)
        return total.clamp(min=1e-30).log() + most[:, 0]

    @torch.no_grad()
    def _keep(self, features: Tensor, y: Tensor) -> None:
        queue, filled = self.queue.clone(), self.filled.clone()
        for c in y.unique().tolist():
            rows = features[y == c].to(queue)[-self.kept :]
            queue[c] = torch.cat([queue[c], rows])[-self.kept :]
            filled[c] = (filled[c] + len(rows)).clamp(max=self.kept)
        self.queue, self.filled = queue, filled

    @torch.no_grad()
    def _outliers(self) -> Tensor:
        """(C take, d): of each class's draws those of the least density."""
        classes, kept, width = self.queue.shape
        means = self.queue.mean(1)
        apart = (self.queue - means[:, None]).reshape(-1, width)
        covariance = apart.T @ apart / (classes * kept)
        eye = torch.eye(width, device=apart.device)
        factor = torch.linalg.cholesky(covariance + self.ridge * eye)
        found = []
        for mean in means:
            # The density falls with the norm of what is mapped.
            z = torch.randn(self.draws, width, device=factor.device)
            far = z[z.square().sum(1).topk(self.take).indices]
            found.append(mean + far @ factor.T)
        return torch.cat(found)

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        return None
