from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from oodkernels.demo import digits as data


@pytest.fixture(scope="module")
def ood_sets() -> dict[str, torch.Tensor]:
    return data.ood_sets()


def is_on_grid(images: torch.Tensor) -> bool:
    levels = images * data.LEVELS
    return torch.equal(levels, levels.round())


def test_digits_are_split_with_classes_in_proportion() -> None:
    digits = data.digits(seed=3)
    assert digits.train_images.shape == (1198, 1, 8, 8)
    assert digits.test_images.shape == (599, 1, 8, 8)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_labels.dtype == torch.int64
    shares = [
        torch.bincount(y).double() / len(y) for y in (digits.train_labels, digits.test_labels)
    ]
    torch.testing.assert_close(*shares, atol=0.001, rtol=0)


def test_digits_split_is_a_partition() -> None:
    digits = data.digits(seed=3)
    both = torch.cat([digits.train_images, digits.test_images])[:, 0]
    raw = load_digits().images
    everything = torch.from_numpy(np.stack([data.to_digit_grid(i) for i in raw])).float()
    assert torch.equal(
        torch.unique(both.flatten(1), dim=0), torch.unique(everything.flatten(1), dim=0)
    )


def test_digits_follow_the_seed() -> None:
    one, same, other = data.digits(1), data.digits(1), data.digits(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.test_images, other.test_images)


def test_digits_keep_the_pixels_of_scikit_learn() -> None:
    raw = load_digits().images
    full = raw[raw.max((1, 2)) == 16]
    assert len(full) > 1000
    assert all(np.array_equal(data.to_digit_grid(i), i / 16) for i in full)


def test_ood_sets_have_the_form_of_digits(ood_sets: dict[str, torch.Tensor]) -> None:
    assert list(ood_sets) == ["faces", "textures", "photos"]
    for images in (data.digits().test_images, *ood_sets.values()):
        assert images.dtype == torch.float32
        assert is_on_grid(images)
        assert torch.all(images.amin((1, 2, 3)) == 0)
        assert torch.all(images.amax((1, 2, 3)) == 1)
    for images in ood_sets.values():
        assert images.shape == (600, 1, 8, 8)
        assert len(torch.unique(images.flatten(1), dim=0)) > 590


def test_ood_sets_are_the_same_every_time_and_need_no_network(
    ood_sets: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data.outliers()
    again = data.ood_sets()
    assert all(torch.equal(again[name], images) for name, images in ood_sets.items())


def test_outliers_have_the_form_of_digits_and_sources_of_their_own(
    ood_sets: dict[str, torch.Tensor],
) -> None:
    outliers = data.outliers()
    assert outliers.shape == (4000, 1, 8, 8)
    assert outliers.dtype == torch.float32
    assert is_on_grid(outliers)
    assert torch.all(outliers.amin((1, 2, 3)) == 0)
    assert torch.all(outliers.amax((1, 2, 3)) == 1)
    assert not {*data.OUTLIER_PHOTOS} & {*data.TEXTURES, *data.PHOTOS, "lfw_subset"}
    seen = {tuple(image.tolist()) for image in outliers.flatten(1)}
    assert len(seen) > 3900
    for images in (*ood_sets.values(), data.digits().train_images):
        assert not seen & {tuple(image.tolist()) for image in images.flatten(1)}


def test_to_digit_grid_ignores_scale_and_type() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    grid = data.to_digit_grid(image)
    assert grid.shape == (8, 8)
    assert (grid.min(), grid.max()) == (0, 1)
    np.testing.assert_array_equal(data.to_digit_grid(image / 255), grid)
    np.testing.assert_array_equal(data.to_digit_grid(image / 510 + 0.25), grid)
    np.testing.assert_array_equal(data.to_digit_grid(np.stack([image] * 3, axis=2)), grid)


def test_to_digit_grid_of_a_constant_is_zero() -> None:
    assert not data.to_digit_grid(np.full((9, 9), 0.3)).any()


@pytest.mark.parametrize("shape", [(8,), (8, 8, 4), (2, 8, 8, 3)])
def test_to_digit_grid_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"to_digit_grid: image must be \(height, width\)"):
        data.to_digit_grid(np.zeros(shape))
