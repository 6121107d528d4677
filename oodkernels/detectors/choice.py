"""Which detectors can score what is at hand."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from oodkernels.detectors.bank import MCM
from oodkernels.detectors.base import DETECTORS
from oodkernels.detectors.logits import AbsentClass
from oodkernels.detectors.specs import REQUIRED
from oodkernels.groups import Groups

__all__ = ["applicable"]


def applicable(
    reads: Iterable[str],
    *,
    trained_on: Iterable[str] = (),
    groups: Groups | None = None,
    head: bool = False,
    absent: bool = False,
) -> list[str]:
    """Names of the detectors that can be made with their defaults and score what is at hand.

    Args:
        reads: What there is to score: of "x", "logits", "features" and "confidence".
        trained_on: What there is to fit to: of these and "labels"; empty: no training data.
        groups: Of a MOS head: then logits are read by group, and by no other detector.
        head: Whether the layer between features and logits is known.
        absent: Whether the logits have a column for no class.

    Returns:
        Names as in :data:`DETECTORS`, in their order there.
    """
    reads, trained_on = frozenset(reads), frozenset(trained_on)
    found = []
    for name, cls in DETECTORS.items():
        known = inspect.signature(cls).parameters
        missing = {n for n, option in cls.spec.options.items() if option.default is REQUIRED}
        grouped = "groups" in known
        if (
            cls.needs <= reads
            and cls.trained_on <= trained_on
            and missing <= ({"groups"} if groups is not None else set())
            and (head or "head" not in known)
            and (absent or not issubclass(cls, AbsentClass))
            and not issubclass(cls, MCM)  # nothing tells the classes' texts
            and ("logits" not in cls.needs or grouped == (groups is not None))
        ):
            found.append(name)
    return found
