"""Labels, groups and models that count classes differently are matched by name, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oodkernels import Groups
from oodkernels.data import open_samples
from oodkernels.data.samples import Samples
from oodkernels.evaluation import evaluate

GROUPS = Groups([0, 1, 0, 1], class_names=["d", "a", "c", "b"])
NAMES = ("a", "b", "c", "d")


def samples(path: Path, names: tuple[str, ...] | None, known: tuple[str, ...] | None) -> Samples:
    """Logits of a MOS head that is always right, with labels that count ``names``."""
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=60)
    ids = torch.tensor([GROUPS.class_names.index(NAMES[label]) for label in labels])
    logits = generator.normal(size=(60, GROUPS.width)).astype(np.float32)
    logits[np.arange(60), GROUPS.to_column(ids).numpy()] += 20
    np.savez(path, logits=logits, labels=labels)
    return replace(open_samples(path), class_names=names, model_classes=known)


@pytest.fixture
def far(tmp_path: Path) -> Samples:
    np.savez(tmp_path / "far.npz", logits=np.zeros((50, GROUPS.width), np.float32))
    return open_samples(tmp_path / "far.npz")


def test_labels_are_matched_to_the_groups_by_name(tmp_path: Path, far: Samples) -> None:
    inside = samples(tmp_path / "id.npz", NAMES, None)
    found = evaluate(None, inside, {"far": far}, groups=GROUPS)
    assert found.rows[0].id_accuracy == 1


def test_groups_in_another_order_than_the_model_are_refused(tmp_path: Path, far: Samples) -> None:
    inside = samples(tmp_path / "id.npz", NAMES, NAMES)
    with pytest.raises(ValueError, match=r"groups must count classes as the model.*matched"):
        evaluate(None, inside, {"far": far}, groups=GROUPS)
    matched = GROUPS.matched(NAMES)
    assert evaluate(None, inside, {"far": far}, groups=matched).rows[0].id_accuracy == 1
