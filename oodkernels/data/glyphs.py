"""Thousands of real classes from the fonts that matplotlib ships: nothing is downloaded.

A class is a character, or characters that look alike (A of Latin, Greek and Cyrillic), drawn in the
twelve faces of DejaVu Sans, Sans Mono and Serif. Unicode's blocks are the taxonomy. Three faces are
kept from training, so that a test image differs from those of its class in its face as well as in
its distortion. Needs the extra ``demo``.

Characters whose rendered shapes correlate by more than ``LIKENESS`` on average over the faces that
both have are one class (complete linkage: every pair of a class does). Shapes are compared as they
are drawn, each fitted into the same box: o and O are told apart by their outlines alone. A class
with members of an in-distribution group belongs to that group. No class of an OOD set has a
character that looks like one of an ID class, none to train on or to validate with looks like one of
a test set: such classes are left out, and counted.
"""

from __future__ import annotations

import bisect
import hashlib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._optional import require
from oodkernels.groups import Groups

__all__ = [
    "FACES",
    "GROUPS",
    "LIKENESS",
    "OOD_BLOCKS",
    "OUTLIER_BLOCKS",
    "TEST_FACES",
    "VALIDATION_BLOCKS",
    "GlyphClass",
    "GlyphImages",
    "GlyphSets",
    "Glyphs",
    "photographs",
    "render",
]

_SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
FACES = (
    *_SANS,
    *(name.replace("Sans", "SansMono") for name in _SANS),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
)
#: One of each family, in three styles; training sees each family and each style, never these three.
TEST_FACES = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic")
LIKENESS = 0.95

# Where blocks of Unicode begin; what lies between two of them belongs to the former.
_BLOCKS: dict[int, str] = {
    0x21: "latin", 0x180: "latin extended", 0x250: "phonetic", 0x300: "", 0x370: "greek",
    0x400: "cyrillic", 0x530: "armenian", 0x590: "hebrew", 0x600: "",
    0xE80: "lao", 0xF00: "", 0x10A0: "georgian", 0x1100: "", 0x1400: "canadian syllabics",
    0x1680: "", 0x1D00: "phonetic", 0x1DC0: "", 0x1E00: "latin extended", 0x1F00: "greek",
    0x2000: "", 0x2190: "arrows", 0x2200: "mathematics", 0x2300: "", 0x2500: "box drawing",
    0x25A0: "geometric shapes", 0x2600: "symbols", 0x2700: "dingbats", 0x27C0: "mathematics",
    0x27F0: "arrows", 0x2800: "braille", 0x2900: "arrows", 0x2980: "mathematics", 0x2B00: "arrows",
    0x2B12: "geometric shapes", 0x2B60: "", 0x2C60: "latin extended", 0x2C80: "",
    0x2D00: "georgian", 0x2D30: "", 0x4DC0: "hexagrams", 0x4E00: "", 0xA640: "cyrillic",
    0xA700: "phonetic", 0xA720: "latin extended", 0xA800: "", 0xFB1D: "hebrew", 0xFB50: "",
    0x10300: "old italic", 0x10330: "",
    0x1D300: "tetragrams", 0x1D360: "", 0x1F030: "dominoes", 0x1F0A0: "playing cards",
    0x1F100: "", 0x1F600: "emoticons", 0x1F650: "",
}  # fmt: skip
_STARTS = list(_BLOCKS)

#: Groups of the in-distribution classes.
GROUPS = (
    "latin",
    "latin extended",
    "phonetic",
    "greek",
    "cyrillic",
    "armenian",
    "arrows",
    "mathematics",
    "box drawing",
    "geometric shapes",
)
#: Whole blocks held out: name of a test set -> its blocks.
OOD_BLOCKS = {
    "scripts": ("georgian", "hebrew", "old italic"),
    "symbols": ("symbols", "dingbats", "playing cards", "emoticons"),
}
#: Held out for choices of settings; in no test set.
VALIDATION_BLOCKS = ("lao", "dominoes")
#: Outliers to train on; in no test set and not in the validation set.
OUTLIER_BLOCKS = ("canadian syllabics", "braille", "hexagrams", "tetragrams")

_BOX, _CANVAS = 28, 40  # pixels: a character's longer side, and the image it is centred in
_TEXTURES = ("brick", "grass", "gravel")
_PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
_BACKGROUNDS = ("clock", "hubble_deep_field", "immunohistochemistry", "moon")  # in no test set


@dataclass(frozen=True)
class GlyphClass:
    """Characters that look alike.

    Attributes:
        name: Unicode's name of the first.
        block: Name of the block of the first; of ID classes one of ``GROUPS``.
        characters: The characters, by code point.
        masks: (images, 40, 40) uint8: each in every face that has it, unless two are the same.
        faces: (images,) int64: index in ``FACES``.
    """

    name: str
    block: str
    characters: tuple[str, ...]
    masks: Tensor
    faces: Tensor


class GlyphImages(NamedTuple):
    """Images (N, 1, size, size) uint8 and labels (N,) int64, -1 for OOD."""

    images: Tensor
    labels: Tensor


class GlyphSets(NamedTuple):
    """Everything that a study needs.

    Attributes:
        train: ID, faces outside ``TEST_FACES``.
        validation: ID, the training faces with distortions of its own.
        test: ID, the faces of ``TEST_FACES``.
        validation_ood: For choices of settings.
        ood: OOD test sets by name: ``nearest`` (characters held out of ID's groups), ``scripts``
            and ``symbols`` (blocks held out), ``digits`` (scikit-learn's, handwritten),
            ``photographs`` and ``textures`` (scikit-image's).
        outliers: To train on.
        groups: The taxonomy: ID classes by block.
        class_names: Of the ID classes, by label.
        group_names: Of the groups.
        record: What the data are made of: counts, fonts with their SHA-256, seed.
    """

    train: GlyphImages
    validation: GlyphImages
    test: GlyphImages
    validation_ood: GlyphImages
    ood: dict[str, GlyphImages]
    outliers: GlyphImages
    groups: Groups
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    record: dict[str, Any]


def block_of(character: str) -> str:
    """The block that a character is in, by the names used here; empty where it is in none."""
    i = bisect.bisect_right(_STARTS, ord(character)) - 1
    return _BLOCKS[_STARTS[i]] if i >= 0 else ""


class Glyphs:
    """The characters of matplotlib's fonts as classes.

    Args:
        held_out: Share of each ID group's classes that are held out for the OOD set ``nearest``,
            in [0, 1).
        seed: Which are held out.

    Attributes:
        classes: ID classes, a label each, group by group.
        nearest: Classes held out of the ID groups.
        others: Classes of every other block, by its name.
        record: Counts, and the fonts with their SHA-256.
    """

    def __init__(self, held_out: float = 0.1, seed: int = 0) -> None:
        if not 0 <= held_out < 1:
            raise ValueError(f"Glyphs: held_out must be in [0, 1), got {held_out}")
        found, alike = _classes()
        block = np.array([c.block for c in found])
        inside = np.isin(block, GROUPS)
        generator = np.random.default_rng(seed)
        kept, nearest = [], []
        for group in GROUPS:
            members = np.flatnonzero(block == group)
            # Whose like stays in training would not be OOD.
            alone = members[~alike[np.ix_(members, inside)].any(axis=1)]
            out = generator.permutation(alone)[: round(held_out * len(members))]
            kept.append(np.setdiff1d(members, out))
            nearest.append(np.sort(out))
        self.classes: list[GlyphClass] = [found[i] for rows in kept for i in rows]
        self.nearest: list[GlyphClass] = [found[i] for rows in nearest for i in rows]
        sizes = [len(rows) for rows in kept]
        self.groups = Groups.from_sizes(sizes)
        taken = inside.copy()
        self.others: dict[str, list[GlyphClass]] = {}
        for blocks in (*OOD_BLOCKS.values(), VALIDATION_BLOCKS, OUTLIER_BLOCKS):
            ours = np.isin(block, blocks)
            ours &= ~alike[:, taken].any(axis=1)
            for name in blocks:
                self.others[name] = [found[i] for i in np.flatnonzero(ours & (block == name))]
            taken |= ours
        self.seed = seed
        self.record = {
            "classes": len(self.classes),
            "groups": dict(zip(GROUPS, sizes, strict=True)),
            "held out": len(self.nearest),
            "blocks": {name: len(classes) for name, classes in self.others.items()},
            "left out": len(found) - int(taken.sum()),
            "characters": sum(len(c.characters) for c in found),
            "likeness": LIKENESS,
            "fonts": _digests(),
            "seed": seed,
        }

    def sets(
        self,
        *,
        classes: int | None = None,
        train: int = 24,
        test: int = 6,
        ood: int = 2000,
        outliers: int = 8000,
        size: int = 32,
        seed: int = 0,
    ) -> GlyphSets:
        """Draw all data of a study.

        Args:
            classes: As many ID classes, in the groups' proportions; None: all.
            train: Training images of each class.
            test: Test images of each class, and half as many to validate.
            ood: Images of each OOD set, at most.
            outliers: Outliers to train on.
            size: Side of the images in pixels.
            seed: Of the distortions; the same seed gives the same bits on any number of threads.

        Raises:
            ValueError: More classes are asked for than there are, or fewer than groups.
        """
        chosen = self.subset(classes)
        kept = [self.classes[i] for i in chosen.tolist()]
        labels = range(len(kept))
        seeds = iter(np.random.SeedSequence(seed).spawn(12))
        test_faces = torch.tensor([FACES.index(face) for face in TEST_FACES])

        def draw(of: list[GlyphClass], each: int, faces: str, label: bool) -> GlyphImages:
            rng = np.random.default_rng(next(seeds))
            masks, target = [], []
            for i, c in zip(labels if label else [-1] * len(of), of, strict=True):
                ours = torch.isin(c.faces, test_faces) == (faces == "test")
                pool = c.masks if faces == "all" or not ours.any() else c.masks[ours]
                masks.append(pool[torch.from_numpy(rng.integers(len(pool), size=each))])
                target += [i] * each
            images = render(torch.cat(masks), size=size, seed=int(rng.integers(2**62)))
            return GlyphImages(images, torch.tensor(target))

        def ood_of(of: list[GlyphClass], count: int) -> GlyphImages:
            each = max(1, count // max(1, len(of)))
            return draw(of, each, "all", False)

        def blocks(names: tuple[str, ...]) -> list[GlyphClass]:
            return [c for name in names for c in self.others.get(name, [])]

        sets = {"nearest": ood_of(self.nearest, ood)} if self.nearest else {}
        sets |= {name: ood_of(blocks(names), ood) for name, names in OOD_BLOCKS.items()}
        return GlyphSets(
            train=draw(kept, train, "train", True),
            validation=draw(kept, max(1, test // 2), "train", True),
            test=draw(kept, test, "test", True),
            validation_ood=ood_of(blocks(VALIDATION_BLOCKS), ood),
            ood=sets | _far(ood, size, np.random.default_rng(next(seeds))),
            outliers=ood_of(blocks(OUTLIER_BLOCKS), outliers),
            groups=self._groups_of(chosen),
            class_names=tuple(c.name for c in kept),
            group_names=GROUPS,
            record=self.record | {"data seed": seed, "size": size, "classes": len(kept)},
        )

    def subset(self, classes: int | None = None) -> Tensor:
        """Labels of as many ID classes in the groups' proportions; a smaller subset is in a larger.

        Args:
            classes: How many; None: all.

        Raises:
            ValueError: More than there are, or fewer than groups.
        """
        total = len(self.classes)
        if classes is None or classes == total:
            return torch.arange(total)
        if not len(GROUPS) <= classes <= total:
            raise ValueError(
                f"Glyphs.subset: classes must be in [{len(GROUPS)}, {total}], got {classes}"
            )
        order = np.random.default_rng(self.seed).permutation(total)
        groups = self.groups.class_to_group.numpy()[order]
        # Every group's first, then by where each class stands in its group.
        rank = np.empty(total)
        for k in range(len(GROUPS)):
            mine = np.flatnonzero(groups == k)
            rank[mine] = np.arange(len(mine)) / len(mine)
        best = np.argsort(rank, kind="stable")[:classes]
        return torch.from_numpy(np.sort(order[best]))

    def _groups_of(self, chosen: Tensor) -> Groups:
        counts = torch.bincount(self.groups.class_to_group[chosen], minlength=len(GROUPS))
        return Groups.from_sizes(counts.tolist())


def render(masks: Tensor, *, size: int = 32, seed: int = 0) -> Tensor:
    """Draw characters with random affine maps, strokes, contrast, background and noise.

    Args:
        masks: (N, height, width) uint8, ink on nothing.
        size: Side of the images in pixels.
        seed: Of all that is random. The same seed and masks give the same bits on any number of
            threads.

    Returns:
        (N, 1, size, size) uint8.
    """
    rng = np.random.default_rng(seed)
    n = len(masks)
    backgrounds = torch.from_numpy(_windows(_photos(_BACKGROUNDS), 512, size, rng))
    parts = []
    for begin in range(0, n, 4096):  # float32 images of a part: some 20 MB
        part = masks[begin : begin + 4096].float()[:, None] / 255
        parts.append(_drawn(part, backgrounds, size, rng))
    return torch.cat(parts) if parts else torch.empty(0, 1, size, size, dtype=torch.uint8)


def _drawn(ink: Tensor, backgrounds: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    n = len(ink)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    angle, shear = uniform(-0.2, 0.2), uniform(-0.15, 0.15)
    # From places of the output to those of the input, so these are reductions.
    across, down = uniform(0.85, 1.15), uniform(0.85, 1.15)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([across * cos, -across * sin + shear, down * sin, down * cos], dim=1).view(
        n, 2, 2
    )
    theta = torch.cat([theta, uniform(-0.15, 0.15, 2, 1)], dim=2)
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    soft = ink
    for dim in (2, 3):  # the filter 1 2 1, as sums whose order does not depend on threads
        edge = F.pad(soft, (0, 0, 1, 1) if dim == 2 else (1, 1, 0, 0))
        soft = (edge.narrow(dim, 0, size) + 2 * soft + edge.narrow(dim, 2, size)) / 4
    blur = uniform(0, 1, 1, 1, 1)
    # Above one it thickens strokes, below it thins them.
    ink = ((1 - blur) * ink + blur * soft).clamp(0, 1) ** uniform(0.6, 1.5, 1, 1, 1)
    back = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=n))][:, None]
    back = uniform(0, 0.35, 1, 1, 1) * (back - 0.5) + uniform(0.55, 0.9, 1, 1, 1)
    image = back + ink * (uniform(0.02, 0.3, 1, 1, 1) - back)
    flip = torch.from_numpy(rng.random(n) < 0.5).view(n, 1, 1, 1)
    image = torch.where(flip, 1 - image, image)
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    image = image + uniform(0, 0.08, 1, 1, 1) * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def photographs(names: tuple[str, ...], each: int, size: int, seed: int = 0) -> Tensor:
    """Square windows of scikit-image's photographs, reduced to ``size`` pixels.

    Args:
        names: Of functions of ``skimage.data``.
        each: Windows in all.
        size: Side in pixels.
        seed: Of their places and sizes.

    Returns:
        (each, 1, size, size) uint8, grey.
    """
    windows = _windows(_photos(names), each, size, np.random.default_rng(seed))
    return torch.from_numpy((windows * 255).round().astype(np.uint8))[:, None]


def _far(count: int, size: int, rng: np.random.Generator) -> dict[str, GlyphImages]:
    datasets = require("sklearn.datasets", "demo", "Glyphs.sets")
    digits = torch.from_numpy(datasets.load_digits().images.astype(np.float32))[:count, None]
    digits = F.interpolate(digits * (255 / 16), size=(size, size), mode="bilinear")
    sets = {
        "digits": digits.round().to(torch.uint8),
        "photographs": photographs(_PHOTOS, count, size, int(rng.integers(2**62))),
        "textures": photographs(_TEXTURES, count, size, int(rng.integers(2**62))),
    }
    return {k: GlyphImages(v, torch.full((len(v),), -1)) for k, v in sets.items()}


def _photos(names: tuple[str, ...]) -> list[NDArray[np.float32]]:
    data = require("skimage.data", "demo", "Glyphs.sets")
    color = require("skimage.color", "demo", "Glyphs.sets")
    images = []
    for name in names:
        image = getattr(data, name)()
        grey = color.rgb2gray(image) if image.ndim == 3 else image / 255
        images.append(grey.astype(np.float32))
    return images


def _windows(
    photos: list[NDArray[np.float32]], count: int, size: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    out = np.empty((count, size, size), np.float32)
    for i in range(count):
        image = photos[i % len(photos)]
        side = min(round(size * 2 ** rng.uniform(0, 2)), *image.shape)
        top, left = (int(rng.integers(extent - side + 1)) for extent in image.shape)
        window = torch.from_numpy(image[top : top + side, left : left + side].copy())
        small = F.interpolate(window[None, None], (size, size), mode="bilinear", antialias=True)
        low, high = small.min(), small.max()
        out[i] = ((small - low) / (high - low).clamp_min(1e-3))[0, 0].numpy()
    return out


# --- characters and what they look like -----------------------------------------------------------


def _files() -> dict[str, Path]:
    matplotlib = require("matplotlib", "demo", "Glyphs")
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return {face: folder / f"{face}.ttf" for face in FACES}


def _digests() -> dict[str, str]:
    return {face: hashlib.sha256(path.read_bytes()).hexdigest() for face, path in _files().items()}


@lru_cache(maxsize=1)
def _classes() -> tuple[list[GlyphClass], NDArray[np.bool_]]:
    """All classes of the blocks used here, and which pairs of them have characters alike."""
    characters, masks, has = _drawn_characters()
    blocks = [block_of(c) for c in characters]
    likeness = _likeness(masks, has)
    found: list[tuple[list[int], list[int]]] = []
    for members in _cliques(likeness):
        # Of an ID group where any member is; other blocks' members do not count there.
        inside = [i for i in members if blocks[i] in GROUPS]
        own = inside or [i for i in members if blocks[i] == blocks[members[0]]]
        found.append((own, members))
    found.sort()
    classes = []
    for own, _ in found:
        images: dict[tuple[int, bytes], Tensor] = {}
        for i in own:
            for face in np.flatnonzero(has[i]).tolist():
                images.setdefault((face, masks[i, face].numpy().tobytes()), masks[i, face])
        classes.append(
            GlyphClass(
                unicodedata.name(characters[own[0]]),
                blocks[own[0]],
                tuple(characters[i] for i in own),
                torch.stack(list(images.values())),
                torch.tensor([face for face, _ in images]),
            )
        )
    member = np.zeros((len(found), len(characters)), np.float32)
    for k, (_, members) in enumerate(found):
        member[k, members] = 1
    pairs = member @ (likeness > LIKENESS).astype(np.float32) @ member.T > 0
    np.fill_diagonal(pairs, False)
    return classes, pairs


def _drawn_characters() -> tuple[list[str], Tensor, NDArray[np.bool_]]:
    """Characters, their masks (characters, faces, 40, 40) uint8, and which face has which.

    Of an ID group's blocks those that all faces have, of the others those of the four Sans faces.
    """
    ft2font = require("matplotlib.ft2font", "demo", "Glyphs")
    fonts = [ft2font.FT2Font(str(path)) for path in _files().values()]
    for font in fonts:
        font.set_size(64, 72)
    maps = [set(font.get_charmap()) for font in fonts]
    wanted = []
    for code in sorted(set.intersection(*maps[: len(_SANS)])):
        block = block_of(chr(code))
        used = block and unicodedata.category(chr(code))[0] in "LNPS"
        if used and (block not in GROUPS or all(code in m for m in maps)):
            wanted.append(code)
    masks = torch.zeros(len(wanted), len(fonts), _CANVAS, _CANVAS, dtype=torch.uint8)
    has = np.zeros((len(wanted), len(fonts)), bool)
    for i, code in enumerate(wanted):
        for j, font in enumerate(fonts):
            if code in maps[j]:
                font.set_text(chr(code))
                font.draw_glyphs_to_bitmap(antialiased=True)
                has[i, j] = _fit(np.asarray(font.get_image()), masks[i, j])
    drawn = np.flatnonzero(has[:, : len(_SANS)].all(axis=1))
    return [chr(wanted[i]) for i in drawn], masks[torch.from_numpy(drawn)], has[drawn]


def _fit(image: NDArray[np.uint8], out: Tensor) -> bool:
    """Fit what is drawn into the box; False where nothing is."""
    rows, columns = np.nonzero(image)
    if not len(rows):
        return False
    image = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = _BOX / max(image.shape)
    height, width = (max(1, round(extent * scale)) for extent in image.shape)
    small = F.interpolate(
        torch.from_numpy(image.astype(np.float32))[None, None],
        (height, width),
        mode="bilinear",
        antialias=True,
    )
    top, left = (_CANVAS - height) // 2, (_CANVAS - width) // 2
    out[top : top + height, left : left + width] = small[0, 0].round().to(torch.uint8)
    return True


def _likeness(masks: Tensor, has: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Correlation of two characters' shapes, on average over the faces that both have."""
    n, faces = masks.shape[:2]
    both = torch.from_numpy(has.astype(np.float32))
    likeness = torch.zeros(n, n, dtype=torch.float64)
    for face in range(faces):
        shape = masks[:, face, None].float()
        shape = F.avg_pool2d(F.avg_pool2d(shape, 3, 1, 1), 3, 1, 1).flatten(1)
        shape = F.normalize(shape - shape.mean(1, keepdim=True)) * both[:, face, None]
        likeness += (shape @ shape.T).double()
    likeness /= (both @ both.T).double()
    return (likeness + likeness.T).numpy() / 2


def _cliques(likeness: NDArray[np.float64]) -> list[list[int]]:
    """Characters in sets of which every pair is more alike than ``LIKENESS``."""
    hierarchy = require("scipy.cluster.hierarchy", "demo", "Glyphs")
    distance = require("scipy.spatial.distance", "demo", "Glyphs")
    apart = (1 - likeness).clip(0)
    np.fill_diagonal(apart, 0)
    tree = hierarchy.linkage(distance.squareform(apart, checks=False), "complete")
    members: dict[int, list[int]] = {}
    for i, k in enumerate(hierarchy.fcluster(tree, 1 - LIKENESS, "distance").tolist()):
        members.setdefault(k, []).append(i)
    return list(members.values())
