"""Mahalanobis: the authors' rule class by class, singular data, layers, the input step, files."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from pytorch_ood_package import pytorch_ood
from small_models import batches, digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oodkernels import ood_metrics
from oodkernels.detectors import (
    FeatureModel,
    Mahalanobis,
    NotFittedError,
    OODDetector,
    as_pytorch_ood,
    score_all,
)

N, D, C = 600, 12, 7
TYPES = [
    (torch.float64, 1e-10),
    (torch.float32, 1e-4),
    (torch.bfloat16, 1e-4),
    (torch.float16, 1e-4),
]


def blobs(n: int = N, d: int = D, offset: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes about means of their own, with one correlated noise."""
    fixed, drawn = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(C, d, generator=fixed, dtype=torch.float64)
    noise = torch.randn(d, d, generator=fixed, dtype=torch.float64)
    y = torch.arange(n) % C
    x = means[y] + torch.randn(n, d, generator=drawn, dtype=torch.float64) @ noise + offset
    return x, y


def public_rule(x: Tensor, y: Tensor, test: Tensor) -> np.ndarray:
    """All class scores, (N, C), as the authors' code goes about it, in float64."""
    from sklearn.covariance import EmpiricalCovariance

    x, y, test = x.double().numpy(), y.numpy(), test.double().numpy()
    means = [x[y == c].mean(0) for c in range(C)]
    centred = np.concatenate([x[y == c] - means[c] for c in range(C)])
    precision = EmpiricalCovariance(assume_centered=False).fit(centred).precision_
    scores = [-0.5 * ((test - mean) @ precision @ (test - mean).T).diagonal() for mean in means]
    return np.stack(scores, 1)


def centred(x: Tensor, y: Tensor) -> np.ndarray:
    return np.concatenate([(x[y == c] - x[y == c].mean(0)).numpy() for c in range(C)])


def close(found: Tensor, expected: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(found.cpu().double().numpy(), expected, rtol=rtol)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), TYPES, ids=[str(t) for t, _ in TYPES])
def test_score_is_the_public_codes(dtype: torch.dtype, rtol: float, device: str) -> None:
    x, y = blobs()
    test = torch.cat([blobs(200, seed=1)[0], 20 * torch.randn(50, D, dtype=torch.float64)])
    x, test = x.to(dtype), test.to(dtype)
    detector = Mahalanobis().fit(features=x.to(device), labels=y.to(device))
    score = detector.score(features=test.to(device))
    expected = public_rule(x, y, test)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (score.device.type, score.shape) == (device, (250,))
    close(score, expected.max(1), rtol)
    detector.calibrate(score[:200])
    prediction = detector.predict(features=test.to(device))
    assert torch.equal(prediction.score, score)
    assert torch.equal(prediction.label.cpu(), torch.from_numpy(expected.argmax(1)))
    assert prediction.group is None
    assert prediction.is_ood[:200].double().mean() <= 0.05
    assert prediction.is_ood[200:].all()


def test_far_from_zero() -> None:
    """Features about 1e4, whose float32 squares have no digit of the distances left."""
    x, y = blobs(offset=1e4)
    x = x.float()
    close(
        Mahalanobis().fit(features=x, labels=y).score(features=x), public_rule(x, y, x).max(1), 2e-3
    )


def test_units_do_not_matter() -> None:
    x, y = blobs()
    scale = 2.0 ** torch.linspace(-30, 30, D).round()
    x = x.float()
    scores = [Mahalanobis().fit(features=z, labels=y).score(features=z) for z in (x, x * scale)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=0)


def test_pytorch_ood_divides_by_no_n() -> None:
    """It sums the covariance over the samples and adds 1e-6: N times smaller scores."""
    x, y = blobs()
    theirs = pytorch_ood("detector.mahalanobis").Mahalanobis(None).fit_features(x.float(), y)
    ours = as_pytorch_ood(Mahalanobis()).fit_features(x.float(), y)
    test = blobs(300, seed=2)[0].float()
    expected = N * theirs.predict_features(test)
    torch.testing.assert_close(ours.predict_features(test), expected, rtol=1e-3, atol=0)


def test_batches_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    expected = Mahalanobis().fit(features=x, labels=y).score(features=x)
    monkeypatch.setattr("oodkernels.detectors.whitening._CHUNK", 7 * D)
    detector = Mahalanobis()
    for rows, labels in batches(x, y):
        assert detector.partial_fit(features=rows, labels=labels) is detector
    torch.testing.assert_close(detector.score(features=x), expected, rtol=1e-9, atol=0)
    assert (detector.num_classes, detector.width) == (C, D)
    detector.partial_fit(features=x + 1, labels=y)
    twice = Mahalanobis().fit(features=torch.cat([x, x + 1]), labels=torch.cat([y, y]))
    torch.testing.assert_close(
        detector.score(features=x), twice.score(features=x), rtol=1e-9, atol=0
    )


def test_ood_samples_are_left_out() -> None:
    x, y = blobs()
    some = torch.arange(N) % 5 == 0
    detector = Mahalanobis().fit(features=x, labels=y.where(~some, -1))
    expected = Mahalanobis().fit(features=x[~some], labels=y[~some])
    assert torch.equal(detector.score(features=x), expected.score(features=x))


def test_autocast_changes_nothing() -> None:
    x, y = blobs()
    detector = Mahalanobis().fit(features=x.float(), labels=y)
    with torch.autocast("cpu", torch.bfloat16):
        score = detector.score(features=x.float())
    assert torch.equal(score, detector.score(features=x.float()))


def test_nan_is_ood() -> None:
    x, y = blobs()
    detector = Mahalanobis().fit(features=x, labels=y)
    detector.calibrate(detector.score(features=x))
    x[3, 4] = torch.nan
    prediction = detector.predict(features=x)
    assert prediction.score[3].isnan()
    assert prediction.is_ood[3]
    assert prediction.score.isnan().sum() == 1
    assert detector.score(features=x[:0]).shape == (0,)


def test_memory_is_no_product_of_samples_classes_and_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            largest = max([largest, *(t.numel() for t in outputs if isinstance(t, Tensor))])
            return result

    monkeypatch.setattr("oodkernels.detectors.whitening._CHUNK", 50 * D)
    x, y = blobs()
    with Watch():
        Mahalanobis().fit(features=x, labels=y).score(features=x)
    assert largest == N * D  # the features themselves


# --- singular covariance --------------------------------------------------------------------------


def singular(kind: str) -> tuple[Tensor, Tensor]:
    x, y = blobs(n=8 if kind == "few" else N)
    y = y.clamp(max=C - 1)
    if kind == "constant":
        x[:, 3] = 1.5
    if kind == "duplicate":
        x[:, 3] = x[:, 4]
    if kind == "combination":
        x[:, 3] = x[:, 4] - 2 * x[:, 5] + 1e-6 * x[:, 3]
    return x, y


@pytest.mark.parametrize("kind", ["constant", "duplicate", "combination", "few"])
def test_singular_covariance_is_shrunk_by_oas(kind: str) -> None:
    from sklearn.covariance import oas

    x, y = singular(kind)
    covariance, amount = oas(centred(x, y), assume_centered=True)
    detector = Mahalanobis()
    with pytest.warns(UserWarning, match=rf"is singular: shrunk by {amount:.3g} \(OAS\)") as caught:
        detector.fit(features=x, labels=y)
    assert caught[0].filename == __file__
    assert detector.shrinkages == {"features": pytest.approx(amount)}
    precision = np.linalg.inv(covariance)
    means = [x[y == c].mean(0).numpy() for c in range(C)]
    test = x.numpy() + 0.5
    expected = np.stack([((test - m) @ precision * (test - m)).sum(1) / -2 for m in means], 1)
    close(detector.score(features=x + 0.5), expected.max(1), 1e-8)


def test_null_directions_are_not_ignored() -> None:
    """The authors' pseudo-inverse does not see a feature move that never did in training."""
    x, y = singular("constant")
    moved = x.clone()
    moved[:, 3] += 100
    np.testing.assert_allclose(public_rule(x, y, moved), public_rule(x, y, x), atol=1e-6)
    with pytest.warns(UserWarning, match="is singular"):
        detector = Mahalanobis().fit(features=x, labels=y)
    assert detector.score(features=moved).max() < 10 * detector.score(features=x).min()


@pytest.mark.parametrize("amount", [0.0, 0.2, 1.0])
def test_shrinkage_of_ones_choice(amount: float) -> None:
    from sklearn.covariance import empirical_covariance, shrunk_covariance

    x, y = blobs()
    covariance = empirical_covariance(centred(x, y), assume_centered=True)
    precision = np.linalg.inv(shrunk_covariance(covariance, amount))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = Mahalanobis(shrinkage=amount).fit(features=x, labels=y)
    means = [x[y == c].mean(0).numpy() for c in range(C)]
    expected = [((x.numpy() - m) @ precision * (x.numpy() - m)).sum(1) / -2 for m in means]
    close(detector.score(features=x), np.max(expected, 0), 1e-9)


# --- layers ---------------------------------------------------------------------------------------


def layered() -> tuple[dict[str, Tensor], Tensor]:
    x, y = blobs()
    maps = blobs(d=5, seed=3)[0][:, :, None, None] + torch.randn(N, 5, 3, 2, dtype=torch.float64)
    return {"late": x, "early.0": maps}, y


def test_layers_are_summed_and_averaged_over_positions() -> None:
    features, y = layered()
    detector = Mahalanobis(["early.0", "late"], axis=1).fit(features=features, labels=y)
    each = [features["early.0"].mean((2, 3)), features["late"]]
    expected = [public_rule(z, y, z).max(1) for z in each]
    close(detector.layer_scores(features=features), np.stack(expected, 1), 1e-9)
    close(detector.score(features=features), sum(expected), 1e-9)
    assert (detector.num_classes, detector.width) == (C, None)
    assert list(detector.statistics) == ["early.0", "late"]
    assert Mahalanobis("late").layers == ("late",)


def test_weights_are_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, y = layered()
    detector = Mahalanobis(["early.0", "late"], axis=1).fit(features=features, labels=y)
    noise = torch.rand(N, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ood = {"late": features["late"] + 5 * noise, "early.0": features["early.0"]}
    both = {name: torch.cat([features[name], ood[name]]) for name in features}
    labels = torch.cat([y, torch.full_like(y, -1)])
    before = detector.score(features=both)
    assert detector.fit_weights(features=both, labels=labels) is detector
    scores = detector.layer_scores(features=both).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression = make_pipeline(StandardScaler(), LogisticRegressionCV())
        regression.fit(scores, labels.numpy() >= 0)
    np.testing.assert_allclose(
        detector.score(features=both), regression.decision_function(scores), rtol=1e-2, atol=1e-2
    )
    after = detector.score(features=both)
    aurocs = [ood_metrics(s[:N], {"": s[N:]})[""].auroc for s in (before, after)]
    assert 0.5 < aurocs[0] < aurocs[1]
    detector.fit(features=features, labels=y)
    assert detector.weights is None


# --- the input step -------------------------------------------------------------------------------


def authors_step(
    model: nn.Module, layers: nn.Module, fit: tuple[Tensor, Tensor], x: Tensor, eps: float
) -> np.ndarray:
    """Score of the features ``layers`` give of x moved; float64 model, class by class."""
    features, y = layers(fit[0]).detach(), fit[1]
    means = torch.stack([features[y == c].mean(0) for c in range(C)])
    precision = torch.from_numpy(np.cov(centred(features, y).T, bias=True)).inverse()
    x = x.clone().requires_grad_()
    away = (
        layers(x) - means[torch.from_numpy(public_rule(features, y, layers(x).detach()).argmax(1))]
    )
    ((away @ precision) * away).sum(1).div(2).mean().backward()
    moved = x.detach() - eps * x.grad.sign() / torch.tensor([0.5, 2.0, 1.0])
    return public_rule(features, y, layers(moved).detach()).max(1)


def test_input_step_is_the_authors(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, C))
    model.double().train()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.arange(N) % C
    x += y[:, None]
    test = 2 * torch.randn(100, 3, dtype=torch.float64)
    std = [0.5, 2.0, 1.0]
    model.to(device)
    detector = Mahalanobis(eps=0.1, std=std, model=model).fit([(x.to(device), y)])
    both = Mahalanobis(["1", "3"], eps=0.1, std=std, model=model).fit([(x.to(device), y)])
    found, layers = detector.score(test.to(device)), both.layer_scores(test.to(device))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.cpu()
    for score, depth in ((found, 4), (layers[:, 0], 2), (layers[:, 1], 4)):
        close(score, authors_step(model, model[:depth], (x, y), test, 0.1), 1e-6)
    plain = Mahalanobis(model=model).fit([(x, y)]).score(test)
    with torch.inference_mode():
        again = Mahalanobis(eps=0.1, std=std, model=model).fit([(x, y)])
        assert torch.equal(again.score(test), again.score(test + 0))
    torch.testing.assert_close(again.score(test), found.cpu())
    assert (found.cpu() > plain).double().mean() > 0.9


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_file_gives_the_detector_back(weighted: bool, tmp_path) -> None:
    pytest.importorskip("safetensors")
    features, y = layered()
    features["late"][:, 2] = 0
    detector = Mahalanobis(["early.0", "late"], axis=1)
    with pytest.warns(UserWarning, match="of layer 'late' .* is singular"):
        detector.fit(features=features, labels=y)
    if weighted:
        detector.fit_weights(features=features, labels=y.where(y > 0, -1))
    detector.save(tmp_path / "file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OODDetector.load(tmp_path / "file")
    assert isinstance(loaded, Mahalanobis)
    assert torch.equal(loaded.score(features=features), detector.score(features=features))
    assert loaded.shrinkages == detector.shrinkages
    more = {name: z + torch.randn(z.shape[1], *[1] * (z.dim() - 2)) for name, z in features.items()}
    for each in (loaded, detector):
        each.partial_fit(features=more, labels=y)
    assert torch.equal(loaded.score(features=features), detector.score(features=features))
    with pytest.raises(ValueError, match="num_classes must be 8, got 7"):
        Mahalanobis.load(tmp_path / "file", num_classes=8)


# --- errors ---------------------------------------------------------------------------------------

X, Y = blobs()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mahalanobis(shrinkage=1.5), ValueError, r"shrinkage must be in \[0, 1\] or None"),
        (lambda: Mahalanobis(eps=-1), ValueError, "eps must be >= 0"),
        (lambda: Mahalanobis(classes=0), ValueError, "classes must be an int >= 1, got 0"),
        (lambda: Mahalanobis().score(features=X), NotFittedError, "fit must come first"),
        (
            lambda: Mahalanobis().fit(features=X, labels=Y.where(Y != 3, 6)),
            ValueError,
            r"Mahalanobis.fit: every class 0\.\.6 must have samples .* got none of class 3$",
        ),
        (
            lambda: Mahalanobis(classes=9).fit(features=X, labels=Y),
            ValueError,
            r"0\.\.8 .* none of class 7, 8$",
        ),
        (
            lambda: Mahalanobis(classes=5).fit(features=X, labels=Y),
            ValueError,
            r"labels must be in 0\.\.4, or -1 for OOD, got 6",
        ),
        (
            lambda: Mahalanobis().fit(features=X, labels=Y - Y - 1),
            ValueError,
            "there must be ID samples",
        ),
        (
            lambda: Mahalanobis().fit(features=X * torch.nan, labels=Y),
            ValueError,
            "Mahalanobis.*: features must be finite, got 600 rows",
        ),
        (lambda: Mahalanobis().fit(features=X), ValueError, "labels must be given"),
        (
            lambda: (
                Mahalanobis()
                .partial_fit(features=X, labels=Y)
                .partial_fit(features=X[:, 1:], labels=Y)
            ),
            ValueError,
            "features must have 12 columns, got 11",
        ),
        (
            lambda: Mahalanobis().fit(features=X, labels=Y).score(features=X[:, 1:]),
            ValueError,
            "features must have width 12, got 11",
        ),
        (
            lambda: Mahalanobis(shrinkage=0.0).fit(features=X - X, labels=Y),
            ValueError,
            "covariance of the features must not be singular, .* shrinkage 0",
        ),
        (
            lambda: Mahalanobis().fit(features=X - X, labels=Y),
            ValueError,
            "must not be singular, .* shrinkage 1",
        ),
        (
            lambda: Mahalanobis(["a", "b"]).fit(features={"a": X}, labels=Y),
            ValueError,
            r"features\['b'\] must be given",
        ),
        (
            lambda: Mahalanobis(["a"]).fit(features={"a": X[:, 0]}, labels=Y),
            ValueError,
            r"features\['a'\] must be \(N, d, ...\), got \(600,\)",
        ),
        (
            lambda: (
                Mahalanobis(["a"]).fit(features={"a": X}, labels=Y).score(features={"a": X[:, 1:]})
            ),
            ValueError,
            r"features\['a'\] must have width 12, got 11",
        ),
        (
            lambda: Mahalanobis(["nope"], model=nn.Sequential(nn.Linear(D, C))).fit([(X, Y)]),
            ValueError,
            "no layer 'nope'",
        ),
        (
            lambda: Mahalanobis(eps=0.1).fit(features=X, labels=Y).score(X),
            ValueError,
            "eps > 0 needs a model",
        ),
        (
            lambda: Mahalanobis(eps=0.1).fit(features=X, labels=Y).score(features=X),
            ValueError,
            "mahalanobis needs x",
        ),
        (
            lambda: Mahalanobis().fit(features=X, labels=Y).fit_weights(features=X, labels=Y),
            ValueError,
            "at least 5 OOD samples, got 0",
        ),
    ],
)
def test_refuses(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Mahalanobis().fit(features=X, labels=Y)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"needs sklearn, .*: pip install 'oodkernels\["):
        detector.fit_weights(features=X, labels=Y)


# --- real images ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is singular")
def test_beats_chance_on_images() -> None:
    it = digits()
    train = batches(it.images, it.labels)
    layers = Mahalanobis(["1", "3"], model=it.model).fit(train)
    detectors = {
        "features": Mahalanobis(model=it.model).fit(train),
        "step": Mahalanobis(eps=0.01, model=it.model).fit(train),
        "named": Mahalanobis(model=FeatureModel(it.model, features="3")).fit(train),
        "layers": layers,
    }
    id_scores = score_all(detectors, x=it.test_images)
    for name, images in it.ood.items():
        scores = score_all(detectors, x=images)
        for method, score in scores.items():
            auroc = ood_metrics(id_scores[method], {"": score})[""].auroc
            assert auroc > 0.85, (name, method)
    detectors["features"].calibrate(id_scores["features"])
    found = detectors["features"].predict(it.test_images)
    assert (found.label == it.test_labels).double().mean() > 0.9

    half = [images[::2] for images in it.ood.values()]
    x = torch.cat([it.test_images[::2], *half])
    labels = torch.full((len(x),), -1)
    labels[: len(it.test_images[::2])] = 0
    layers.fit_weights(x, labels=labels)
    assert (layers.weights[:-1] > 0).any()
    for name, images in it.ood.items():
        scores = layers.score(it.test_images[1::2]), layers.score(images[1::2])
        assert ood_metrics(scores[0], {"": scores[1]})[""].auroc > 0.95, name
