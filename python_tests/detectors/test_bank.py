"""k-NN: the rule in NumPy, both backends, pytorch-ood, duplicates, files, errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pytorch_ood_package import pytorch_ood
from small_models import batches, digits
from torch import Tensor

from oodkernels import ood_metrics
from oodkernels.detectors import KNN, NotFittedError, OODDetector, as_pytorch_ood

BACKENDS = ["native", "faiss", "torch"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def features(n: int, d: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator).relu() * torch.arange(1, n + 1)[:, None]).to(
        dtype
    )


def rule(bank: Tensor, x: Tensor, k: int) -> np.ndarray:
    """Section 3 of the paper, a sample at a time, in float64."""
    unit = [z / np.linalg.norm(z) if z.any() else z for z in bank.double().numpy()]
    scores = []
    for z in x.double().numpy():
        z = z / np.linalg.norm(z) if z.any() else z
        scores.append(-np.sort([np.linalg.norm(z - b) for b in unit])[k - 1])
    return np.array(scores)


def needs(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_score_is_the_rule(
    backend: str, k: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(backend)
    monkeypatch.setattr("oodkernels.detectors.bank._QUERIES", 30)
    monkeypatch.setattr("oodkernels.detectors.bank._BLOCK", 40)
    bank, x = features(150, dtype=dtype), features(70, seed=1, dtype=dtype)
    bank[5] = x[3] = 0
    detector = KNN(k, backend).fit(features=bank.to(device))
    score = detector.score(features=x.to(device))
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (score.device.type, score.shape) == (device, (70,))
    np.testing.assert_allclose(score.cpu().numpy(), rule(bank, x, k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_distances_are_exact(backend: str) -> None:
    """1e-4 apart: float32's 2 - 2 z.b has a unit of 1.2e-7 for squares of 1e-8."""
    needs(backend)
    bank = features(40)
    near = bank + 1e-4 * bank.norm(dim=1, keepdim=True) * torch.eye(16)[torch.arange(40) % 16]
    score = KNN(1, backend).fit(features=bank).score(features=near)
    np.testing.assert_allclose(score.numpy(), rule(bank, near, 1), rtol=5e-3)
    assert torch.equal(KNN(1, backend).fit(features=bank).score(features=bank), torch.zeros(40))


def test_backends_agree() -> None:
    pytest.importorskip("faiss")
    bank, x = features(3000, 64), features(500, 64, seed=1)
    found = [KNN(50, backend).fit(features=bank).score(features=x) for backend in BACKENDS]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=0)
    assert torch.equal(KNN(50).fit(features=bank).score(features=x), found[0])


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank = features(60)
    assert KNN(2).fit(features=bank).score(features=bank).shape == (60,)
    with pytest.raises(ImportError, match=r"backend='faiss' needs faiss, .*oodkernels\[faiss\]"):
        KNN(2, "faiss").fit(features=bank).score(features=bank)


def test_pytorch_ood_agrees() -> None:
    theirs = pytorch_ood("detector.knn").KNN(None, k=5)
    bank, x = features(300), features(80, seed=1)
    labels = torch.arange(300) % 7 - 1  # -1 is OOD, and left out
    expected = theirs.fit_features(bank, labels).predict_features(x)
    found = as_pytorch_ood(KNN(5)).fit_features(bank, labels).predict_features(x)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_batches_and_file(tmp_path) -> None:
    pytest.importorskip("safetensors")
    bank, x = features(200), features(50, seed=1)
    expected = KNN(3).fit(features=bank).score(features=x)
    detector = KNN(3).fit(features=bank[:60]).partial_fit(features=bank[60:130])
    detector.score(features=x)
    detector.save(tmp_path / "file")
    loaded = OODDetector.load(tmp_path / "file", width=16)
    loaded.partial_fit(features=bank[130:])
    assert torch.equal(loaded.score(features=x), expected)
    loaded.partial_fit(features=bank[:1].double()).to("cpu")
    assert loaded.score(features=x).dtype == torch.float32
    loaded = OODDetector.load(tmp_path / "file").partial_fit(features=bank[130:])
    loaded.score(features=x)
    assert (loaded.k, loaded.width, len(loaded.bank)) == (3, 16, 200)
    detector.fit(features=bank)
    assert torch.equal(detector.score(features=x), expected)
    with pytest.raises(ValueError, match="width must be 8, got 16"):
        KNN.load(tmp_path / "file", width=8)


def test_nan_is_ood() -> None:
    bank, x = features(50), features(5, seed=1)
    x[2, 2] = torch.nan
    for backend in ("native", "torch"):
        detector = KNN(3, backend).fit(features=bank)
        detector.calibrate(detector.score(features=bank))
        found = detector.predict(features=x)
        assert found.score.isnan().nonzero().tolist() == [[2]]
        assert found.is_ood[2]
        assert found.label is None
        assert detector.score(features=x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: KNN(0), ValueError, "k must be an int >= 1, got 0"),
        (lambda x: KNN(backend="annoy"), ValueError, "must be native, faiss or torch, got 'annoy'"),
        (lambda x: KNN().score(features=x), NotFittedError, "fit must come first"),
        (lambda x: KNN(41).fit(features=x), ValueError, "at least k = 41 samples .* got 40"),
        (
            lambda x: KNN(2).fit(features=x).score(features=x[:, 1:]),
            ValueError,
            "KNN.score: features must have width 16, got 15",
        ),
        (
            lambda x: KNN(2).partial_fit(features=x).partial_fit(features=x[:, 1:]),
            ValueError,
            "KNN.partial_fit: features must have width 16, got 15",
        ),
        (
            lambda x: KNN(2).fit(features=x / 0),
            ValueError,
            "features must be finite, got 40 rows that are not, first row 0",
        ),
    ],
)
def test_refuses(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(features(40))


def test_separates_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(300, 8, generator=generator)
    sides = torch.eye(8)[torch.arange(200) % 4] + noise[:200]
    other = torch.eye(8)[4 + torch.arange(100) % 4] + noise[200:]
    detector = KNN(5).fit(features=sides[:100])
    assert detector.score(features=sides[100:]).min() > detector.score(features=9 * other).max()


def test_beats_chance_on_images() -> None:
    it = digits()
    detector = KNN(10, model=it.model).fit(batches(it.images, it.labels))
    id_scores = detector.score(it.test_images)
    for name, images in it.ood.items():
        assert ood_metrics(id_scores, {"": detector.score(images)})[""].auroc > 0.8, name
    detector.calibrate(id_scores)
    found = detector.predict(it.test_images)  # the model's logits tell the class
    assert (found.label == it.test_labels).double().mean() > 0.9
