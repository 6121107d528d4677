"""Real images small enough to ship inside the scikit-learn and scikit-image wheels: no download.

In-distribution (ID) data are scikit-learn's handwritten digits; the out-of-distribution (OOD)
sets are cut from the photographs of ``skimage.data``, outliers to train on from other photographs.
Whatever the source, an image takes the one path of :func:`to_digit_grid`, so that neither size,
value range, contrast nor quantisation tells ID from OOD: what is left to detect is the content.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.filters import gaussian
from skimage.transform import resize
from skimage.util import img_as_float
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from torch import Tensor

Image = NDArray[np.float64]

SIDE = 8
LEVELS = 16
OOD_SIZE = 600
TEXTURES = ("brick", "grass", "gravel")
PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
OUTLIER_PHOTOS = ("clock", "hubble_deep_field", "immunohistochemistry", "moon")
OUTLIER_SAMPLE_IMAGES = ("china.jpg", "flower.jpg")
OUTLIERS_EACH = 500


class Digits(NamedTuple):
    """Training and test digits: images (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def to_digit_grid(image: NDArray[np.generic]) -> Image:
    """Bring an image of any size to the form of scikit-learn's digits.

    Grey, reduced to 8 x 8 with an anti-aliasing filter, stretched to span [0, 1], and rounded to
    the 17 levels that the digits have.

    Args:
        image: (height, width), or (height, width, 3) for RGB; integers are read on the scale of
            their type, floats as they are.

    Returns:
        (8, 8) float64 in [0, 1]. A constant image gives zeros.

    Raises:
        ValueError: The image is neither (height, width) nor (height, width, 3).
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(
            f"to_digit_grid: image must be (height, width) or (height, width, 3), got {image.shape}"
        )
    grey = img_as_float(rgb2gray(image) if image.ndim == 3 else image)
    if grey.shape != (SIDE, SIDE):
        grey = resize(grey, (SIDE, SIDE), order=1, mode="reflect", anti_aliasing=True)
    low, high = grey.min(), grey.max()
    if high == low:
        return np.zeros((SIDE, SIDE))
    levels: Image = np.round((grey - low) / (high - low) * LEVELS)
    return levels / LEVELS


def digits(seed: int = 0, test_share: float = 1 / 3) -> Digits:
    """The 1797 handwritten digits of scikit-learn, split with the classes in proportion.

    Args:
        seed: Which split; the same seed gives the same one.
        test_share: Share of the images held back for testing, in (0, 1).

    Source: Alpaydin & Kaynak, UCI Optical Recognition of Handwritten Digits (1998).
    """
    bunch = load_digits()
    images = _batch([to_digit_grid(image) for image in bunch.images])
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_share, stratify=bunch.target, random_state=seed
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def ood_sets() -> dict[str, Tensor]:
    """The OOD test sets, always the same images: name -> (600, 1, 8, 8) float32 in [0, 1].

    * ``faces``: the 100 faces of ``lfw_subset``, six views of each: the whole image and two of its
      corners (22 of 25 pixels), as they are and mirrored.
    * ``textures``: square windows of the brick, grass and gravel textures, 200 of each.
    * ``photos``: square windows of six photographs, 100 of each.

    The windows have sides of 32 to 128 pixels; their place and size come from a fixed seed.
    """
    rng = np.random.default_rng(0)
    sets = {"faces": _faces()}
    for set_name, names in (("textures", TEXTURES), ("photos", PHOTOS)):
        images = [getattr(skimage.data, name)() for name in names]
        sets[set_name] = _windows(images, OOD_SIZE // len(images), rng)
    return {name: _batch([to_digit_grid(i) for i in images]) for name, images in sets.items()}


def outliers() -> Tensor:
    """Outliers to train on, always the same images: (4000, 1, 8, 8) float32 in [0, 1].

    None comes from a photograph of which :func:`ood_sets` has any part. First come square windows
    of six others, 500 of each, cut in the same way: the clock, the Hubble deep field, the stained
    tissue and the moon of ``skimage.data``, the temple and the flower of scikit-learn. Then come
    1000 of Gaussian noise, smoothed by a Gaussian filter of up to two pixels.
    """
    rng = np.random.default_rng(1)
    photos = [getattr(skimage.data, name)() for name in OUTLIER_PHOTOS]
    photos += [load_sample_image(name) for name in OUTLIER_SAMPLE_IMAGES]
    images = _windows(photos, OUTLIERS_EACH, rng)
    for _ in range(2 * OUTLIERS_EACH):
        images.append(gaussian(rng.standard_normal((SIDE, SIDE)), rng.uniform(0, 2)))
    return _batch([to_digit_grid(image) for image in images])


def _faces() -> list[NDArray[np.generic]]:
    faces = skimage.data.lfw_subset()[:100]  # the other 100 are background
    views = [view for face in faces for view in (face, face[:22, :22], face[3:, 3:])]
    return [image for view in views for image in (view, view[:, ::-1])]


def _windows(
    photos: list[NDArray[np.generic]], each: int, rng: np.random.Generator
) -> list[NDArray[np.generic]]:
    windows = []
    for image in photos:
        for _ in range(each):
            side = round(2 ** rng.uniform(5, 7))
            top, left = (rng.integers(extent - side + 1) for extent in image.shape[:2])
            windows.append(image[top : top + side, left : left + side])
    return windows


def _batch(images: list[Image]) -> Tensor:
    return torch.from_numpy(np.stack(images)[:, None].astype(np.float32))
