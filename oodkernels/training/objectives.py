"""What :class:`~oodkernels.training.Trainer` minimises: the methods' training, by name.

An objective is a module, so that what it learns and counts is in the checkpoints. It sees one batch
at a time and gives the loss; everything else is the Trainer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from oodkernels.detectors import AbnormalityModule, extract
from oodkernels.detectors.model import as_outputs
from oodkernels.groups import Groups
from oodkernels.nn.gan import Discriminator, Generator, JointGANLoss
from oodkernels.nn.losses import (
    AbsentClassLoss,
    ConfidenceLoss,
    EnergyBoundedLoss,
    OutlierExposureLoss,
)
from oodkernels.nn.mos import MOSHead, MOSLoss
from oodkernels.ops import mos_predict
from oodkernels.training.mining import DOSMiner, NTOMMiner, OutlierMiner, POEMMiner

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "OBJECTIVES",
    "AbnormalityObjective",
    "ConfidenceObjective",
    "Context",
    "MOSObjective",
    "Objective",
    "OutlierObjective",
    "PoolObjective",
    "SoftmaxObjective",
    "SyntheticObjective",
    "make_objective",
]

Step = tuple[Tensor, dict[str, Tensor]]


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
        """Over processes."""
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


class Objective(nn.Module):
    """Base class. A subclass says in :meth:`step` what the loss of a batch is.

    Attributes:
        outliers: What is to come with a batch: None for nothing, "batch" for one of the outlier
            loader, "pool" for one of the outliers selected for the epoch.
        skips_parameters: Whether the loss may leave out parameters that are trained: then DDP has
            to search for them.
    """

    outliers: ClassVar[Literal["batch", "pool"] | None] = None
    skips_parameters: ClassVar[bool] = False

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

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss on ID samples of a model in evaluation mode, and their predicted class ids."""
        logits = as_outputs(model(x)).logits
        return F.cross_entropy(logits, y), logits.argmax(1)

    def figures(self) -> dict[str, float]:
        """Further figures for a row of the log."""
        return {}


class SoftmaxObjective(Objective):
    """Cross entropy: what MSP, max logit, energy, ODIN and most other scores are read from.

    Args:
        mixup: Alpha of mixup's Beta(alpha, alpha), one draw a batch (Zhang et al., ICLR 2018); 0:
            none.
        label_smoothing: As ``torch.nn.CrossEntropyLoss`` has it.
    """

    def __init__(self, mixup: float = 0.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if mixup < 0:
            raise ValueError(f"{type(self).__name__}: mixup must be at least 0, got {mixup}")
        self.mixup = mixup
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        if not self.mixup:
            return self.loss(as_outputs(model(x)).logits, y), {}
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().to(x)
        other = torch.randperm(len(x), device=x.device)
        logits = as_outputs(model(share * x + (1 - share) * x[other])).logits
        loss = share * self.loss(logits, y) + (1 - share) * self.loss(logits, y[other])
        return loss, {}


class MOSObjective(SoftmaxObjective):
    """Group softmax (Huang & Li, CVPR 2021); the authors train with mixup 0.1.

    Args:
        groups: Of the head; None: those of the model's :class:`~oodkernels.MOSHead`.
        mixup: See :class:`SoftmaxObjective`.
    """

    def __init__(self, groups: Groups | None = None, mixup: float = 0.0) -> None:
        super().__init__(mixup)
        self.groups = groups

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Take the groups of the model's head.

        Raises:
            ValueError: None were given, and the model has no or several.
        """
        if self.groups is None:
            heads = [module for module in model.modules() if isinstance(module, MOSHead)]
            if len(heads) != 1:
                raise ValueError(
                    "MOSObjective: groups must be given, or the model have one MOSHead, got "
                    f"{len(heads)}"
                )
            self.groups = heads[0].groups
        self.loss = MOSLoss(self.groups)

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        assert self.groups is not None
        logits = as_outputs(model(x)).logits
        return self.loss(logits, y), self.groups.to_class(mos_predict(logits, self.groups).label)


class OutlierObjective(Objective):
    """A loss of ID samples and outliers, from one forward on both.

    Args:
        loss: (logits, target) -> scalar, target -1 for outliers.
        miner: Selects as many of each step's outliers as there are ID samples, by features and
            logits of the model in evaluation mode; None: all are taken.
    """

    outliers = "batch"

    def __init__(self, loss: nn.Module, miner: OutlierMiner | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner
        self.absent = isinstance(loss, AbsentClassLoss)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        assert outliers is not None
        if self.miner is not None and self.outliers == "batch":
            with torch.no_grad():
                features, logits = self.read(model, outliers)
            rows = self.miner.select(features, logits, min(len(x), len(outliers)))
            outliers = outliers[rows]
        logits = as_outputs(model(torch.cat([x, outliers]))).logits
        return self.loss(logits, torch.cat([y, y.new_full((len(outliers),), -1)])), {}

    def read(self, model: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Features and logits of the model in evaluation mode, as far as the miner needs them."""
        needs = frozenset[str]() if self.miner is None else self.miner.needs
        found = extract(model, x)
        # Or autocast may keep weights it converted, without their graph, for the forward to come.
        torch.clear_autocast_cache()
        if "features" in needs and found.features is None:
            raise ValueError(
                f"{type(self).__name__}: the model must have a linear layer whose input are the "
                "features, got none"
            )
        features = found.features if "features" in needs else None
        # A miner that needs neither still has to know how many there are.
        return features, found.logits if features is None or "logits" in needs else None

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`; the absent class is no answer."""
        logits = as_outputs(model(x)).logits
        known = logits[:, :-1] if self.absent else logits
        return F.cross_entropy(logits, y), known.argmax(1)

    def figures(self) -> dict[str, float]:
        """What the last selection looked at."""
        if self.miner is None or self.miner.last is None:
            return {}
        summary = self.miner.last.summary()
        return {f"mining_{name}": value for name, value in summary.items() if name != "step"}

    def get_extra_state(self) -> dict[str, Any]:
        """Of the miner."""
        return {"miner": None if self.miner is None else self.miner.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        if self.miner is not None:
            self.miner.load_state_dict(state["miner"])


class PoolObjective(OutlierObjective):
    """A loss of ID samples and outliers, which are selected once an epoch, from a whole pool.

    Args:
        loss: As for :class:`OutlierObjective`.
        miner: Selects outliers.
        per_sample: Outliers to select, a training sample.
        candidates: Samples of the pool, drawn at random each epoch, to select from; None: all.
        memory: Epochs whose outliers the miner's posterior remembers.
    """

    outliers = "pool"  # type: ignore[assignment]

    def __init__(
        self,
        loss: nn.Module,
        miner: OutlierMiner,
        per_sample: float = 1.0,
        candidates: int | None = None,
        memory: int = 4,
    ) -> None:
        super().__init__(loss, miner)
        self.per_sample, self.candidates = per_sample, candidates
        self.pool: Tensor = torch.empty(0, dtype=torch.int64)
        self._recent: deque[Tensor] = deque(maxlen=memory)
        self._figures: dict[str, float] = {}

    @property
    def reads_training_data(self) -> bool:
        """Whether :meth:`mine` wants features of the training data."""
        return isinstance(self.miner, POEMMiner)

    def mine(
        self,
        samples: Tensor,
        features: Tensor | None,
        logits: Tensor | None,
        trained: Tensor | None,
        n: int,
    ) -> None:
        """Select the outliers of an epoch, into ``pool``.

        Args:
            samples: (N,) int64, indices in the pool's data set.
            features: (N, d), where the miner needs them.
            logits: (N, columns), where it needs them.
            trained: (M, d) features of the training data, where they are wanted.
            n: How many to select; N if that is less.
        """
        assert self.miner is not None
        if trained is not None:
            self.miner.reset()
            self.miner.update(trained, torch.zeros(len(trained), dtype=torch.int64))
            if self._recent and features is not None:
                seen = features[torch.isin(samples, torch.cat(list(self._recent)))]
                self.miner.update(seen, torch.full((len(seen),), -1))
        rows = self.miner.select(features, logits, min(n, len(samples)))
        self.pool = samples[rows]
        self._recent.append(self.pool)
        self._figures = super().figures()

    def figures(self) -> dict[str, float]:
        """What the epoch's selection looked at."""
        return self._figures

    def get_extra_state(self) -> dict[str, Any]:
        """Of the miner, and what it selected."""
        recent = list(self._recent)
        return super().get_extra_state() | {"recent": recent, "figures": self._figures}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        super().set_extra_state(state)
        self._recent.extend(state["recent"])
        self._figures = state["figures"]
        if self._recent:
            self.pool = self._recent[-1]


class ConfidenceObjective(Objective):
    """Confidence branch (DeVries & Taylor, 2018); the model gives (logits, confidence logit).

    Args:
        budget: See :class:`~oodkernels.nn.ConfidenceLoss`.
        weight: See there.
    """

    def __init__(self, budget: float = 0.3, weight: float = 0.1) -> None:
        super().__init__()
        self.loss = ConfidenceLoss(budget, weight)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        found = as_outputs(model(x))
        if found.confidence is None:
            raise ValueError(
                "ConfidenceObjective: the model must give (logits, confidence), got logits alone"
            )
        price = self.loss.weight.clone()
        loss = self.loss(found.logits, found.confidence, y)
        self.loss.weight = context.mean(self.loss.weight)
        return loss, {"lambda": price}


class AbnormalityObjective(Objective):
    """Abnormality module (Hendrycks & Gimpel, ICLR 2017, section 4), in two phases.

    First classifier and decoder learn together, then the risk network alone, as
    :class:`~oodkernels.detectors.AbnormalityModule` has it, which :attr:`detector` is: it can score
    after the run. The authors train both phases with Adam at 0.001.

    Args:
        first: Share of the steps of the first phase.
        detector: Options of the detector: ``layer``, ``decoder``, ``noise``.

    Attributes:
        detector: With the networks that are trained.
    """

    skips_parameters = True

    def __init__(self, first: float = 2 / 3, **detector: Any) -> None:
        super().__init__()
        if not 0 < first < 1:
            raise ValueError(f"AbnormalityObjective: first must be in (0, 1), got {first}")
        self.first = first
        self.detector = AbnormalityModule(**detector)
        self.networks: nn.ModuleDict | None = None

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Make decoder and risk network."""
        if self.networks is None or self.detector.model is not model:
            self.detector.model = model
            self.detector.build(sample())
            decoder, risk = self.detector.decoder, self.detector.risk
            assert decoder is not None
            assert risk is not None
            self.networks = nn.ModuleDict({"decoder": decoder, "risk": risk})

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        assert self.networks is not None
        if context.step < self.first * context.steps:
            return self.detector.reconstruction_loss(x, y), {}
        self.networks["decoder"].eval()
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        loss = self.detector.risk_loss(x[order], generator)
        self.detector.finish()
        return loss, {}


class SyntheticObjective(Objective):
    """Outliers made by a generator that is trained beside the classifier (Lee et al., ICLR 2018).

    Each batch updates discriminator, generator and classifier, in this order.

    Args:
        generator: Noise to inputs; None: a small one, for square images.
        discriminator: Inputs to logits; None: a small one.
        beta: See :class:`~oodkernels.nn.JointGANLoss`.
        lr: Of Adam, for generator and discriminator.
    """

    def __init__(
        self,
        generator: Generator | None = None,
        discriminator: nn.Module | None = None,
        beta: float = 0.1,
        lr: float = 2e-4,
    ) -> None:
        super().__init__()
        self.loss = JointGANLoss(beta)
        self.generator, self.discriminator, self.lr = generator, discriminator, lr
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Make the networks that were not given.

        Raises:
            ValueError: They were not, and inputs are no square images.
        """
        if self.generator is None or self.discriminator is None:
            shape = tuple(sample().shape)
            if len(shape) != 4 or shape[2] != shape[3]:
                raise ValueError(
                    "SyntheticObjective: generator and discriminator must be given for inputs "
                    f"other than (N, channels, size, size), got {shape}"
                )
            self.generator = self.generator or Generator(shape[2], shape[1])
            self.discriminator = self.discriminator or Discriminator(shape[2], shape[1])
        # Frozen but for their own updates: neither DDP nor the model's optimiser are to see them.
        self.requires_grad_(False)
        self._optimizers = {
            name: torch.optim.Adam(network.parameters(), self.lr, (0.5, 0.999))
            for name, network in (("g", self.generator), ("d", self.discriminator))
        }

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        generator, discriminator = self.generator, self.discriminator
        assert generator is not None
        assert discriminator is not None
        with _trainable(generator):
            generated = generator.sample(len(x))
            if generated.shape != x.shape:
                raise ValueError(
                    f"SyntheticObjective: the generator must give {tuple(x.shape)}, as the "
                    f"training loader does, got {tuple(generated.shape)}"
                )
            with _trainable(discriminator):
                real, fake = discriminator(x), discriminator(generated.detach())
                d_loss = self.loss.discriminator(real, fake)
                context.update(self._optimizers["d"], d_loss)
            logits = as_outputs(model(generated)).logits
            g_loss = self.loss.generator(discriminator(generated), logits)
            context.update(self._optimizers["g"], g_loss)
        with torch.no_grad():
            generated = generator.sample(len(x))
        torch.clear_autocast_cache()
        logits = as_outputs(model(torch.cat([x, generated]))).logits
        loss = self.loss(logits, torch.cat([y, torch.full_like(y, -1)]))
        return loss, {"discriminator_loss": d_loss, "generator_loss": g_loss}

    def get_extra_state(self) -> dict[str, Any]:
        """Of the two optimisers."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def outlier_exposure(weight: float = 0.5) -> OutlierObjective:
    """Outlier Exposure (Hendrycks et al., ICLR 2019)."""
    return OutlierObjective(OutlierExposureLoss(weight))


def energy_bounded(
    weight: float = 0.1,
    m_in: float | None = None,
    m_out: float | None = None,
    temperature: float = 1.0,
) -> OutlierObjective:
    """Energy-bounded learning (Liu et al., NeurIPS 2020)."""
    return OutlierObjective(EnergyBoundedLoss(weight, m_in, m_out, temperature))


def absent_class(beta: float = 1.0) -> OutlierObjective:
    """An absent class for outliers, which are taken as they come: what DOS and NTOM improve on."""
    return OutlierObjective(AbsentClassLoss(beta))


def dos(beta: float = 1.0, **miner: Any) -> OutlierObjective:
    """DOS (Jiang et al., ICLR 2024): diverse outliers of each step's candidates.

    Args:
        beta: Weight of the outliers.
        miner: Of :class:`~oodkernels.training.DOSMiner`.
    """
    return OutlierObjective(AbsentClassLoss(beta), DOSMiner(**miner))


def ntom(
    beta: float = 1.0, per_sample: float = 2.0, candidates: int | None = None, **miner: Any
) -> PoolObjective:
    """NTOM (Chen et al., ECML 2021): a window of the hardest of the pool, each epoch.

    Args:
        beta: Weight of the outliers.
        per_sample: See :class:`PoolObjective`.
        candidates: See :class:`PoolObjective`.
        miner: Of :class:`~oodkernels.training.NTOMMiner`.
    """
    return PoolObjective(AbsentClassLoss(beta), NTOMMiner(**miner), per_sample, candidates)


def poem(
    weight: float = 0.1,
    m_in: float | None = None,
    m_out: float | None = None,
    per_sample: float = 1.0,
    candidates: int | None = None,
    **miner: Any,
) -> PoolObjective:
    """POEM (Ming et al., ICML 2022): the pool's nearest to a sampled boundary, each epoch.

    Args:
        weight: See :class:`~oodkernels.nn.EnergyBoundedLoss`.
        m_in: See there.
        m_out: See there.
        per_sample: See :class:`PoolObjective`.
        candidates: See :class:`PoolObjective`.
        miner: Of :class:`~oodkernels.training.POEMMiner`.
    """
    loss = EnergyBoundedLoss(weight, m_in, m_out)
    return PoolObjective(loss, POEMMiner(**miner), per_sample, candidates)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "softmax": SoftmaxObjective,
    "mos": MOSObjective,
    "oe": outlier_exposure,
    "energy": energy_bounded,
    "absent-class": absent_class,
    "dos": dos,
    "ntom": ntom,
    "poem": poem,
    "confidence": ConfidenceObjective,
    "abnormality": AbnormalityObjective,
    "synthetic": SyntheticObjective,
}
"""Every objective by its short name."""


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name in :data:`OBJECTIVES`.

    Raises:
        ValueError: Unknown name, or options it does not have.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"make_objective: name must be one of {', '.join(OBJECTIVES)}, got {name!r}"
        )
    try:
        return OBJECTIVES[name](**(options or {}))
    except TypeError as error:
        raise ValueError(f"make_objective: {name}: {error}") from error


@contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)
