"""Scores of a MOS head that ask all of its groups, not only the one that is surest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkernels._checks import accumulate_type
from oodkernels.detectors.base import register
from oodkernels.detectors.batch import Batch, present
from oodkernels.detectors.logits import MOS, check_temperature
from oodkernels.detectors.model import Model
from oodkernels.groups import Groups

__all__ = ["MOSShare", "MOSSoft"]


class _OfGroups(MOS):
    """Reads logsumexp of each group's classes, and their log-odds against its others."""

    def __init__(self, groups: Groups, *, model: Model | None = None) -> None:
        super().__init__(groups, True, model=model)

    def _of_groups(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.once(("of groups", self.groups), lambda: _parts(batch, self.groups))

    def _settings(self) -> dict[str, Any]:
        return self._plain_settings() | {"groups": self.groups.to_json()}

    @classmethod
    def _from_settings(cls, settings: Any, model: Model | None) -> Any:
        return cls(**{**settings, "groups": Groups.from_json(settings["groups"])}, model=model)


@register("mos-soft", "A", "after Huang & Li, CVPR 2021")
class MOSSoft(_OfGroups):
    r"""Soft maximum of the groups' log-odds, T log sum_k exp(o_k / T).

    An extension of MOS (Huang & Li, CVPR 2021), whose score ranks as the limit T -> 0, the maximum
    of o_k = logsumexp of group k's classes - its others. Here the other groups' doubts count too.

    Args:
        groups: As for :class:`MOS`.
        temperature: T > 0.
        model: As for :class:`OODDetector`.

    Raises:
        TypeError: As :class:`MOS`.
        ValueError: ``temperature`` is not positive and finite.
    """

    def __init__(
        self, groups: Groups, temperature: float = 2.0, *, model: Model | None = None
    ) -> None:
        super().__init__(groups, model=model)
        self.temperature = check_temperature("MOSSoft", temperature)

    def _score(self, batch: Batch) -> Tensor:
        _, odds = self._of_groups(batch)
        return self.temperature * (odds / self.temperature).logsumexp(1)


@register("mos-share", "A", "after Huang & Li, CVPR 2021")
class MOSShare(_OfGroups):
    """Largest log-odds of a group, times the largest share of a class among all classes.

    An extension of MOS (Huang & Li, CVPR 2021): max_k (logsumexp of group k's classes - its others)
    times max_c softmax(z)_c over the classes of all groups, without the others.

    Args:
        groups: As for :class:`MOS`.
        model: As for :class:`OODDetector`.

    Raises:
        TypeError: As :class:`MOS`.
    """

    def _score(self, batch: Batch) -> Tensor:
        classes, odds = self._of_groups(batch)
        logits = present(batch.logits)
        others = self.groups.offsets[:-1].to(logits.device)
        top = logits.index_fill(1, others, -torch.inf).amax(1)
        return odds.amax(1) * (top.to(odds.dtype) - classes.logsumexp(1)).exp()


def _parts(batch: Batch, groups: Groups) -> tuple[Tensor, Tensor]:
    logits = present(batch.logits)
    dtype = accumulate_type(logits.dtype)
    slices = [logits[:, begin:end].to(dtype) for begin, end in groups.slices().tolist()]
    classes = torch.stack([part[:, 1:].logsumexp(1) for part in slices], 1)
    return classes, classes - torch.stack([part[:, 0] for part in slices], 1)
