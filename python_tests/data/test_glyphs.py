"""The glyphs: classes, what keeps the sets apart, and the same bits for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations

import numpy as np
import pytest
import torch

from oodkernels.data import glyphs
from oodkernels.data.glyphs import (
    GROUPS,
    LIKENESS,
    OOD_BLOCKS,
    OUTLIER_BLOCKS,
    TEST_FACES,
    VALIDATION_BLOCKS,
    GlyphClass,
    Glyphs,
    GlyphSets,
    block_of,
    render,
)

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def drawings() -> Iterator[None]:
    """Characters are drawn and compared once: for the classes, and for the tests that look on."""
    with pytest.MonkeyPatch.context() as patch:
        characters, masks, has = glyphs._drawn_characters()
        likeness = glyphs._likeness(masks, has)
        patch.setattr(glyphs, "_drawn_characters", lambda: (characters, masks, has))
        patch.setattr(glyphs, "_likeness", lambda masks, has: likeness)
        yield


@pytest.fixture(scope="module")
def alphabet(drawings: None) -> Glyphs:
    return Glyphs()


@pytest.fixture(scope="module")
def sets(alphabet: Glyphs) -> GlyphSets:
    return alphabet.sets(classes=60, train=4, test=4, ood=120, outliers=100)


def everything(alphabet: Glyphs) -> dict[str, list[GlyphClass]]:
    def of(names: tuple[str, ...]) -> list[GlyphClass]:
        return [c for name in names for c in alphabet.others[name]]

    return {
        "id": alphabet.classes,
        "nearest": alphabet.nearest,
        **{name: of(names) for name, names in OOD_BLOCKS.items()},
        "validation": of(VALIDATION_BLOCKS),
        "outliers": of(OUTLIER_BLOCKS),
    }


def test_thousand_classes_in_ten_groups(alphabet: Glyphs) -> None:
    assert 1000 < len(alphabet.classes) == alphabet.groups.num_classes
    assert alphabet.groups.num_groups == len(GROUPS) == 10
    assert all(classes for classes in everything(alphabet).values())
    blocks = [GROUPS[k] for k in alphabet.groups.class_to_group.tolist()]
    assert blocks == [c.block for c in alphabet.classes]


def test_what_looks_alike_is_one_class(alphabet: Glyphs) -> None:
    found = {
        c: cls.characters for cls in (*alphabet.classes, *alphabet.nearest) for c in cls.characters
    }
    assert found["A"] == found["\u0391"] == found["\u0410"]  # Latin, Greek, Cyrillic
    assert found["b"] != found["d"]
    assert found["\u00e9"] != found["\u00e8"]  # acute and grave


def test_no_character_is_in_two_sets(alphabet: Glyphs) -> None:
    of = {
        name: set(chain.from_iterable(c.characters for c in classes))
        for name, classes in everything(alphabet).items()
    }
    for a, b in combinations(of, 2):
        assert not of[a] & of[b], (a, b)


def test_no_class_of_one_set_looks_like_one_of_another(alphabet: Glyphs) -> None:
    characters, masks, has = glyphs._drawn_characters()
    index = {c: i for i, c in enumerate(characters)}
    likeness = glyphs._likeness(masks, has)
    rows = {
        name: [index[c] for cls in classes for c in cls.characters]
        for name, classes in everything(alphabet).items()
    }
    for a, b in combinations(rows, 2):
        assert likeness[np.ix_(rows[a], rows[b])].max() <= LIKENESS, (a, b)


def test_blocks() -> None:
    names = {"A": "latin", "\u0416": "cyrillic", "\u2192": "arrows", "\u10d0": "georgian"}
    assert {c: block_of(c) for c in names} == names
    assert block_of(" ") == block_of("\u4e00") == ""


def test_test_faces_are_not_trained_on(alphabet: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    def keep(masks: torch.Tensor, *, size: int, seed: int) -> torch.Tensor:
        drawn.append(masks)
        return torch.zeros(len(masks), 1, size, size, dtype=torch.uint8)

    monkeypatch.setattr(glyphs, "render", keep)
    made = alphabet.sets(classes=10, train=41, test=40, ood=10, outliers=10)
    test_faces = torch.tensor([glyphs.FACES.index(face) for face in TEST_FACES])
    classes = {c.name: c for c in alphabet.classes}
    for images, held_out in ((made.train, False), (made.validation, False), (made.test, True)):
        masks = next(m for m in drawn if len(m) == len(images.labels))
        for mask, label in zip(masks, images.labels.tolist(), strict=True):
            ours = classes[made.class_names[label]]
            faces = ours.faces[(ours.masks == mask).flatten(1).all(1)]
            assert (torch.isin(faces, test_faces) == held_out).any()


def test_sets(sets: GlyphSets) -> None:
    assert set(sets.ood) == {"nearest", "scripts", "symbols", "digits", "photographs", "textures"}
    for images, labels in (sets.train, sets.test, sets.validation):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (1, 32, 32)
        assert torch.bincount(labels).tolist() == [len(labels) // 60] * 60
    for images, labels in (sets.outliers, sets.validation_ood, *sets.ood.values()):
        assert len(images) == len(labels) > 0
        assert (labels == -1).all()
    assert sets.groups.num_classes == len(sets.class_names) == 60
    assert (sets.groups.sizes > 0).all()
    assert len(sets.record["fonts"]) == 12


def test_same_bits_on_any_number_of_threads(alphabet: Glyphs) -> None:
    masks = torch.cat([c.masks for c in alphabet.classes[:60]])
    threads = torch.get_num_threads()
    try:
        images = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            images.append(render(masks, seed=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], render(masks, seed=4))


def test_bad_arguments(alphabet: Glyphs) -> None:
    with pytest.raises(ValueError, match=r"Glyphs: held_out must be in \[0, 1\), got 1"):
        Glyphs(held_out=1)
    with pytest.raises(ValueError, match=r"Glyphs.subset: classes must be in \[10, \d+\], got 5"):
        alphabet.sets(classes=5)


def test_no_characters() -> None:
    assert render(torch.empty(0, 40, 40, dtype=torch.uint8)).shape == (0, 1, 32, 32)
