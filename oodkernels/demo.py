"""The demo: flat softmax against MOS on small real images, from training to table.

Three models share data, backbone, initial weights, recipe and order of the images, and differ in
head and loss: flat softmax, MOS with random groups, and MOS with groups found by clustering the
flat model's features (Huang & Li, CVPR 2021). The OOD sets are seen at test time only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oodkernels import data
from oodkernels.evaluation import Method, Row, evaluate
from oodkernels.groups import Groups
from oodkernels.models import SmallConvNet, zero_linear
from oodkernels.nn import MOSHead
from oodkernels.objectives import MOSObjective, Objective, SoftmaxObjective
from oodkernels.ops import logit_scores, mos_log_others, mos_predict
from oodkernels.training import TrainConfig, Trainer, reproducible, tensor_loader

ID_SET = "digits"
NUM_CLASSES = 10
FLAT, MOS_RANDOM, MOS_FEATURES = "flat", "MOS random", "MOS features"
STAGES = (FLAT, MOS_RANDOM, MOS_FEATURES)

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Settings:
    """What a run depends on: on one machine, the same settings give the same numbers.

    Attributes:
        seed: Of the train/test split, the initial weights, the order of training images, the
            random groups and the clustering; 0 or more.
        num_groups: Groups of the two MOS models, 2 to 10.
        recipe: Training, the same for all three models but for objective and seed.
        batch_size: Images a step; what is left over at the end of an epoch is skipped.
    """

    seed: int = 0
    num_groups: int = 3
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(accelerator="cpu"))
    batch_size: int = 64


@dataclass(frozen=True)
class GroupedModel:
    """What a MOS model's "others" say about each test set.

    Attributes:
        name: Name of the model.
        groups: Per group, the digits in it.
        others: Kind of image -> mean p_others per group. The kinds are the digits of the group
            itself, the digits of the other groups, and each OOD set.
        min_others: Test set -> mean over its images of the least p_others, the negated MOS score.
    """

    name: str
    groups: list[list[int]]
    others: dict[str, list[float]]
    min_others: dict[str, float]


@dataclass(frozen=True)
class DemoResult:
    """Everything a run found out, and the test images for the report to show.

    Attributes:
        settings: What was run.
        num_train: Number of training images.
        images: Test set -> (N, 8, 8) grey values in [0, 1]; the ID set comes first.
        methods: Scores of every method on every image.
        grouped: The MOS models.
        rows: The table of results.
    """

    settings: Settings
    num_train: int
    images: dict[str, NDArray[Any]]
    methods: list[Method]
    grouped: list[GroupedModel]
    rows: list[Row]


def run(
    settings: Settings | None = None, on_epoch: Progress = lambda stage, epoch: None
) -> DemoResult:
    """Train and evaluate on the CPU, in one thread; leave torch's global state as it was.

    Args:
        settings: What to run.
        on_epoch: Called after each epoch with the model (one of ``STAGES``) and the number of
            epochs done.
    """
    settings = settings or Settings()
    with reproducible(settings.seed):
        return _run(settings, on_epoch)


def _run(settings: Settings, on_epoch: Progress) -> DemoResult:
    seed, k = settings.seed, settings.num_groups
    digits = data.digits(seed)
    sets = {ID_SET: digits.test_images, **data.ood_sets()}

    loader = tensor_loader(
        digits.train_images,
        digits.train_labels,
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
    )

    def fit(stage: str, head: Callable[[int], nn.Module], objective: Objective) -> SmallConvNet:
        with reproducible(seed):
            model = SmallConvNet(head)
        recipe = replace(settings.recipe, seed=seed)
        Trainer(model, objective, recipe, on_epoch=partial(on_epoch, stage)).fit(loader)
        return model

    flat = fit(FLAT, lambda features: zero_linear(features, NUM_CLASSES), SoftmaxObjective())
    with torch.no_grad():
        methods = _flat_methods({name: flat(x) for name, x in sets.items()}, digits.test_labels)
        features = flat.features(digits.train_images)
        means = [features[digits.train_labels == c].mean(0) for c in range(NUM_CLASSES)]

    grouped = []
    for stage, groups in (
        (MOS_RANDOM, Groups.random(NUM_CLASSES, k, seed=seed)),
        (MOS_FEATURES, Groups.from_features(torch.stack(means), k, seed=seed)),
    ):
        model = fit(stage, partial(MOSHead, groups=groups), MOSObjective(groups))
        with torch.no_grad():
            logits = {name: model(x) for name, x in sets.items()}
        methods += _mos_methods(stage, groups, logits, digits.test_labels)
        grouped.append(_describe(stage, groups, logits, digits.test_labels))

    return DemoResult(
        settings=settings,
        num_train=len(digits.train_labels),
        images={name: x[:, 0].numpy() for name, x in sets.items()},
        methods=methods,
        grouped=grouped,
        rows=evaluate(methods),
    )


def _flat_methods(logits: Mapping[str, Tensor], labels: Tensor) -> list[Method]:
    results = {name: logit_scores(z) for name, z in logits.items()}
    predicted = results[ID_SET].label
    return [
        _method(FLAT, label, {n: getattr(r, key) for n, r in results.items()}, predicted, labels)
        for label, key in (("MSP", "msp"), ("max logit", "max_logit"), ("energy", "energy"))
    ]


def _mos_methods(
    model: str, groups: Groups, logits: Mapping[str, Tensor], labels: Tensor
) -> list[Method]:
    results = {name: mos_predict(z, groups) for name, z in logits.items()}
    predicted = groups.to_class(results[ID_SET].label)
    return [
        _method(model, label, {n: getattr(r, key) for n, r in results.items()}, predicted, labels)
        for label, key in (("MOS", "score"), ("log-odds", "log_odds"))
    ]


def _method(
    model: str, score: str, scores: Mapping[str, Tensor], predicted: Tensor, labels: Tensor
) -> Method:
    arrays = {name: values.numpy() for name, values in scores.items()}
    accuracy = (predicted == labels).double().mean().item()
    return Method(model, score, accuracy, arrays.pop(ID_SET), arrays)


def _describe(
    name: str, groups: Groups, logits: Mapping[str, Tensor], labels: Tensor
) -> GroupedModel:
    others = {n: mos_log_others(z, groups).double().exp() for n, z in logits.items()}
    least = {n: p.amin(1).mean().item() for n, p in others.items()}
    digits = others.pop(ID_SET)
    own = groups.class_to_group[labels][:, None] == torch.arange(groups.num_groups)
    columns = list(zip(digits.T, own.T, strict=True))
    members = torch.split(groups.classes, groups.sizes.tolist())
    return GroupedModel(
        name=name,
        groups=[classes.tolist() for classes in members],
        others={
            "digits of the group": [p[mask].mean().item() for p, mask in columns],
            "other digits": [p[~mask].mean().item() for p, mask in columns],
            **{n: p.mean(0).tolist() for n, p in others.items()},
        },
        min_others=least,
    )
