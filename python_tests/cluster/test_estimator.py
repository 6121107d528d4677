"""KMeans is an estimator as scikit-learn has them."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from points import features
from torch import Tensor

from oodkernels import kmeans

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from oodkernels import KMeans


@parametrize_with_checks(
    [KMeans(), KMeans(3, n_init="auto", normalize=True), KMeans(2, random_state=None)]
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("kind", ["tensor", "bfloat16", "numpy", "integers"])
def test_estimator(kind: str) -> None:
    x = features(300, 16, 5, 0.1) * 10
    data = {
        "tensor": x,
        "bfloat16": x.bfloat16(),
        "numpy": x.numpy(),
        "integers": x.round().int().numpy(),
    }[kind]
    model = KMeans(5, n_init=3, random_state=1)
    assert model.fit(data) is model
    kind_of = np.ndarray if kind in ("numpy", "integers") else Tensor
    for value in (
        model.cluster_centers_,
        model.labels_,
        model.predict(data),
        model.transform(data),
    ):
        assert isinstance(value, kind_of)
    assert model.cluster_centers_.shape == (5, 16)
    assert str(model.cluster_centers_.dtype).endswith("64" if kind == "integers" else "32")
    assert (model.predict(data) == model.labels_).all()
    assert (model.fit_predict(data) == model.labels_).all()
    assert (model.transform(data).argmin(1) == model.labels_).all()
    assert model.score(data) == pytest.approx(-model.inertia_, rel=1e-6)
    assert isinstance(model.inertia_, float)
    assert isinstance(model.n_iter_, int)
    assert model.n_features_in_ == 16
    result = kmeans(torch.as_tensor(data) * 1.0, 5, n_init=3, seed=1)
    assert (torch.as_tensor(model.labels_) == result.labels).all()


def test_estimator_from_centroids() -> None:
    x = features(100, 6).numpy()
    model = KMeans(4, init=x[:4], max_iter=0).fit(x)
    np.testing.assert_array_equal(model.cluster_centers_, x[:4])
    assert model.labels_[:4].tolist() == [0, 1, 2, 3]


def test_estimator_refuses() -> None:
    x = features(10, 3)
    cases = [
        (lambda: KMeans(3).fit(x[0]), r"KMeans.fit: X must have shape \(N, d\), got \(3,\)"),
        (lambda: KMeans(11).fit(x), "at least n_clusters = 11 rows, got 10"),
        (lambda: KMeans(2, init="random").fit(x), "init must be 'k-means\\+\\+' or centroids"),
        (lambda: KMeans(2, init=x).fit(x), r"init must have shape \(2, 3\), got \(10, 3\)"),
        (lambda: KMeans(2).predict(x), "KMeans.predict: fit must come first"),
        (lambda: KMeans(2).fit(x).predict(x[:, :2]), "must have 3 features, got 2"),
        (lambda: kmeans(x, 2, backend="cuml"), "backend must be native or faiss, got 'cuml'"),
        (lambda: kmeans(x[None], 2, backend="faiss"), r"shape \(N, d\) with a group or with faiss"),
        (lambda: kmeans(x, 0), "kmeans_init: k must be at least 1"),
        (lambda: KMeans(2.0).fit(x), "^KMeans.fit: n_clusters must be an int >= 1, got 2.0"),
        (lambda: KMeans(2, n_init="all").fit(x), "^KMeans.fit: n_init must be an int or 'auto'"),
        (lambda: KMeans(2, n_init=0).fit(x), "^KMeans.fit: n_init must be an int >= 1, got 0"),
        (lambda: KMeans(2, random_state="x").fit(x), "'x' cannot be used to seed"),
        (lambda: KMeans(2, init=x[:2], backend="faiss").fit(x), "with group or faiss"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_not_fitted_is_scikit_learns_error() -> None:
    with pytest.raises(NotFittedError, match=r"KMeans\.predict: fit must come first"):
        KMeans(2).predict(features(10, 3))


def test_clone_keeps_the_parameters_and_shares_the_group() -> None:
    start = features(10, 3)[:2]
    model = KMeans(np.int64(2), init=start, max_iter=7, group="ranks").set_params(tol=0.1)
    copied = clone(model)
    assert copied.get_params(deep=False).keys() == model.get_params(deep=False).keys()
    assert (copied.n_clusters, copied.max_iter, copied.tol, copied.group) == (2, 7, 0.1, "ranks")
    assert copied.init is not start
    assert torch.equal(copied.init, start)
    assert not hasattr(clone(KMeans(2).fit(start)), "labels_")


def test_random_state() -> None:
    x = features(300, 6, 40)
    fits = [KMeans(20, max_iter=0, random_state=None).fit(x).labels_ for _ in range(4)]
    assert not all(torch.equal(labels, fits[0]) for labels in fits[1:])

    def of_the_global_one() -> Tensor:
        np.random.seed(7)  # noqa: NPY002 what None means
        return KMeans(20, max_iter=0, random_state=None).fit(x).labels_

    assert torch.equal(of_the_global_one(), of_the_global_one())
    seeded = [KMeans(9, random_state=np.random.RandomState(3)).fit(x).labels_ for _ in range(2)]
    assert torch.equal(*seeded)
    assert torch.equal(
        KMeans(9, random_state=np.int64(3)).fit(x).labels_, KMeans(9, random_state=3).fit(x).labels_
    )


def test_numpy_scalars_are_taken() -> None:
    x = features(60, 4)
    model = KMeans(
        np.int64(3),
        n_init=np.int32(2),
        max_iter=np.uint8(9),
        tol=np.float32(0.5),
        normalize=np.True_,
        renormalize=np.False_,
    ).fit(x)
    expected = KMeans(3, n_init=2, max_iter=9, tol=0.5, normalize=True).fit(x)
    assert torch.equal(model.cluster_centers_, expected.cluster_centers_)
    assert torch.equal(model.predict(x), expected.labels_)


def test_n_init_auto_is_one() -> None:
    x = features(200, 6, 40)
    auto, one = (KMeans(9, n_init=n).fit(x) for n in ("auto", 1))
    assert torch.equal(auto.cluster_centers_, one.cluster_centers_)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", "<f2", "uint16", "bool"])
@pytest.mark.parametrize("reverse", [False, True])
def test_arrays_of_any_layout(dtype: str, reverse: bool) -> None:
    plain = np.round(features(60, 8).numpy() * 4).astype(dtype)
    x = plain[::-1, ::-2] if reverse else plain
    model = KMeans(4).fit(x)
    native = np.ascontiguousarray(x).astype(x.dtype.newbyteorder("="))
    expected = KMeans(4).fit(native)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_array_equal(model.predict(x), model.labels_)


def test_pickles() -> None:
    model = KMeans(3).fit(features(50, 4).numpy())
    back = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(back.cluster_centers_, model.cluster_centers_)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "oodkernels.cluster.estimator")
    monkeypatch.setitem(sys.modules, "sklearn.utils.validation", None)
    with pytest.raises(ImportError, match=r"KMeans needs sklearn.*oodkernels\[sklearn\]"):
        from oodkernels.cluster import KMeans  # noqa: F401
