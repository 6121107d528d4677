"""What :class:`~oodkernels.training.Trainer` minimises: the methods' training, by name.

An objective is a module, so that what it learns and counts is in the checkpoints. It sees one batch
at a time and gives the loss; everything else is the Trainer's. What there is to know of one before
it is made, for command lines, tables and tests, is in its :class:`ObjectiveSpec`.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oodkernels._ranks import gathered, ranks
from oodkernels.detectors import AbnormalityModule, extract
from oodkernels.detectors.abnormality import Noise
from oodkernels.detectors.model import as_outputs
from oodkernels.groups import Groups
from oodkernels.nn.gan import Discriminator, Generator, JointGANLoss
from oodkernels.nn.heads import Head
from oodkernels.nn.losses import (
    AbsentClassLoss,
    ConfidenceLoss,
    EnergyBoundedLoss,
    OutlierExposureLoss,
)
from oodkernels.nn.mos import MOSHead, MOSLoss, check_layout
from oodkernels.ops import mos_log_others, mos_predict
from oodkernels.training.base import OBJECTIVES, Context, Objective, Step, make_objective, register
from oodkernels.training.mining import (
    DOSMiner,
    Mode,
    NTOMMiner,
    OutlierMiner,
    POEMMiner,
    Score,
)

__all__ = [
    "OBJECTIVES",
    "AbnormalityObjective",
    "AbsentClassObjective",
    "ConfidenceObjective",
    "DOSObjective",
    "EnergyBoundedObjective",
    "MOSObjective",
    "MOSOutlierObjective",
    "NTOMObjective",
    "OutlierExposureObjective",
    "OutlierObjective",
    "POEMObjective",
    "PoolObjective",
    "SoftmaxObjective",
    "SyntheticObjective",
    "make_objective",
]


@register("softmax")
class SoftmaxObjective(Objective):
    """Cross entropy, of which most scores are read (MSP: Hendrycks & Gimpel, ICLR 2017).

    Args:
        mixup: Alpha of mixup's Beta(alpha, alpha), one draw a batch (Zhang et al., ICLR 2018); 0:
            none.
        label_smoothing: As ``torch.nn.CrossEntropyLoss`` has it.
    """

    def __init__(self, mixup: float = 0.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not mixup >= 0:
            raise ValueError(f"{type(self).__name__}: mixup must be at least 0, got {mixup}")
        self.mixup = float(mixup)
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=float(label_smoothing))

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        if not self.mixup:
            return self.loss(self.outputs(model, x, y).logits, y), {}
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().to(x)
        other = torch.randperm(len(x), device=x.device)
        logits = self.outputs(model, share * x + (1 - share) * x[other], y).logits
        loss = share * self.loss(logits, y) + (1 - share) * self.loss(logits, y[other])
        return loss, {}

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        return _chance(self.loss, self.columns, [0])


@register("mos", needs=["groups"], scores=("mos", "mos-log-odds"))
class MOSObjective(SoftmaxObjective):
    """Group softmax (Huang & Li, CVPR 2021); the authors train with mixup 0.1.

    Args:
        groups: Of the head, or their JSON; None: those of the model's :class:`~oodkernels.MOSHead`.
        mixup: See :class:`SoftmaxObjective`.

    Raises:
        TypeError: ``groups`` is neither.
        ValueError: It is no JSON of groups.
    """

    def __init__(self, groups: Groups | str | None = None, mixup: float = 0.0) -> None:
        super().__init__(mixup)
        if not isinstance(groups, (Groups, str, type(None))):
            raise TypeError(f"groups must be Groups or their JSON, got {type(groups).__name__}")
        self.groups = Groups.from_json(groups) if isinstance(groups, str) else groups

    @property
    def num_classes(self) -> int | None:
        """See :class:`Objective`."""
        return None if self.groups is None else self.groups.num_classes

    @property
    def fixed_groups(self) -> Groups | None:
        """See :class:`Objective`."""
        return self.groups

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Take the groups of the model's head, or hold those that were given against them.

        Raises:
            ValueError: None were given, and the model has no head with groups or several; or they
                are others than those of its head.
        """
        heads = [m.groups for m in model.modules() if isinstance(m, (MOSHead, Head)) and m.groups]
        if self.groups is None:
            if len(heads) != 1:
                raise ValueError(
                    "MOSObjective: groups must be given, or the model have one MOSHead, got "
                    f"{len(heads)}"
                )
            self.groups = heads[0]
        elif len(heads) == 1:
            check_layout(
                "MOSObjective: groups must be those of the model's head,", heads[0], self.groups
            )
        self.loss = MOSLoss(self.groups)

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        assert self.groups is not None
        logits = self.outputs(model, x, y).logits
        return self.loss(logits, y), self.groups.to_class(mos_predict(logits, self.groups).label)

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        if self.groups is None:
            return None
        return float(self.groups.offsets.diff().double().log().sum())


@register("mos-outliers", needs=["groups", "outliers"], scores=("mos-log-odds", "mos"))
class MOSOutlierObjective(MOSObjective):
    """Group softmax whose "others" are the target of outliers too, in every group.

    An extension of MOS (Huang & Li, CVPR 2021): there "others" are learned from the other groups'
    classes alone.

    Args:
        weight: Of the outliers' loss, the sum over the groups of -log p_others, > 0.
        groups: As for :class:`MOSObjective`.

    Raises:
        ValueError: ``weight`` is not positive.
    """

    outliers = "batch"

    def __init__(self, weight: float = 1.0, groups: Groups | str | None = None) -> None:
        super().__init__(groups)
        if not weight > 0:
            raise ValueError(f"MOSOutlierObjective: weight must be positive, got {weight}")
        self.weight = float(weight)

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        assert outliers is not None
        assert self.groups is not None
        logits = self.outputs(model, torch.cat([x, outliers]), y).logits
        foreign = -mos_log_others(logits[len(x) :], self.groups).sum(-1).mean()
        return self.loss(logits[: len(x)], y) + self.weight * foreign, {}

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        inside = super().chance()
        return None if inside is None else (1 + self.weight) * inside


class OutlierObjective(Objective):
    """A loss of ID samples and outliers, from one forward on both.

    Args:
        loss: (logits, target) -> scalar, target -1 for outliers.
        miner: Selects as many of each step's outliers as there are ID samples, by features and
            logits of the model in evaluation mode; None: all are taken.
    """

    outliers: ClassVar[Literal["batch", "pool"] | None] = "batch"
    together = False

    def __init__(self, loss: nn.Module, miner: OutlierMiner | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner
        self.absent = isinstance(loss, AbsentClassLoss)

    def mined(self, model: nn.Module, outliers: Tensor, n: int) -> Tensor:
        """The outliers that the miner selects of a step's candidates, for n ID samples.

        Where :attr:`together` is set, of the candidates of all processes, a share for each.
        """
        assert self.miner is not None
        with torch.no_grad():
            features, logits = self.read(model, outliers)
        rank, world = ranks()
        if world == 1 or not self.together:
            return outliers[self.miner.select(features, logits, min(n, len(outliers)))]
        counts = gathered((n, len(outliers)))
        wanted, sizes = sum(n for n, _ in counts), [size for _, size in counts]
        features, logits = (None if t is None else _of_all(t, sizes) for t in (features, logits))
        rows = self.miner.select(features, logits, min(wanted, sum(sizes)))
        return _of_all(outliers, sizes)[rows[rank::world]]

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, outliers: Tensor | None, context: Context
    ) -> Step:
        """See :class:`Objective`."""
        assert outliers is not None
        if self.miner is not None and self.outliers == "batch":
            outliers = self.mined(model, outliers, len(x))
        logits = self.outputs(model, torch.cat([x, outliers]), y).logits
        return self.loss(logits, torch.cat([y, y.new_full((len(outliers),), -1)])), {}

    def undo(self) -> Callable[[], None]:
        """Take back the selection."""
        miner = self.miner
        if miner is None or self.outliers == "pool":
            return lambda: None
        step, last = miner.step, miner.last

        def back() -> None:
            miner.step, miner.last = step, last

        return back

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        return _chance(self.loss, self.columns, [0, -1])

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

    def figures(self) -> dict[str, float]:
        """What the last selection looked at."""
        if self.miner is None or self.miner.last is None:
            return {}
        summary = self.miner.last.summary()
        return {f"mining_{name}": value for name, value in summary.items() if name != "step"}

    def get_extra_state(self) -> dict[str, Any]:
        """Give the miner's state."""
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
        per_sample: Outliers to select, a training sample; each is read once an epoch.
        candidates: Samples of the pool, drawn at random each epoch, to select from; None: all.
        memory: Epochs whose outliers the miner's posterior remembers, at least 1.

    Raises:
        ValueError: A number is out of range.
    """

    outliers = "pool"

    def __init__(
        self,
        loss: nn.Module,
        miner: OutlierMiner,
        per_sample: float = 1.0,
        candidates: int | None = None,
        memory: int = 4,
    ) -> None:
        super().__init__(loss, miner)
        for name, value, good in (
            ("per_sample", per_sample, per_sample > 0),
            ("candidates", candidates, candidates is None or candidates >= 1),
            ("memory", memory, memory >= 1),
        ):
            if not good:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {value}")
        self.per_sample, self.candidates = float(per_sample), candidates
        self.pool: Tensor = torch.empty(0, dtype=torch.int64)
        self._recent: deque[Tensor] = deque(maxlen=int(memory))
        self._figures: dict[str, float] = {}
        self._warned = False

    @property
    def reads_training_data(self) -> bool:
        """Whether :meth:`mine` wants features of the training data."""
        return isinstance(self.miner, POEMMiner)

    @property
    def remembered(self) -> Tensor:
        """(R,) int64, samples of the pool whose features :meth:`mine` wants: those of the epochs
        before, as often as they were selected; none where it wants none."""
        recent = self._recent if self.reads_training_data else ()
        return torch.cat([self.pool[:0], *recent])

    def mine(
        self,
        samples: Tensor,
        features: Tensor | None,
        logits: Tensor | None,
        trained: Tensor | None,
        n: int,
        remembered: Tensor | None = None,
    ) -> None:
        """Select the outliers of an epoch, into ``pool``.

        A warning says once that the pool is too small for a choice.

        Args:
            samples: (N,) int64, indices in the pool's data set.
            features: (N, d), where the miner needs them.
            logits: (N, columns), where it needs them.
            trained: (M, d) features of the training data, where they are wanted.
            n: How many to select; N if that is less.
            remembered: (R, d) features of :attr:`remembered`, where there are any.
        """
        assert self.miner is not None
        if trained is not None:
            self.miner.reset()
            # As in the authors' code: the prior alone before the first epoch; then the training
            # data count once for every epoch that is remembered.
            if self._recent:
                labels = torch.zeros(len(trained), dtype=torch.int64)
                self.miner.update(trained, labels, len(self._recent))
                assert remembered is not None
                self.miner.update(remembered, torch.full((len(remembered),), -1))
        if n >= len(samples) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: {len(samples)} candidates are no more than the {n} to be "
                "selected, so all are taken and nothing is mined: a larger pool, or a smaller "
                "per_sample, makes a choice",
                stacklevel=6,
            )
        rows = self.miner.select(features, logits, min(n, len(samples)))
        self.pool = samples[rows]
        self._recent.append(self.pool)
        self._figures = super().figures()

    def figures(self) -> dict[str, float]:
        """What the epoch's selection looked at."""
        return self._figures

    def get_extra_state(self) -> dict[str, Any]:
        """Give the miner's state, and what it selected."""
        recent = list(self._recent)
        return super().get_extra_state() | {"recent": recent, "figures": self._figures}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        super().set_extra_state(state)
        self._recent.extend(state["recent"])
        self._figures = state["figures"]
        if self._recent:
            self.pool = self._recent[-1]


@register("oe", needs=["outliers"], per_sample=2)
class OutlierExposureObjective(OutlierObjective):
    """Outlier Exposure (Hendrycks et al., ICLR 2019).

    The authors read two outliers for each ID sample.

    Args:
        weight: See :class:`~oodkernels.nn.OutlierExposureLoss`.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__(OutlierExposureLoss(weight))


@register("energy", needs=["outliers"], per_sample=2, scores=("energy", "msp", "max-logit"))
class EnergyBoundedObjective(OutlierObjective):
    """Energy-bounded learning (Liu et al., NeurIPS 2020).

    The authors read two outliers for each ID sample.

    Args:
        weight: See :class:`~oodkernels.nn.EnergyBoundedLoss`.
        m_in: See there; None: it follows the number of classes.
        m_out: See there; None: it follows the number of classes.
        temperature: See there.
    """

    def __init__(
        self,
        weight: float = 0.1,
        m_in: float | None = None,
        m_out: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(EnergyBoundedLoss(weight, m_in, m_out, temperature))


_ABSENT_SCORES = ("absent-class", "msp", "max-logit", "energy")


@register("absent-class", needs=["outliers", "absent class"], scores=_ABSENT_SCORES)
class AbsentClassObjective(OutlierObjective):
    """An absent class for outliers as they come: what DOS and NTOM improve on.

    Args:
        beta: Weight of the outliers.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__(AbsentClassLoss(beta))


@register("dos", needs=["outliers", "absent class"], per_sample=6, scores=_ABSENT_SCORES)
class DOSObjective(OutlierObjective):
    """DOS (Jiang et al., ICLR 2024): diverse outliers of each step's candidates.

    The authors read six candidates for each ID sample.

    Args:
        beta: Weight of the outliers.
        k: See :class:`~oodkernels.training.DOSMiner`.
        n_init: See there.
        score: See there.
        mode: See there.
        block: See there.
        seed: See there.
        together: Whether the processes of a run select of all their candidates together, as one
            process with all of them would. Each then receives the candidates of the others, with
            features and logits, and clusters them all.
    """

    clusters_candidates = True

    def __init__(
        self,
        beta: float = 1.0,
        k: int | None = None,
        n_init: int = 5,
        score: Score = "absent-class",
        mode: Mode = "default",
        block: int | None = None,
        seed: int = 0,
        together: bool = False,
    ) -> None:
        super().__init__(AbsentClassLoss(beta), DOSMiner(k, n_init, score, mode, block, seed))
        self.together = together


@register("ntom", needs=["outliers", "absent class"], per_sample=2, scores=_ABSENT_SCORES)
class NTOMObjective(PoolObjective):
    """NTOM (Chen et al., ECML 2021): a window of the hardest of the pool, each epoch.

    Args:
        beta: Weight of the outliers.
        per_sample: See :class:`PoolObjective`; the authors train on two for each ID sample.
        candidates: See there.
        q: See :class:`~oodkernels.training.NTOMMiner`.
        score: See there.
        seed: See there.
    """

    def __init__(
        self,
        beta: float = 1.0,
        per_sample: float = 2.0,
        candidates: int | None = None,
        q: float = 0.125,
        score: Score = "absent-class",
        seed: int = 0,
    ) -> None:
        miner = NTOMMiner(q, score, seed)
        super().__init__(AbsentClassLoss(beta), miner, per_sample, candidates)


@register("poem", needs=["outliers"], scores=("energy", "msp", "max-logit"))
class POEMObjective(PoolObjective):
    """POEM (Ming et al., ICML 2022): the pool's nearest to a sampled boundary, each epoch.

    Args:
        weight: See :class:`~oodkernels.nn.EnergyBoundedLoss`; the authors' script has margins of
            -25 and -7.
        m_in: See there; None: it follows the number of classes.
        m_out: See there; None: it follows the number of classes.
        per_sample: See :class:`PoolObjective`.
        candidates: See there.
        memory: Epochs whose outliers the posterior remembers; the training data count as often.
        sigma: See :class:`~oodkernels.training.POEMMiner`.
        noise: See there.
        target: See there.
        mode: See there.
        seed: See there.
    """

    def __init__(
        self,
        weight: float = 0.1,
        m_in: float | None = None,
        m_out: float | None = None,
        per_sample: float = 1.0,
        candidates: int | None = None,
        memory: int = 4,
        sigma: float = 20.0,
        noise: float = 0.5,
        target: float = 3.0,
        mode: Mode = "default",
        seed: int = 0,
    ) -> None:
        loss = EnergyBoundedLoss(weight, m_in, m_out)
        miner = POEMMiner(sigma, noise, target, mode, seed)
        super().__init__(loss, miner, per_sample, candidates, memory)


@register("confidence", needs=["confidence"], scores=("confidence", "msp", "max-logit", "energy"))
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
        found = self.outputs(model, x, y)
        if found.confidence is None:
            raise ValueError(
                "ConfidenceObjective: the model must give (logits, confidence), got logits alone"
            )
        price = self.loss.weight.clone()
        loss = self.loss(found.logits, found.confidence, y)
        self.loss.weight = context.mean(self.loss.weight)
        return loss, {"lambda": price}


@register("abnormality", needs=["images"])
class AbnormalityObjective(Objective):
    """Abnormality module (Hendrycks & Gimpel, ICLR 2017, section 4), in two phases.

    First classifier and decoder learn together, then the risk network alone, as
    :class:`~oodkernels.detectors.AbnormalityModule` has it, which :attr:`detector` is: it can score
    after the run. The authors train both phases with Adam at 0.001.

    Args:
        first: Share of the steps of the first phase.
        layer: See :class:`~oodkernels.detectors.AbnormalityModule`.
        decoder: See there.
        noise: See there.

    Attributes:
        detector: With the networks that are trained.
    """

    skips_parameters = True

    def __init__(
        self,
        first: float = 2 / 3,
        layer: str | None = None,
        decoder: nn.Module | None = None,
        noise: Noise | None = None,
    ) -> None:
        super().__init__()
        if not 0 < first < 1:
            raise ValueError(f"AbnormalityObjective: first must be in (0, 1), got {first}")
        self.first = first
        self.detector = AbnormalityModule(layer=layer, decoder=decoder, noise=noise)
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
        self.columns = self.detector.num_classes

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


@register("synthetic", needs=["images"])
class SyntheticObjective(Objective):
    """Outliers made by a generator that is trained beside the classifier (Lee et al., ICLR 2018).

    Each batch updates discriminator, generator and classifier, in this order.

    Args:
        generator: Noise to inputs; None: a small one, for square images.
        discriminator: Inputs to logits; None: a small one.
        beta: See :class:`~oodkernels.nn.JointGANLoss`.
        lr: Of Adam, for generator and discriminator.
        mean: What was taken from images in [0, 1], one number or one a channel; what the small
            generator makes is normalised alike.
        std: What they were divided by.

    Raises:
        TypeError: A network is none.
    """

    def __init__(
        self,
        generator: Generator | None = None,
        discriminator: nn.Module | None = None,
        beta: float = 0.1,
        lr: float = 2e-4,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(network, (nn.Module, type(None))):
                raise TypeError(f"{name} must be a module, got {network!r:.80}")
        self.loss = JointGANLoss(beta)
        self.generator, self.discriminator, self.lr = generator, discriminator, float(lr)
        self._own = generator is None
        self._mean, self._std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(self, model: nn.Module, sample: Callable[[], Tensor]) -> None:
        """Make the networks that were not given.

        Raises:
            ValueError: They were not, and inputs are no square images, or others than the small
                generator can make.
        """
        if self.generator is None or self.discriminator is None:
            x = sample()
            shape = tuple(x.shape)
            if len(shape) != 4 or shape[2] != shape[3]:
                raise ValueError(
                    "SyntheticObjective: generator and discriminator must be given for inputs "
                    f"other than (N, channels, size, size), got {shape}"
                )
            low, high = ((value - self._mean) / self._std for value in (0, 1))
            slack = (high - low) / 100
            pixels = x.detach().float().cpu()
            if self._own and not ((pixels >= low - slack) & (pixels <= high + slack)).all():
                raise ValueError(
                    "SyntheticObjective: inputs must be images in [0, 1], or mean and std be those "
                    f"of their normalisation, got values from {float(pixels.min()):.3g} to "
                    f"{float(pixels.max()):.3g} for mean {self._mean.flatten().tolist()} and std "
                    f"{self._std.flatten().tolist()}"
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
            generated = self._sample(len(x))
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
            generated = self._sample(len(x))
        torch.clear_autocast_cache()
        logits = self.outputs(model, torch.cat([x, generated]), y).logits
        loss = self.loss(logits, torch.cat([y, torch.full_like(y, -1)]))
        return loss, {"discriminator_loss": d_loss, "generator_loss": g_loss}

    def _sample(self, n: int) -> Tensor:
        """Generated inputs, normalised as the data are."""
        assert self.generator is not None
        generated = self.generator.sample(n)
        if not self._own:
            return generated
        return (generated - self._mean.to(generated)) / self._std.to(generated)

    def undo(self) -> Callable[[], None]:
        """Take back the updates of generator and discriminator."""
        parameters = list(self.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        states = copy.deepcopy(self.get_extra_state())

        def back() -> None:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            self.set_extra_state(states)

        return back

    def chance(self) -> float | None:
        """See :class:`Objective`."""
        return _chance(self.loss, self.columns, [0, -1])

    def get_extra_state(self) -> dict[str, Any]:
        """Give the state of the two optimisers."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def _of_all(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of every process, so many of each, in the order of their ranks."""
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _chance(loss: nn.Module, columns: int | None, target: list[int]) -> float | None:
    """A loss of logits that are all 0."""
    if columns is None:
        return None
    return float(loss(torch.zeros(len(target), columns), torch.tensor(target)))


@contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)
