"""A score of a MOS head that asks all of its groups, and for the class in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type
from oodkernels.detectors.base import register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.logits import MOS, check_temperature
from oodkernels.detectors.model import Model
from oodkernels.groups import Groups

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MOSClass"]


@register("mos-class", "A", "after Huang & Li, CVPR 2021")
class MOSClass(MOS):
    """Soft maximum over the groups of the log-odds of the best class in each.

    T log sum_k exp(o_k / T), where o_k = log(p / (1 - p)) of p = max_c p^k_c, the group's others
    not among the c. An extension of MOS (Huang & Li, CVPR 2021), which ranks by the surest group
    alone, whichever class it has in mind: an input that a group takes for its own without knowing
    what it is gets less here. T -> 0 is the probability of the class that is predicted.

    Args:
        groups: As for :class:`MOS`.
        temperature: T > 0.
        model: As for :class:`OODDetector`.

    Raises:
        TypeError: As :class:`MOS`.
        ValueError: ``temperature`` is not positive and finite.
    """

    def __init__(
        self, groups: Groups, temperature: float = 1.0, *, model: Model | None = None
    ) -> None:
        super().__init__(groups, log_odds=True, model=model)
        self.temperature = check_temperature("MOSClass", temperature)

    def _score(self, batch: Batch) -> Tensor:
        logits = present(batch.logits)
        found = []
        for begin, end in self.groups.slices().tolist():
            part = logits[:, begin:end].to(accumulate_type(logits.dtype))
            best = part[:, 1:].max(1, keepdim=True)
            rest = part.scatter(1, best.indices + 1, -torch.inf).logsumexp(1)
            found.append(best.values[:, 0] - rest)
        return self.temperature * (torch.stack(found, 1) / self.temperature).logsumexp(1)

    def _settings(self) -> dict[str, Any]:
        return {"groups": self.groups.to_json(), "temperature": self.temperature}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], model: Model | None) -> Self:
        groups = Groups.from_json(settings["groups"])
        return cls(groups, settings["temperature"], model=model)
