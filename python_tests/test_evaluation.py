from __future__ import annotations

import numpy as np
import pytest

from oodkernels.evaluation import AVERAGE, Method, best, evaluate


def test_evaluate_averages_over_sets_and_best_knows_the_direction() -> None:
    id_scores = np.array([2.0, 3.0])
    ood = {"near": np.array([2.5, 0.0]), "far": np.array([0.0])}
    good = Method("a", "s", 0.9, id_scores, ood)
    bad = Method("b", "s", 0.8, -id_scores, {name: -scores for name, scores in ood.items()})
    rows = evaluate([good, bad])
    assert [row.ood_set for row in rows] == ["near", "far", AVERAGE] * 2
    near, far, average = rows[:3]
    assert (near.fpr95, far.fpr95, average.fpr95) == (0.5, 0, 0.25)
    assert average.auroc == pytest.approx((near.auroc + far.auroc) / 2)
    assert (near.n_id, near.n_ood, average.n_ood) == (2, 2, 3)
    top = best(rows)
    assert top[AVERAGE, "fpr95"] == 0.25
    assert top["far", "auroc"] == 1
    assert top["far", "id_accuracy"] == 0.9


def test_threshold_keeps_95_percent_of_id() -> None:
    scores = np.arange(20.0)
    method = Method("a", "s", 0.9, scores, {"near": scores})
    assert method.threshold == 1
    assert np.mean(scores >= method.threshold) == 0.95
