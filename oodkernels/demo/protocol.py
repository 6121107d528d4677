"""The demo: every method on small real images, from training to table.

All models share data, backbone, initial weights, recipe and order of the training images, and
differ in head and objective. Some also see outliers in training, which come from other sources than
the OOD test sets; those are seen at test time only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oodkernels.demo import digits as data
from oodkernels.demo.models import ConfidenceHead, SmallConvNet, zero_linear
from oodkernels.detectors import (
    KNN,
    MOS,
    MSP,
    ODIN,
    AbsentClass,
    ConfidenceBranch,
    Energy,
    Entropy,
    Mahalanobis,
    MaxLogit,
    MOSLogOdds,
    OODDetector,
)
from oodkernels.evaluation import Evaluation, combine, evaluate
from oodkernels.groups import Groups
from oodkernels.nn.mos import MOSHead
from oodkernels.training import (
    OBJECTIVES,
    AbnormalityObjective,
    MOSObjective,
    Objective,
    TrainConfig,
    Trainer,
    make_objective,
    reproducible,
    tensor_loader,
)

ID_SET = "digits"
NUM_CLASSES = 10
FLAT, MOS_RANDOM, MOS_FEATURES = "flat", "MOS random", "MOS features"

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Method:
    """How one of the demo's models is trained and what it is asked for.

    Attributes:
        models: Names of its models in the table.
        what: What is learned, with its source.
        scores: Of the table, by name; detectors that are not fitted.
        options: Of the objective.
        recipe: What differs from :attr:`Settings.recipe`.
    """

    models: tuple[str, ...]
    what: str
    scores: Mapping[str, Callable[..., OODDetector]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


_CLASSIC = {"MSP": MSP, "energy": Energy}
_ABSENT = {"absent class": AbsentClass}
# Of a network trained from scratch: the papers' are for fine-tuning and other class counts.
_MARGINS = {"m_in": -10.0, "m_out": -3.0}

METHODS = {
    "softmax": Method(
        (FLAT,),
        "cross entropy over the ten digits; scores: MSP (Hendrycks & Gimpel, ICLR 2017), max logit "
        "and entropy, energy (Liu et al., NeurIPS 2020), ODIN (Liang et al., ICLR 2018), "
        "Mahalanobis (Lee et al., NeurIPS 2018), k-NN (Sun et al., ICML 2022)",
        {
            "MSP": MSP,
            "max logit": MaxLogit,
            "energy": Energy,
            "entropy": Entropy,
            "ODIN": ODIN,
            "Mahalanobis": partial(Mahalanobis, shrinkage=0.01),
            "k-NN": KNN,
        },
    ),
    "mos": Method(
        (MOS_RANDOM, MOS_FEATURES),
        "group softmax with an “others” class in each group of digits; the groups are random or "
        "found by clustering the flat model's features (Huang & Li, CVPR 2021)",
        {"MOS": MOS, "log-odds": MOSLogOdds},
    ),
    "confidence": Method(
        ("confidence",),
        "a confidence branch that can buy hints (DeVries & Taylor, 2018)",
        {"confidence": ConfidenceBranch},
    ),
    "abnormality": Method(
        ("abnormality",),
        "an abnormality module: a decoder learns along for two thirds of the steps, then a risk "
        "network to tell digits from distorted digits (Hendrycks & Gimpel, ICLR 2017)",
        recipe={"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0},
    ),
    "synthetic": Method(
        ("synthetic",),
        "outliers made by a generator that learns along (Lee et al., ICLR 2018)",
        _CLASSIC,
    ),
    "oe": Method(
        ("OE",),
        "Outlier Exposure: uniform answers on outliers (Hendrycks et al., ICLR 2019)",
        _CLASSIC,
    ),
    "energy": Method(
        ("energy-bounded",),
        "energies of digits and outliers are kept apart by margins (Liu et al., NeurIPS 2020)",
        _CLASSIC,
        options=_MARGINS,
    ),
    "absent-class": Method(
        ("absent class",),
        "an eleventh class for outliers, as they come: what NTOM and DOS select better",
        _ABSENT,
    ),
    "ntom": Method(
        ("NTOM",),
        "an eleventh class for the hardest outliers, those below a quantile left out; selected of "
        "all, each epoch (Chen et al., ECML 2021)",
        _ABSENT,
        options={"per_sample": 1.0},
    ),
    "poem": Method(
        ("POEM",),
        "energies kept apart, with outliers near a boundary drawn by Thompson sampling; selected "
        "of all, each epoch (Ming et al., ICML 2022)",
        {"energy": Energy},
        options=_MARGINS,
    ),
    "dos": Method(
        ("DOS",),
        "an eleventh class for diverse outliers: of six candidates a training image, the hardest "
        "of each cluster (Jiang et al., ICLR 2024)",
        _ABSENT,
    ),
}
"""The methods by their objective's name."""


def outliers_per_image(name: str) -> int:
    """Outliers read for each training image, 0 for a method that sees none."""
    spec = OBJECTIVES[name]
    return spec.per_sample if "outliers" in spec.needs else 0


@dataclass(frozen=True)
class Settings:
    """What a run depends on: on one machine, the same settings give the same numbers.

    Attributes:
        seed: Of the train/test split, the initial weights, the order of training images and
            outliers, the random groups and the clustering; 0 or more.
        num_groups: Groups of the two MOS models, 2 to 10.
        recipe: Training, the same for all models but for objective and seed, and where
            :class:`Method` says so.
        batch_size: Images a step; what is left over at the end of an epoch is skipped.
        methods: Keys of :data:`METHODS`. The flat softmax is trained whether it is among them or
            not, being what the others are compared with.

    Raises:
        ValueError: A method is unknown.
    """

    seed: int = 0
    num_groups: int = 3
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(accelerator="cpu"))
    batch_size: int = 64
    methods: Sequence[str] = tuple(METHODS)

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(
                f"Settings: methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}"
            )
        chosen = [name for name in METHODS if name in {"softmax", *self.methods}]
        object.__setattr__(self, "methods", chosen)

    @property
    def models(self) -> list[str]:
        """Names of the models to be trained, in this order."""
        return [model for name in self.methods for model in METHODS[name].models]


@dataclass(frozen=True)
class DemoResult:
    """Everything a run found out, and the test images for the report to show.

    Attributes:
        settings: What was run.
        num_train: Number of training images.
        images: Test set -> (N, 8, 8) grey values in [0, 1]; the ID set comes first.
        outliers: (M, 8, 8) those to train on.
        evaluation: Every method's scores of every image, and the table.
    """

    settings: Settings
    num_train: int
    images: dict[str, NDArray[Any]]
    outliers: NDArray[Any]
    evaluation: Evaluation


def run(
    settings: Settings | None = None, on_epoch: Progress = lambda model, epoch: None
) -> DemoResult:
    """Train and evaluate on the CPU, in one thread; leave torch's global state as it was.

    Args:
        settings: What to run.
        on_epoch: Called after each epoch with the model (one of ``Settings.models``) and the number
            of epochs done.
    """
    settings = settings or Settings()
    with reproducible(settings.seed):
        return _Demo(settings, on_epoch).run()


class _Demo:
    def __init__(self, settings: Settings, on_epoch: Progress) -> None:
        self.settings, self.on_epoch = settings, on_epoch
        self.digits = data.digits(settings.seed)
        self.ood = data.ood_sets()
        self.outliers = data.outliers()

    def run(self) -> DemoResult:
        found: list[Evaluation] = []
        for name in self.settings.methods:
            if name == "softmax":
                model, evaluation = self.softmax()
                found.append(evaluation)
            elif name == "mos":
                found += self.mos(model)
            else:
                found.append(self.other(name))
        images = {ID_SET: self.digits.test_images, **self.ood}
        return DemoResult(
            settings=self.settings,
            num_train=len(self.digits.train_labels),
            images={name: x[:, 0].numpy() for name, x in images.items()},
            outliers=self.outliers[:, 0].numpy(),
            evaluation=combine(*found),
        )

    def softmax(self) -> tuple[SmallConvNet, Evaluation]:
        model = self.fit("softmax", FLAT, make_objective("softmax"))
        detectors = {score: make(model=model) for score, make in METHODS["softmax"].scores.items()}
        training = [(self.digits.train_images, self.digits.train_labels)]
        for detector in detectors.values():
            if detector.trained_on:
                detector.fit(training)
        return model, self.evaluate(FLAT, model, detectors)

    def mos(self, flat: SmallConvNet) -> list[Evaluation]:
        k, seed = self.settings.num_groups, self.settings.seed
        with torch.no_grad():
            features = flat.features(self.digits.train_images)
        means = [features[self.digits.train_labels == c].mean(0) for c in range(NUM_CLASSES)]
        found = []
        for name, groups in (
            (MOS_RANDOM, Groups.random(NUM_CLASSES, k, seed=seed)),
            (MOS_FEATURES, Groups.from_features(torch.stack(means), k, seed=seed)),
        ):
            model = self.fit("mos", name, MOSObjective(groups), partial(MOSHead, groups=groups))
            detectors = {score: make(groups) for score, make in METHODS["mos"].scores.items()}
            found.append(self.evaluate(name, model, detectors))
        return found

    def other(self, name: str) -> Evaluation:
        method = METHODS[name]
        head = None
        if name == "confidence":
            head = partial(ConfidenceHead, num_classes=NUM_CLASSES)
        objective = make_objective(name, method.options)
        model = self.fit(name, method.models[0], objective, head)
        detectors = {score: make() for score, make in method.scores.items()}
        if isinstance(objective, AbnormalityObjective):
            detectors["abnormality"] = objective.detector
        return self.evaluate(method.models[0], model, detectors)

    def fit(
        self,
        name: str,
        model_name: str,
        objective: Objective,
        head: Callable[[int], nn.Module] | None = None,
    ) -> SmallConvNet:
        method, settings = METHODS[name], self.settings
        many = outliers_per_image(name)
        columns = NUM_CLASSES + ("absent class" in OBJECTIVES[name].needs)
        with reproducible(settings.seed):
            model = SmallConvNet(head or partial(zero_linear, columns=columns))
        recipe = replace(settings.recipe, seed=settings.seed, **method.recipe)
        trainer = Trainer(model, objective, recipe, on_epoch=partial(self.on_epoch, model_name))
        batch = partial(tensor_loader, shuffle=True, drop_last=True)
        size = settings.batch_size
        trainer.fit(
            batch(self.digits.train_images, self.digits.train_labels, batch_size=size),
            batch(self.outliers, batch_size=many * size) if many else None,
        )
        return model

    def evaluate(
        self, name: str, model: nn.Module, detectors: Mapping[str, OODDetector]
    ) -> Evaluation:
        """One pass over the test sets for all detectors."""
        digits: list[tuple[Tensor, Tensor]] = [(self.digits.test_images, self.digits.test_labels)]
        return evaluate(model, digits, self.ood, detectors, model_name=name)
