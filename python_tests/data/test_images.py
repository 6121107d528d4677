from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from transforms import Compose, evaluation

from oodkernels.data import ImageFiles, OnRGB, Preprocess, Shards, ToTensor, augmented, open_images
from oodkernels.data.images import one_line

RAW = ToTensor(8, 1.0, (0.0,) * 3, (1.0,) * 3)


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path, "png")
    return path


def opened(*args: Any, **options: Any) -> ImageFiles:
    found = open_images(*args, **options)
    assert isinstance(found, ImageFiles)
    return found


# --- pixels -----------------------------------------------------------------------------------


def test_to_tensor_is_resize_crop_normalise() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8), "L")
    found = ToTensor(size=14, mean=(0.5,) * 3, std=(0.25,) * 3)(image)
    resized = image.convert("RGB").resize((24, 16), Image.Resampling.BICUBIC)
    centre = np.asarray(resized, np.float64)[1:15, 5:19] / 255
    np.testing.assert_allclose(found.numpy(), (centre.transpose(2, 0, 1) - 0.5) / 0.25, atol=1e-5)
    assert ToTensor(size=32)(Image.new("L", (5, 3))).shape == (3, 32, 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_compose_is_known_by_its_parts_and_by_what_it_gives(interpolation: str) -> None:
    known = Preprocess(24, (0.5, 0.4, 0.3), (0.25,) * 3, 28, interpolation)
    compose = evaluation(known)
    assert Preprocess.of(compose) == Preprocess.of(OnRGB(compose)) == known
    assert Preprocess.of(known) is known
    for name, value in (("size", 29), ("size", (28, 28)), ("interpolation", None)):
        other = evaluation(known)
        setattr(other.transforms[0], name, value)
        assert (Preprocess.of(other) == known) is (name == "size" and value == 28)
    other = evaluation(known)
    other.transforms[3].mean = [0.5, 0.4]
    assert Preprocess.of(other) is None
    other = evaluation(known)
    other.transforms[3].shift = 1e-6  # says one thing and does another
    assert Preprocess.of(other) is None
    for left_out in range(4):
        steps = [step for i, step in enumerate(compose.transforms) if i != left_out]
        assert Preprocess.of(Compose(steps)) is None
    assert Preprocess.of(None) is Preprocess.of(lambda image: image) is None


def test_timms_transforms_are_known() -> None:
    data = pytest.importorskip("timm.data")
    options = {"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bicubic"}
    transform = data.create_transform(**options, is_training=False)
    found = Preprocess.of(OnRGB(transform))
    assert found is not None
    assert (found.size, found.resize, found.interpolation) == (64, 71, "bicubic")
    image = Image.fromarray(np.random.default_rng(1).integers(256, size=(90, 120, 3), dtype="u1"))
    assert torch.equal(found(image), transform(image))
    assert Preprocess.of(data.create_transform(**options, crop_mode="squash")) is None


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, suffix: str) -> None:
    pixels = (RAMP * 65535 // 63).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"x{suffix}")
    found = opened(tmp_path, RAW)[0].image
    np.testing.assert_allclose(found[1].numpy(), pixels / 65535, atol=1 / 255)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif: its numbers have no known range \(mode [IF]\)"):
        opened(tmp_path, RAW)[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_images_are_their_colours(tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode in ("CMYK", "YCbCr") else ".png"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(tmp_path / f"x{suffix}")
    assert opened(tmp_path, RAW)[0].image.min() == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_they_say(tmp_path: Path, orientation: int) -> None:
    """As the EXIF standard numbers the eight ways to hold a camera."""
    upright = RAMP.astype(np.uint8) * 4
    held = [
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        upright.T,
        np.rot90(upright),
        np.rot90(upright, 2).T,
        np.rot90(upright, -1),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(held)).save(tmp_path / "x.png", exif=exif)
    found = opened(tmp_path, RAW)[0].image[0] * 255
    np.testing.assert_array_equal(found.round().numpy(), upright)


def test_a_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png: .*decompression bomb"):
        opened(tmp_path)[0]


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40), b"BM" + bytes(90)]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png"):
        opened(tmp_path)[0]


def test_a_transform_that_fails_is_no_broken_image(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"cannot transform the image .*x\.png: division by zero"):
        opened(tmp_path, lambda image: 1 / 0)[0]


def test_what_is_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torchvision's parts are asked for; its own tests are for what they do."""
    asked: dict[str, Any] = {}

    def part(name: str) -> Any:
        def make(*args: Any, **options: Any) -> str:
            asked[name] = (*args, *options.values())
            return name

        return make

    v2: Any = ModuleType("torchvision.transforms.v2")
    names = ["RandomResizedCrop", "RandomHorizontalFlip", "PILToTensor", "ToDtype", "Normalize"]
    for name in names:
        setattr(v2, name, part(name))
    v2.InterpolationMode = SimpleNamespace(BICUBIC="bicubic")
    v2.Compose = tuple
    monkeypatch.setitem(sys.modules, v2.__name__, v2)
    model = torch.nn.Linear(1, 1)
    found = augmented(model, ToTensor(9, std=(1, 1, 1)))
    assert isinstance(found, OnRGB)
    assert list(found.transform) == names
    assert asked == {
        "RandomResizedCrop": (9, "bicubic"),
        "RandomHorizontalFlip": (),
        "PILToTensor": (),
        "ToDtype": (torch.float32, True),
        "Normalize": ((0.485, 0.456, 0.406), (1, 1, 1)),
    }
    with pytest.raises(ValueError, match="has a transform of its own"):
        augmented(model, lambda image: torch.zeros(1))


def test_random_crops_are_parts_of_the_image_and_torchs_random_numbers() -> None:
    pytest.importorskip("torchvision")
    grey = np.linspace(0, 255, 40 * 60).reshape(40, 60).astype(np.uint8)
    image = Image.fromarray(grey, "L")
    crop = augmented(torch.nn.Linear(1, 1), ToTensor(8, mean=(0.0,) * 3, std=(1.0,) * 3))
    torch.manual_seed(0)
    found = torch.stack([crop(image) for _ in range(200)])
    assert found.shape == (200, 3, 8, 8)
    assert found.min() >= 0
    assert found.max() <= 1
    rows = found[:, 0].mean(2)
    assert (rows.diff(dim=1) > 0).all()  # never upside down
    mirrored = found[:, 0, 0, -1] < found[:, 0, 0, 0]
    assert 60 < mirrored.sum() < 140
    height = rows[:, -1] - rows[:, 0]
    assert height.max() / height.min() > 2
    torch.manual_seed(0)
    assert torch.equal(found[0], crop(image))


# --- folders ----------------------------------------------------------------------------------


def test_hidden_folders_and_files_are_none(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "dog/more/2.png"):
        save(tmp_path / name)
    for name in (
        ".ipynb_checkpoints/1.png",
        "__MACOSX/cat/1.png",
        "cat/._1.png",
        "cat/.ipynb_checkpoints/1.png",
        "dog/__MACOSX/._2.png",
        "._cat.png",
    ):
        save(tmp_path / name)
    found = opened(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert [
        (str(p.relative_to(tmp_path)), y) for p, y in zip(found.paths, found.labels, strict=True)
    ] == [
        ("cat/1.png", 0),
        ("dog/1.png", 1),
        ("dog/more/2.png", 1),
    ]
    (flat := tmp_path / "flat").mkdir()
    save(flat / "1.png")
    save(flat / "._1.png")
    save(flat / ".thumbnails/1.png")
    assert (opened(flat).labels, opened(flat).class_names) == ([-1], None)


def test_numbers_of_classes_are_those_trained_on(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/1.png", "val/c/1.png"):
        save(tmp_path / name)
    train = opened(tmp_path / "train")
    val = opened(tmp_path / "val", class_names=train.class_names)
    assert val.labels == [0, 2]
    assert val.class_names == ("a", "b", "c")
    save(tmp_path / "val/d/1.png")
    with pytest.raises(ValueError, match=r"val: its classes must be among .* a, b, c; unknown: d"):
        open_images(tmp_path / "val", class_names=train.class_names)


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        (["a/1.png"], ["b"], r"b must hold images, as a folder of a class"),
        (
            ["a/1.png", "1.png"],
            [],
            r"images or a folder per class, got both: 1\.png beside a",
        ),
        (["._1.png"], [], "must hold images"),
    ],
)
def test_folders_that_would_be_guessed_at(
    tmp_path: Path, files: list[str], folders: list[str], message: str
) -> None:
    for name in files:
        save(tmp_path / name)
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_is_no_text_refuses_nothing(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    save(tmp_path / "1.png")
    os.rename(folder + b"/1.png", folder + b"/caf\xe9.png")
    found = opened(tmp_path, RAW)
    assert found.digest()
    assert one_line(found[0].name) == f"{tmp_path}/caf\\xe9.png"


def test_a_name_stays_on_its_line() -> None:
    names = ["a b,c", "a\nb", "a\\nb", "ä\x00", "a\u2028b"]
    lines = [one_line(name) for name in names]
    assert lines == ["a b,c", "a\\nb", "a\\\\nb", "ä\\x00", "a\\u2028b"]


# --- lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [" ", "  ", "\t", ",", ", ", " \t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists(tmp_path: Path, separator: str, encoding: str) -> None:
    names = ["a b, c.png", "ä.PNG", "x/1.png"]
    lines = [f"{name}{separator}{i - 1}" for i, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\r\n".join(lines) + "\r\n\r\n", encoding=encoding)
    found = opened(tmp_path / "list.txt")
    assert found.paths == [tmp_path / name for name in names]
    assert found.labels == [-1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label", "a.png,1"], "line 1 must be `path` or `path label`, of an image"),
        (["a.png 1.5"], "line 1 must be"),
        (["a.png cat"], "line 1 must be"),
        (["a.png 1", "b.png"], "line 2 has no label, unlike those before it"),
        (["a.png", "b.png 1"], "line 2 has a label, unlike"),
        (["a.png -2"], "line 1 must end in a class id"),
        (["frame 12"], "line 1 must be"),
    ],
)
def test_lines_that_would_be_guessed_at(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "list.txt")


def test_a_list_may_name_an_image_without_an_ending(tmp_path: Path) -> None:
    save(tmp_path / "1.png").rename(tmp_path / "frame 12x")
    (tmp_path / "list.txt").write_text("frame 12x\n")
    assert opened(tmp_path / "list.txt", RAW)[0].image.shape == (3, 8, 8)


def test_a_pipe_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="must be a folder or a file"):
        open_images(tmp_path / "list.txt")


# --- shards -----------------------------------------------------------------------------------


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "urls",
    [
        "pipe:touch made; cat s.tar",
        "{s,pipe:touch made; cat s}.tar",
        "s.tar::pipe:touch made; cat s.tar",
        " pipe:touch made; cat s.tar",
        "https://example.org/'; touch made; '/s.tar",
        "file:s.tar",
    ],
)
def test_no_shell_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, urls: str
) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    data = save(tmp_path / "1.png").read_bytes()
    shard(tmp_path / "s.tar", {"0.png": data})
    with pytest.raises(ValueError, match=r"must be a file.*shell=True, --allow-shell"):
        list(open_images(urls, RAW))
    assert not (tmp_path / "made").exists()


def test_a_shell_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    data = save(tmp_path / "1.png").read_bytes()
    shard(tmp_path / "s.tar", {"0.png": data})
    found = list(open_images("pipe:touch made; cat s.tar", RAW, shell=True))
    assert [sample.name for sample in found] == ["0"]
    assert (tmp_path / "made").exists()


def test_shards_that_are_not_there_or_broken(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(FileNotFoundError, match=r"s-1\.tar"):
        open_images(f"{tmp_path}/s-{{1..3}}.tar")
    data = save(tmp_path / "1.png").read_bytes()
    path = shard(tmp_path / "s.tar", {"0.png": data, "._0.png": b"x", "0.cls": b"3"})
    (found,) = open_images(path, RAW)
    assert (found.name, found.label) == ("0", 3)
    shard(path, {"0.png": data, "0.cls": b"cat"})
    with pytest.raises(ValueError, match=r"s\.tar: 0: invalid literal"):
        list(open_images(path, RAW))
    path.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"cannot read the shards .*s\.tar"):
        list(open_images(path, RAW))
    assert isinstance(open_images(path), Shards)
