"""The score of models that were trained to give outliers small features."""

from __future__ import annotations

from torch import Tensor

from oodkernels.detectors.base import OODDetector, register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.head import floats
from oodkernels.detectors.model import Model

__all__ = ["Objectosphere"]


@register("objectosphere", "B", "Dhamija, Guenther & Boult, NeurIPS 2018")
class Objectosphere(OODDetector):
    """Maximum softmax probability times the norm of the features.

    Dhamija, Guenther & Boult, Reducing Network Agnostophobia, NeurIPS 2018, for models trained by
    their objectosphere loss.

    Args:
        absent: As for :class:`MSP`.
        model: As for :class:`OODDetector`.
    """

    needs = frozenset({"features", "logits"})

    def __init__(self, *, absent: int | None = None, model: Model | None = None) -> None:
        super().__init__(model, absent)

    def _score(self, batch: Batch) -> Tensor:
        norm = floats(present(batch.features)).norm(dim=1)
        return batch.logit_scores(absent=self.absent).msp.to(norm) * norm
