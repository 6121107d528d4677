"""Detectors that read nothing but logits, or the logit of a confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from oodkernels._checks import accumulate_type, check_flag, check_real
from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.model import Model
from oodkernels.groups import Groups

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "MOS",
    "MSP",
    "AbsentClass",
    "ConfidenceBranch",
    "Energy",
    "Entropy",
    "MOSLogOdds",
    "MaxLogit",
]


class _Softmax(OODDetector):
    """A detector served by ``logit_scores`` at its temperature."""

    needs = frozenset({"logits"})
    _field: ClassVar[str]

    def __init__(
        self, temperature: float = 1.0, *, absent: int | None = None, model: Model | None = None
    ) -> None:
        super().__init__(model, absent)
        self.temperature = check_temperature(type(self).__name__, temperature)

    def _score(self, batch: Batch) -> Tensor:
        score: Tensor = getattr(batch.logit_scores(self.temperature, self.absent), self._field)
        return score

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return batch.logit_scores(self.temperature, self.absent).label, None


@register("msp", "A", "Hendrycks & Gimpel, ICLR 2017")
class MSP(_Softmax):
    """Maximum softmax probability, max_c softmax(z / T)_c, in (0, 1].

    Hendrycks & Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
    Neural Networks, ICLR 2017. It rounds to 1 once the largest logit leads by about 17.

    Args:
        temperature: T > 0.
        absent: Column of the logits that stands for no class and is left out; None for the model's
            ``absent_column``, if it has one.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: ``temperature`` is not positive and finite.
    """

    _field = "msp"


@register("max-logit", "A", "Hendrycks et al., ICML 2022")
class MaxLogit(OODDetector):
    """Largest logit, max_c z_c.

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022.

    Args:
        absent: Column of the logits that stands for no class and is left out; None for the model's
            ``absent_column``, if it has one.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"logits"})

    def __init__(self, *, absent: int | None = None, model: Model | None = None) -> None:
        super().__init__(model, absent)

    def _score(self, batch: Batch) -> Tensor:
        return batch.logit_scores(absent=self.absent).max_logit


@register("energy", "A", "Liu et al., NeurIPS 2020")
class Energy(_Softmax):
    """Negative free energy, T logsumexp(z / T).

    Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, equation 4 (-E(x; f)).

    Args:
        temperature: T > 0.
        absent: Column of the logits that stands for no class and is left out; None for the model's
            ``absent_column``, if it has one.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: ``temperature`` is not positive and finite.
    """

    _field = "energy"


@register("entropy", "A", "Chan, Rottmann & Gottschalk, ICCV 2021")
class Entropy(_Softmax):
    """Negative Shannon entropy of softmax(z / T), in nats, in [-log C, 0].

    Args:
        temperature: T > 0.
        absent: Column of the logits that stands for no class and is left out; None for the model's
            ``absent_column``, if it has one.
        model: As for :class:`OODDetector`.

    Raises:
        ValueError: ``temperature`` is not positive and finite.
    """

    _field = "entropy"


@register("mos", "A", "Huang & Li, CVPR 2021")
class MOS(OODDetector):
    """Minimum others score, S_MOS = -min_k p^k_others, in [-1, 0].

    Huang & Li, MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space, CVPR
    2021, section 3. The prediction is the best class of the best group, "others" excluded, as the
    user's class id, with its group.

    Args:
        groups: Of the head, whose logits are (N, C + K) in its layout.
        log_odds: Score by max_k (logsumexp of group k's classes - its others) instead, which ranks
            as S_MOS and does not round: S_MOS is exactly -1 once every "others" leads by about 17.
        model: As for :class:`OODDetector`.

    Raises:
        TypeError: ``groups`` is not :class:`oodkernels.Groups`.
    """

    needs = frozenset({"logits"})
    _finer = ": log_odds=True (mos-log-odds) ranks alike and does not round"

    def __init__(
        self, groups: Groups, log_odds: bool = False, *, model: Model | None = None
    ) -> None:
        super().__init__(model)
        if not isinstance(groups, Groups):
            raise TypeError(
                f"{type(self).__name__}: groups must be Groups, got {type(groups).__name__}"
            )
        self.groups = groups
        self.log_odds = check_flag(type(self).__name__, "log_odds", log_odds)
        self.num_classes = groups.num_classes
        if not self.log_odds:
            self._least = -1.0

    def _check(self, where: str, batch: Batch) -> None:
        columns = present(batch.logits).shape[1]
        if columns != self.groups.width:
            raise ValueError(
                f"{where}: logits must have C + K = {self.groups.width} columns, got {columns}"
            )

    def _score(self, batch: Batch) -> Tensor:
        found = batch.mos_predict(self.groups)
        return found.log_odds if self.log_odds else found.score

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        found = batch.mos_predict(self.groups)
        return self.groups.to_class(found.label), found.group

    def _settings(self) -> dict[str, Any]:
        return {"groups": self.groups.to_json(), "log_odds": self.log_odds}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        groups = Groups.from_json(settings["groups"])
        return cls(groups, settings["log_odds"], model=model)


@register("mos-log-odds", "A", "Huang & Li, CVPR 2021")
class MOSLogOdds(MOS):
    """:class:`MOS` that scores by log-odds unless told otherwise.

    Args:
        groups: As for :class:`MOS`.
        log_odds: As for :class:`MOS`.
        model: As for :class:`OODDetector`.

    Raises:
        TypeError: As :class:`MOS`.
    """

    def __init__(
        self, groups: Groups, log_odds: bool = True, *, model: Model | None = None
    ) -> None:
        super().__init__(groups, log_odds, model=model)


@register("absent-class", "A", "Chen et al., ECML PKDD 2021")
class AbsentClass(OODDetector):
    """Log-odds against the absent class, log((1 - p) / p) with p = softmax(z)_{C+1}.

    For models trained with an extra last class for outliers (Jiang et al., DOS, ICLR 2024; Chen et
    al., NTOM, ECML PKDD 2021), whose score 1 - p is the sigmoid of this one. It ranks as 1 - p and
    -log p do, and where these round, 1 - p to 1 below p of 6e-8, it does not. It is computed as
    logsumexp(z_1..z_C) - z_{C+1}. The prediction is over the C classes.

    Args:
        absent: Column of the absent class; None for the model's ``absent_column``, if it has one,
            else the last.
        model: As for :class:`OODDetector`; logits are (N, C + 1).
    """

    needs = frozenset({"logits"})

    def __init__(self, *, absent: int | None = None, model: Model | None = None) -> None:
        super().__init__(model, absent)

    def _check(self, where: str, batch: Batch) -> None:
        columns = present(batch.logits).shape[1]
        if columns < 2:
            raise ValueError(
                f"{where}: logits must be (N, C + 1) with C >= 1, got {columns} columns"
            )
        super()._check(where, batch)

    def _column(self, batch: Batch) -> int:
        """The absent column: as given, else the model's, else the last."""
        if self.absent is None and batch.absent is not None:
            return batch.absent
        return -1 if self.absent is None else self.absent

    def _score(self, batch: Batch) -> Tensor:
        column = self._column(batch)
        energy = batch.logit_scores(absent=column).energy
        return energy - present(batch.logits)[:, column].to(energy.dtype)

    def _label(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return batch.logit_scores(absent=self._column(batch)).label, None


@register("confidence", "A", "DeVries & Taylor, 2018")
class ConfidenceBranch(OODDetector):
    """Logit of the confidence c that a second head of the model gives.

    DeVries & Taylor, Learning Confidence for Out-of-Distribution Detection in Neural Networks,
    2018, section 3.2. Their score is c = sigmoid(score); the logit ranks alike and does not round
    to 1, as c does in float32 from a logit of about 17.

    Args:
        model: As for :class:`OODDetector`; gives (logits, confidence logit of (N,) or (N, 1)).
    """

    needs = frozenset({"confidence"})

    def __init__(self, *, model: Model | None = None) -> None:
        super().__init__(model)

    def _score(self, batch: Batch) -> Tensor:
        logit = present(batch.confidence).flatten()
        return logit.to(accumulate_type(logit.dtype), copy=True)


def check_temperature(where: str, temperature: float) -> float:
    """The temperature, if it is positive and finite."""
    temperature = check_real(where, "temperature", temperature)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{where}: temperature must be positive and finite, got {temperature:g}")
    return temperature
