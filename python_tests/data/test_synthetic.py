"""The synthetic world: what draws depend on, the hierarchy, its difficulty, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from oodkernels import logit_scores, ood_metrics
from oodkernels.data.synthetic import HierarchicalFeatures, Split

SPLITS = get_args(Split)


def world(num_classes: int = 40, **options: Any) -> HierarchicalFeatures:
    return HierarchicalFeatures(num_classes, **{"num_groups": 4, "width": 32, **options})


@pytest.mark.parametrize("split", SPLITS)
def test_draws_depend_on_seed_split_and_batch_alone(split: Split) -> None:
    x = world().sample(split, 700)
    torch.manual_seed(1)
    again = list(world().batches(split, 1300))
    assert [len(b.features) for b in again] == [512, 512, 276]
    for i, batch in enumerate(again[:2]):
        part = slice(512 * i, min(700, 512 * (i + 1)))
        size = part.stop - part.start
        for a, b in zip(x, batch, strict=True):
            assert torch.equal(a[part], b[:size])
    assert not torch.equal(again[0].features[:276], again[2].features)
    other = next(world(seed=1).batches(split, 512))
    assert not torch.equal(again[0].features, other.features)


def test_splits_are_of_their_populations() -> None:
    w = world(far_groups=3, outlier_groups=5)
    train, test = w.sample("train", 4000), w.sample("test", 4000)
    assert not torch.equal(train.features, test.features)
    for batch in (train, test):
        assert (batch.features >= 0).all()
        counts = batch.labels.bincount(minlength=40)
        assert counts.amin() > 50
        assert counts.amax() < 160
        assert torch.equal(batch.groups, w.taxonomy.class_to_group[batch.labels])
    for split, low, high in (("near", 0, 3), ("far", 4, 6), ("outliers", 7, 11)):
        batch = w.sample(split, 2000)  # type: ignore[arg-type]
        assert (batch.labels == -1).all()
        assert (int(batch.groups.amin()), int(batch.groups.amax())) == (low, high)
    counts = w.sample("outliers", 20000).groups.bincount()[7:].double()
    harmonic = 1 / torch.arange(1, 6).double()
    torch.testing.assert_close(counts / 20000, harmonic / harmonic.sum(), atol=0.02, rtol=0)


def test_classes_of_a_group_lie_together() -> None:
    """Centres of classes correlate within a super-class and not between, but for the misplaced."""
    # Equal spreads: half of a centre is its place, and two of a group share one by chance.
    for mismatch, expected in ((0.0, 0.5), (0.9, 0.5 * (0.1**2 + 0.9**2 / 3))):
        w = world(400, width=256, group_spread=6.0, class_spread=6.0, mismatch=mismatch)
        centres, groups, _ = w._populations["id"]
        unit = torch.nn.functional.normalize(centres, dim=1)
        similar = unit @ unit.T
        same = groups[:, None] == groups
        off_diagonal = ~torch.eye(400, dtype=torch.bool)
        assert float(similar[same & off_diagonal].mean()) == pytest.approx(expected, abs=0.06)
        if not mismatch:
            assert abs(float(similar[~same].mean())) < 0.1


def test_clarity_makes_samples_easy() -> None:
    def norm(clarity: float) -> Tensor:
        return world(clarity=clarity, class_spread=30.0).sample("test", 2000).features.norm(dim=1)

    assert norm(0.5).mean() < 0.7 * norm(50.0).mean()


def test_difficulty_is_neither_trivial_nor_hopeless() -> None:
    """Of the defaults, by the nearest of the means of 100 classes."""
    w = HierarchicalFeatures(100)
    train = w.sample("train", 40_000)
    means = torch.zeros(100, w.width).index_add_(0, train.labels, train.features)
    means /= train.labels.bincount()[:, None]
    scores = {}
    for split in ("test", "near", "far"):
        batch = w.sample(split, 5000)  # type: ignore[arg-type]
        scores[split] = logit_scores(batch.features @ means.T - means.square().sum(1) / 2)
        if split == "test":
            accuracy = (scores[split].label == batch.labels).double().mean()
    assert 0.6 < accuracy < 0.97
    results = ood_metrics(scores["test"].msp, {s: scores[s].msp for s in ("near", "far")})
    assert all(0.1 < results[s].fpr95 < 0.98 for s in ("near", "far"))
    assert all(0.55 < results[s].auroc < 0.98 for s in ("near", "far"))


def test_twenty_thousand_classes_stream() -> None:
    w = HierarchicalFeatures(20_000)
    centres = sum(p[0].numel() for p in w._populations.values())
    assert centres <= 2.6 * 20_000 * w.width + 512 * w.width
    seen = sum(len(batch.labels) for batch in w.batches("train", 20_000))
    assert seen == 20_000


def test_settings_make_the_same_world() -> None:
    w = world(clarity=3.0, mismatch=0.2, seed=4)
    again = HierarchicalFeatures(**w.settings())
    assert torch.equal(w.sample("outliers", 50).features, again.sample("outliers", 50).features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world(3), "num_classes must be >= 4, got 3"),
        (lambda: world(num_groups=1), "num_groups must be >= 2"),
        (lambda: world(class_spread=0), "class_spread must be > 0"),
        (lambda: world(clarity=-1), "clarity must be > 0"),
        (lambda: world(mismatch=1.5), r"mismatch must be in \[0, 1\]"),
        (lambda: world(seed=-1), "seed must be >= 0"),
        (lambda: world().batches("valid", 5), "split must be one of .*got 'valid'"),
        (lambda: world().batches("test", 0), "n must be >= 1"),
        (lambda: world().batches("test", 5, 0), "batch_size must be >= 1"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
