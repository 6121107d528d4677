"""What the demo compares: methods, with the settings that each may try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oodkernels.training import OBJECTIVES

__all__ = [
    "DETECTOR_OPTIONS",
    "FEATURES",
    "FLAT",
    "METHODS",
    "RANDOM",
    "TAXONOMY",
    "Method",
    "Settings",
]

FLAT = "flat"
TAXONOMY, FEATURES, RANDOM = "MOS taxonomy", "MOS features", "MOS random"


@dataclass(frozen=True)
class Method:
    """How a head is trained, and what is tried.

    Attributes:
        objective: Name in :data:`oodkernels.training.OBJECTIVES`.
        what: What is learned, with its source.
        tried: Settings of which one is chosen: the learning rate and options of the objective.
        groups: "taxonomy", "features" or "random"; None for a flat head.
    """

    objective: str
    what: str
    tried: Sequence[Mapping[str, Any]]
    groups: str | None = None

    @property
    def score(self) -> str:
        """The detector by which settings are chosen, the objective's own."""
        return "mos-log-odds" if self.groups else OBJECTIVES[self.objective].scores[0]

    @property
    def outliers(self) -> int:
        """Outliers read for each training sample; 0 for a method that sees none."""
        spec = OBJECTIVES[self.objective]
        return spec.per_sample if "outliers" in spec.needs else 0


def _rates(*rates: float, **options: Any) -> list[dict[str, Any]]:
    return [{"lr": rate, **options} for rate in rates]


_MARGINS = [
    {"lr": lr, "m_in": m_in, "m_out": m_out}
    for lr in (0.1, 0.3)
    for m_in, m_out in ((-15.0, -8.0), (-25.0, -12.0))
]
_RATES = _rates(0.03, 0.1, 0.3, 1.0)

METHODS: dict[str, Method] = {
    FLAT: Method("softmax", "cross entropy over all classes", _RATES),
    TAXONOMY: Method(
        "mos",
        "group softmax with an “others” class in each group, a block of Unicode (Huang & Li, CVPR "
        "2021)",
        _RATES,
        "taxonomy",
    ),
    FEATURES: Method(
        "mos", "the same, in groups of classes whose features are close", _RATES, "features"
    ),
    RANDOM: Method("mos", "the same, in groups at random", _RATES, "random"),
    "OE": Method(
        "oe",
        "Outlier Exposure: uniform answers on outliers (Hendrycks et al., ICLR 2019)",
        _RATES,
    ),
    "energy-bounded": Method(
        "energy",
        "energies of characters and outliers are kept apart by margins (Liu et al., NeurIPS 2020)",
        _MARGINS,
    ),
    "MOS outliers": Method(
        "mos-outliers",
        "MOS in groups by block, whose “others” are the target of outliers too",
        _RATES,
        "taxonomy",
    ),
    "absent class": Method("absent-class", "one class more, for outliers as they come", _RATES),
    "NTOM": Method(
        "ntom",
        "one class more, for the hardest outliers but for a quantile (Chen et al., ECML 2021)",
        _rates(*(0.03, 0.1, 0.3, 1.0), per_sample=0.2),
    ),
    "POEM": Method(
        "poem",
        "energies kept apart, with outliers near a boundary drawn by Thompson sampling (Ming et "
        "al., ICML 2022)",
        [{**tried, "per_sample": 0.2} for tried in _MARGINS],
    ),
    "DOS": Method(
        "dos",
        "one class more, for diverse outliers: the hardest of each cluster of six candidates a "
        "sample (Jiang et al., ICLR 2024)",
        _RATES,
    ),
}
"""The methods by the names of their models in the table."""

DETECTOR_OPTIONS: Mapping[str, Mapping[str, Any]] = {"corp": {"m": 512}}
"""What detectors have otherwise than by default: a number of random features for 128, not 2,048."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on: on one machine, the same settings give the same numbers.

    Attributes:
        seed: Of held-out classes, distortions, initial weights, order, random groups, clustering.
        classes: ID classes; None: all.
        size: Side of the images in pixels, a multiple of 8.
        train: Training images of each class.
        test: Test images of each class, half as many to validate.
        ood: Images of each OOD set, at most.
        outliers: Outliers to train on, at most.
        epochs: Passes of the backbone over the training images.
        steps: Of each head, of ``batch`` samples.
        batch: See there.
        curve: Numbers of classes for the paper's curve, beside all of them.
        methods: Keys of :data:`METHODS`; the flat one is trained whether it is among them or not.
        jobs: Processes that train heads; the results do not depend on it.

    Raises:
        ValueError: A method is unknown.
    """

    seed: int = 0
    classes: int | None = None
    size: int = 32
    train: int = 36
    test: int = 4
    ood: int = 1000
    outliers: int = 24000
    epochs: int = 6
    steps: int = 300
    batch: int = 128
    curve: Sequence[int] = (50, 200, 600)
    methods: Sequence[str] = tuple(METHODS)
    jobs: int = field(default=1, compare=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(
                f"Settings: methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}"
            )
        chosen = [name for name in METHODS if name in {FLAT, *self.methods}]
        object.__setattr__(self, "methods", chosen)

    @classmethod
    def quick(cls, **given: Any) -> Settings:
        """A study of 200 classes in a minute."""
        small = {"classes": 200, "train": 12, "ood": 500, "outliers": 2000, "epochs": 6}
        return cls(**{**small, "steps": 150, "curve": (50, 100), **given})
