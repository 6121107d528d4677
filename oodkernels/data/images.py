"""Images in folders, lists of files and WebDataset shards, and their way to a tensor.

Needs Pillow; shards need webdataset, augmentation torchvision (all of the extra ``vision``).
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from oodkernels._checks import check_count, check_real
from oodkernels._optional import require
from oodkernels.data.arrays import PathLike, reason
from oodkernels.data.samples import match_classes

Transform: TypeAlias = Callable[[Any], Tensor]

__all__ = [
    "ImageFiles",
    "ImageSample",
    "OnRGB",
    "Preprocess",
    "Shards",
    "ToTensor",
    "augmented",
    "open_images",
]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
NO_LABEL = -1
MAX_SHARDS = 1_000_000


class ImageSample(NamedTuple):
    """An image on its way to the model; ``image`` is None where it cannot be read."""

    image: Tensor | None
    label: int
    name: str


# --- pixels -----------------------------------------------------------------------------------


def to_rgb(image: Any) -> Any:
    """A PIL image with three channels of eight bits; sixteen are scaled by their range.

    Raises:
        ValueError: The range of its numbers is not known: 32-bit integers, floats.
    """
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (
        # Pillow gives the 16 bits of these formats, which have no more, as 32.
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if sixteen:
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.mode.partition(";")[0] in ("I", "F"):
        raise ValueError(
            f"its numbers have no known range (mode {image.mode}): save it with 8 or 16 bits"
        )
    return image.convert("RGB")


@dataclass(frozen=True)
class ToTensor:
    """A PIL image to a normalised tensor (3, size, size), as ImageNet classifiers want it.

    The shorter side is resized to ``size / crop`` with a bicubic filter, the centre cut out. It is
    here, and not torchvision's, so that extracting with a model of one's own needs no more than
    Pillow.

    Attributes:
        size: Side of the image that the model sees.
        crop: Share of the shorter side that is kept.
        mean: Of the channels, of values in [0, 1].
        std: Of the channels.
    """

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, image: Any) -> Tensor:
        """(3, size, size) float32."""
        from PIL import Image

        scale = round(self.size / self.crop) / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
        normal = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normal.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Preprocess:
    """A PIL image to a normalised tensor, by torchvision's Resize, CenterCrop and Normalize.

    The numbers are those of ``Compose([Resize(resize), CenterCrop(size), ToTensor(),
    Normalize(mean, std)])``, the evaluation of most code bases, without torchvision.

    Attributes:
        size: Side of the image that is cut out of the centre.
        mean: Of the channels, of values in [0, 1].
        std: Of the channels.
        resize: The shorter side before that; None: the image is not resized.
        interpolation: "bilinear", "bicubic" or "nearest".

    Raises:
        ValueError: ``resize`` is less than ``size``, a size is not positive, or another argument is
            not as above.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_count("Preprocess", "size", self.size)
        if self.resize is not None and check_count("Preprocess", "resize", self.resize) < self.size:
            raise ValueError(f"Preprocess: resize must be at least size, got {self.resize}")
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"Preprocess: interpolation must be {', '.join(_FILTERS)}, got "
                f"{self.interpolation!r}"
            )
        for name in ("mean", "std"):
            values = tuple(check_real("Preprocess", name, v) for v in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ValueError(f"Preprocess: {name} must be three numbers, got {values}")
            object.__setattr__(self, name, values)

    @classmethod
    def of(cls, transform: Any) -> Preprocess | None:
        """The one that gives the bits of torchvision's or timm's; None where none is known to.

        Args:
            transform: torchvision's ``Compose`` of Resize, CenterCrop, ToTensor and Normalize, as
                timm's ``create_transform(..., is_training=False)`` makes it; alone or within
                :class:`OnRGB`. It is read, and then tried on three images.
        """
        if type(transform) is cls:
            return transform
        given = transform.transform if isinstance(transform, OnRGB) else transform
        steps = list(getattr(given, "transforms", ()))
        if [type(step).__name__.removeprefix("Maybe") for step in steps] != _STEPS:
            return None
        resize, crop, _, normal = steps
        try:
            height, width = crop.size
            (side,) = [resize.size] if isinstance(resize.size, int) else resize.size
            mean, std = (tuple(map(float, v)) for v in (normal.mean, normal.std))
            made = cls(height, mean, std, side, str(resize.interpolation.value))
        except (AttributeError, TypeError, ValueError):
            return None
        return made if height == width and _same(made, given) else None

    def __call__(self, image: Any) -> Tensor:
        """(3, size, size) float32.

        Raises:
            ValueError: The image is smaller than ``size``, and not resized.
        """
        from PIL import Image

        image = to_rgb(image)
        short, long = sorted(image.size)
        if self.resize is not None and short != self.resize:
            sides = self.resize, int(self.resize * long / short)
            sides = sides if image.size[0] <= image.size[1] else sides[::-1]
            image = image.resize(sides, Image.Resampling[self.interpolation.upper()])
        if min(image.size) < self.size:
            raise ValueError(f"it must be at least {self.size} wide and high, got {image.size}")
        left, top = (round((side - self.size) / 2) for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


_FILTERS = ("bilinear", "bicubic", "nearest")
_STEPS = ["Resize", "CenterCrop", "ToTensor", "Normalize"]


def _same(made: Transform, given: Transform) -> bool:
    """Whether two transforms give the same bits, of images that are wide, high and smaller."""
    from PIL import Image

    random = np.random.default_rng(0)
    for shape in ((300, 411, 3), (411, 300, 3), (37, 50, 3)):
        image = Image.fromarray(random.integers(256, size=shape, dtype=np.uint8))
        if not torch.equal(made(image), given(image)):
            return False
    return True


@dataclass(frozen=True)
class OnRGB:
    """A transform that is given every image as :class:`ToTensor` would read it.

    Attributes:
        transform: PIL image with three channels of eight bits -> tensor.
    """

    transform: Transform

    def __call__(self, image: Any) -> Tensor:
        """What the transform makes of it."""
        return self.transform(to_rgb(image))


def augmented(model: nn.Module, transform: Transform) -> Transform:
    """How a model wants its images in training, if it has ``transform`` otherwise.

    For a :class:`ToTensor` a random part of the image, mirrored half the time, instead of its
    centre (torchvision's ``RandomResizedCrop``, after Szegedy et al., CVPR 2015).

    Raises:
        ValueError: That is neither a :class:`ToTensor` nor timm's.
        ModuleNotFoundError: torchvision is missing.
    """
    if isinstance(transform, ToTensor):
        v2 = require("torchvision.transforms.v2", "vision", "augmented: random crops")
        steps = [
            v2.RandomResizedCrop(transform.size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(transform.mean, transform.std),
        ]
        return OnRGB(v2.Compose(steps))
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError("augmented: the model has a transform of its own, which has to do that")
    data = require("timm.data", "vision", "augmented")
    wanted = data.resolve_model_data_config(model)
    return OnRGB(data.create_transform(**wanted, is_training=True))


@contextmanager
def _naming(name: str, what: str) -> Iterator[None]:
    """Whatever Pillow or a transform raises, as a ValueError that names the image."""
    try:
        yield
    except ImportError:
        raise
    except MemoryError:
        raise ValueError(f"cannot {what} the image {name}: it takes too much memory") from None
    except Exception as error:
        raise ValueError(f"cannot {what} the image {name}: {reason(error)}") from error


def _decode(source: Any, name: str, transform: Transform, skip: bool = False) -> Tensor | None:
    if skip:
        try:
            return _decode(source, name, transform)
        except ValueError:
            return None
    pillow = require("PIL.Image", "vision", "images: their reading")
    operations = require("PIL.ImageOps", "vision", "images: their reading")
    with _naming(name, "read"):
        image = pillow.open(source)
    with image:
        with _naming(name, "read"):
            image.load()
            operations.exif_transpose(image, in_place=True)
        with _naming(name, "transform"):
            return transform(image)


# --- sources ----------------------------------------------------------------------------------


class ImageFiles(Dataset[ImageSample]):
    """Images in files, by their paths. They are turned as their EXIF data say.

    Args:
        paths: The files.
        labels: Class id of each, -1 for none.
        class_names: Names of the class ids; None where they are not known.
        transform: PIL image -> tensor.

    Attributes:
        skip_bad: Whether an image that cannot be read is a sample without one, and not an error.
    """

    skip_bad = False

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.paths, self.labels = list(paths), list(labels)
        self.class_names = None if class_names is None else tuple(class_names)
        self.transform = transform or ToTensor()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageSample:
        path = self.paths[index]
        image = _decode(path, str(path), self.transform, self.skip_bad)
        return ImageSample(image, self.labels[index], str(path))

    def matched(self, class_names: Sequence[str], where: str) -> ImageFiles:
        """The same images, with labels that count ``class_names``, by the names of their folders.

        Args:
            class_names: Those of a model.
            where: What the images are of, for messages.

        Raises:
            ValueError: A folder is none of them, or the folders have no names.
        """
        if self.class_names is None:
            raise ValueError(f"{where}: images must be in a folder per class to be matched by name")
        try:
            ids = match_classes(self.class_names, class_names, where)
        except ValueError as error:
            raise ValueError(
                f"{error} (a list of files takes OOD images whatever they are)"
            ) from None
        found = copy.copy(self)
        found.labels = [label if label < 0 else ids[label] for label in self.labels]
        found.class_names = tuple(class_names)
        return found

    def digest(self) -> str:
        """Changes with the files and their labels."""
        text = "\n".join(f"{p} {y}" for p, y in zip(self.paths, self.labels, strict=True))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Shards(IterableDataset[ImageSample]):
    """Images in WebDataset shards: ``.tar`` files with ``key.jpg`` and ``key.cls``.

    Args:
        urls: The shards, with braces as in ``train-{000..099}.tar``.
        transform: PIL image -> tensor.
        shell: Whether they may be more than files: webdataset runs what follows ``pipe:`` in a
            shell, and a program of its own for ``https:``, ``s3:`` and the like.

    Raises:
        ValueError: There are none, or they are no files and ``shell`` is not given.
        ImportError: webdataset is missing.

    Attributes:
        skip_bad: As for :class:`ImageFiles`.
    """

    class_names: tuple[str, ...] | None = None
    skip_bad = False

    def __init__(self, urls: str, transform: Transform | None = None, shell: bool = False) -> None:
        self.urls, self.transform = urls, transform or ToTensor()
        self.start = 0
        expand = require("braceexpand", "vision", f"{urls}: its reading").braceexpand
        self.shards = list(itertools.islice(expand(urls), MAX_SHARDS + 1))
        if len(self.shards) > MAX_SHARDS:
            raise ValueError(f"open_images: {urls} must be at most {MAX_SHARDS} shards")
        for shard in self.shards:
            if not shell and ("::" in shard or re.match(r"\s*\w{2,}:", shard)):
                raise ValueError(
                    f"open_images: {shard[:80]!r} must be a file: what webdataset runs in a shell "
                    "has to be allowed (shell=True, --allow-shell)"
                )
            if not shell and not Path(shard).is_file():
                raise FileNotFoundError(2, "there is no such file", shard)

    def __iter__(self) -> Iterator[ImageSample]:
        library = require("webdataset", "vision", f"{self.urls}: its reading")
        # What a rank is to read is said by ``only``, and not left to webdataset.
        options = {"shardshuffle": False, "empty_check": False, "nodesplitter": iter}
        data = library.WebDataset(self.shards, **options)
        for item in itertools.islice(filter(_is_shown, self._items(data)), self.start, None):
            name = f"{item['__url__']}: {item['__key__']}"
            with _naming(name, "read"):
                image = next((v for k, v in item.items() if f".{k.lower()}" in IMAGES), None)
                if image is None:
                    raise ValueError("there is no image")
                label = int(item["cls"]) if "cls" in item else NO_LABEL
            image = _decode(io.BytesIO(image), name, self.transform, self.skip_bad)
            yield ImageSample(image, label, item["__key__"])

    def only(self, shard: int, start: int = 0) -> Shards:
        """One of the shards, from a sample of it on."""
        found = copy.copy(self)
        found.shards, found.start = [self.shards[shard]], start
        return found

    def _items(self, data: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from data
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            raise ValueError(f"cannot read the shards {self.urls}: {reason(error)}") from error

    def digest(self) -> str:
        """Changes with the shards' names."""
        return hashlib.sha256(self.urls.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _is_shown(item: dict[str, Any]) -> bool:
    return not _is_hidden(Path(item["__key__"]))


def open_images(
    source: PathLike,
    transform: Transform | None = None,
    root: PathLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
    shell: bool = False,
) -> ImageFiles | Shards:
    """Images of a folder, of a list of files, or of WebDataset shards.

    Names that begin with a dot, and ``__MACOSX``, do not count.

    Args:
        source: A folder with a folder per class, or of images without labels; a text file with
            ``path`` or ``path label`` a line, separated by spaces, a tab or a comma, where the
            label may be a Python dict with an entry "label"; or ``.tar`` files, with braces.
        transform: PIL image -> tensor; by default :class:`ToTensor`.
        root: What the paths of a list are relative to; by default the list's folder.
        class_names: Names of the classes, such as those of the training run, whose numbers the
            folders get; by default the folders' own sorted names.
        shell: As for :class:`Shards`.

    Raises:
        ValueError: There are no images; a class has none, or is not among ``class_names``; a line
            of the list is not as above.
        OSError: The folder or list cannot be read.
    """
    if re.search(r"\.tar(\.gz)?$", str(source)):
        return Shards(str(source), transform, shell)
    path = Path(source)
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise ValueError(f"open_images: {path} must be a folder or a file")
        paths, labels = _listed(path, path.parent if root is None else Path(root))
        found = ImageFiles(paths, labels, None, transform)
    else:
        found = ImageFiles(*_folder(path), transform)
    if not found.paths:
        raise ValueError(f"open_images: {path} must hold images ({', '.join(IMAGES)}), it has none")
    if class_names is not None and found.class_names is not None:
        return found.matched(class_names, str(path))
    return found


def class_folders(path: Path) -> list[str]:
    """Names of the folders of classes in a folder, sorted."""
    return sorted(e.name for e in path.iterdir() if e.is_dir() and not _is_hidden(Path(e.name)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _folder(path: Path) -> tuple[list[Path], list[int], list[str] | None]:
    classes = class_folders(path)
    if not classes:
        return (found := _images(path)), [NO_LABEL] * len(found), None
    beside = [e.name for e in path.iterdir() if e.suffix.lower() in IMAGES and e.is_file()]
    if beside := [name for name in beside if not _is_hidden(Path(name))]:
        raise ValueError(
            f"open_images: {path} must hold images or a folder per class, got both: "
            f"{min(beside)} beside {classes[0]}"
        )
    found, labels = [], []
    for label, name in enumerate(classes):
        own = _images(path / name)
        if not own:
            raise ValueError(
                f"open_images: {path / name} must hold images, as a folder of a class, it has none"
            )
        found += own
        labels += [label] * len(own)
    return found, labels, classes


def _images(path: Path) -> list[Path]:
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGES
        and not _is_hidden(file.relative_to(path))
        and file.is_file()
    )


_LINE = re.compile(r"(?P<name>.*?)(?:\s*[,\t]\s*|\s+)(?P<label>-?\d+|\{.*\})")


def _listed(path: Path, root: Path) -> tuple[list[Path], list[int]]:
    paths, labels = [], []
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    labelled: bool | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()):
            continue
        match = _LINE.fullmatch(line)
        name = match["name"] if match else line
        label = _label(match["label"], f"{path}: line {number}") if match else NO_LABEL
        if Path(name).suffix.lower() not in IMAGES and (match or not os.path.isfile(root / name)):
            raise ValueError(
                f"open_images: {path}: line {number} must be `path` or `path label`, of an image "
                f"({', '.join(IMAGES)}), got {line[:80]!r}"
            )
        if label < NO_LABEL:
            raise ValueError(f"open_images: {path}: line {number} must end in a class id")
        if labelled not in (None, bool(match)):
            raise ValueError(
                f"open_images: {path}: line {number} {'has a' if match else 'has no'} label, "
                "unlike those before it: write -1 for none"
            )
        labelled = bool(match)
        paths.append(root / name)
        labels.append(label)
    return paths, labels


def _label(text: str, where: str) -> int:
    """A class id, by itself or in a Python dict."""
    if not text.startswith("{"):
        return int(text)
    try:
        found = ast.literal_eval(text)
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        found = None
    if not isinstance(found, dict) or type(found.get("label")) is not int:
        raise ValueError(
            f"open_images: {where} must have a class id as the `label` of its dict, got "
            f"{text[:80]!r}"
        )
    label: int = found["label"]
    return label


def one_line(text: str) -> str:
    """Text without line ends, or bytes that are no text, for a file with one name a line."""
    escaped = text.replace("\\", "\\\\") if os.sep != "\\" else text
    escaped = escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
