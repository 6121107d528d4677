"""Figures in Lightning's log: of a callback, and under flat keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oodkernels
from oodkernels.metrics import higher_is_better

lightning = pytest.importorskip("pytorch_lightning")
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from oodkernels.evaluation.lightning import OODCallback  # noqa: E402

X, Y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
FAR = 3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(1))


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_callback_logs_what_evaluate_finds(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, Y), 20)
    far = DataLoader(TensorDataset(FAR, torch.full((40,), -1)), 20)
    callback = OODCallback(loader, {"far": far}, ["energy", "msp"], every=2)
    stop = lightning.callbacks.EarlyStopping("ood/far/energy/auroc", mode="max", patience=50)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[callback, stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, loader, loader)
    assert module.training
    wanted = oodkernels.evaluate(module, loader, {"far": far}, ["energy", "msp"]).flat()
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert found == pytest.approx(wanted)
    assert {"ood/far/energy/auroc", "ood/average/msp/fpr95"} <= found.keys()


def test_a_detector_that_is_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="detectors must need no fit, got knn"):
        OODCallback([], {}, ["energy", "knn"])
    with pytest.raises(ValueError, match="every must be an int >= 1, got 0"):
        OODCallback([], {}, every=0)


def test_flat_keys() -> None:
    scores = {"energy": (X[:, 0], {"far": FAR[:, 0], "near": X[:, 1]})}
    evaluation = oodkernels.evaluate(scores)
    flat = evaluation.flat("test")
    assert len(flat) == 3 * 4
    assert flat["test/far/auroc"] == evaluation.rows[0].auroc
    metric = oodkernels.OODMetrics(exact=True)
    metric.update_id(X[:, 0])
    metric.update_ood("far", FAR[:, 0])
    assert metric.flat()["ood/far/auroc"] == flat["test/far/auroc"]
    single = oodkernels.OODMetrics(exact=True)
    single.update(torch.cat([X[:, 0], FAR[:, 0]]), torch.arange(100) >= 60)
    assert single.flat()["ood/auroc"] == flat["test/far/auroc"]


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("ood/far/auroc", True),
        ("fpr95", False),
        ("ood/far/fpr95_out_upper", False),
        ("aupr_in_lower", True),
        ("detection_error", False),
        ("threshold", None),
        ("n_id", None),
    ],
)
def test_which_way_is_up(key: str, way: bool | None) -> None:
    assert higher_is_better(key) is way
