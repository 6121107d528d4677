"""Logits and penultimate features of images, extracted once, a part at a time.

Needs the extra ``vision`` (timm for models by name, webdataset for shards).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from oodkernels._files import replacing, write_text
from oodkernels.data.samples import open_samples
from oodkernels.detectors import FeatureModel
from oodkernels.detectors.model import run, to_model

PathLike: TypeAlias = str | os.PathLike[str]
Transform: TypeAlias = Callable[[Any], Tensor]

__all__ = [
    "ImageFiles",
    "Plan",
    "RandomCrop",
    "Shards",
    "ToTensor",
    "augmented",
    "extract_images",
    "is_extracted",
    "load_model",
    "open_images",
]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
NO_LABEL = -1
_PARTS, _PLAN, _DONE = ".parts", "plan.json", "extract.json"


class Sample(NamedTuple):
    """An image on its way to the model."""

    image: Tensor
    label: int
    name: str


# --- images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToTensor:
    """A PIL image to a normalised tensor (3, size, size), as ImageNet classifiers want it.

    The shorter side is resized to ``size / crop`` with a bicubic filter, the centre cut out.

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
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return self._normalised(image)

    def _normalised(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
        normal = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normal.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class RandomCrop(ToTensor):
    """A random part of the image, mirrored half the time, instead of its centre: for training.

    Its share of the area and its ratio of sides are uniform, the latter on a logarithmic scale
    (Szegedy et al., Going Deeper with Convolutions, CVPR 2015). Random numbers are torch's.

    Attributes:
        scale: Least and largest share of the area.
        ratio: Least and largest ratio of width to height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Any) -> Tensor:
        """(3, size, size) float32."""
        from PIL import Image

        image = image.convert("RGB")
        area = image.width * image.height * _uniform(*self.scale)
        root = math.exp(_uniform(*map(math.log, self.ratio)) / 2)
        width = max(1, min(image.width, round(math.sqrt(area) * root)))
        height = max(1, min(image.height, round(math.sqrt(area) / root)))
        left, top = _uniform(0, image.width - width), _uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        if _uniform(0, 1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normalised(image)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


class ImageFiles(Dataset[Sample]):
    """Images in files, by their paths.

    Args:
        paths: The files.
        labels: Class id of each, -1 for none.
        classes: Names of the classes, if known.
        transform: PIL image -> tensor.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str] = (),
        transform: Transform | None = None,
    ) -> None:
        self.paths, self.labels, self.classes = list(paths), list(labels), list(classes)
        self.transform = transform or ToTensor()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        with _naming(str(path)):
            return Sample(_decode(path, self.transform), self.labels[index], str(path))

    def digest(self) -> str:
        """Changes with the files and their labels."""
        text = "\n".join(f"{p} {y}" for p, y in zip(self.paths, self.labels, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Shards(IterableDataset[Sample]):
    """Images in WebDataset shards: ``.tar`` files with ``key.jpg`` and ``key.cls``.

    Args:
        urls: The shards, with braces as in ``train-{000..099}.tar``.
        transform: PIL image -> tensor.
    """

    classes: Sequence[str] = ()

    def __init__(self, urls: str, transform: Transform | None = None) -> None:
        self.urls, self.transform = urls, transform or ToTensor()
        self.start = 0

    def __iter__(self) -> Iterator[Sample]:
        try:
            import webdataset
        except ImportError as error:
            raise ImportError(
                f"{self.urls} needs webdataset, which could not be imported ({error}): "
                "pip install 'oodkernels[vision]'"
            ) from error
        data = webdataset.WebDataset(self.urls, shardshuffle=False, empty_check=False)
        for item in itertools.islice(data, self.start, None):
            name = f"{item['__url__']}: {item['__key__']}"
            with _naming(name):
                image = next((v for k, v in item.items() if f".{k.lower()}" in IMAGES), None)
                if image is None:
                    raise ValueError("there is no image")
                label = int(item["cls"]) if "cls" in item else NO_LABEL
                yield Sample(_decode(io.BytesIO(image), self.transform), label, item["__key__"])

    def digest(self) -> str:
        """Changes with the shards' names."""
        return hashlib.sha256(self.urls.encode()).hexdigest()[:16]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of reading an image as a ValueError that names it."""
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the image {name}: {error}") from None


def _decode(source: Any, transform: Transform) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"images need Pillow, which could not be imported ({error}): "
            "pip install 'oodkernels[vision]'"
        ) from error
    with Image.open(source) as image:
        return transform(image)


def open_images(
    source: PathLike, transform: Transform | None = None, root: PathLike | None = None
) -> ImageFiles | Shards:
    """Images of a folder, of a list of files, or of WebDataset shards.

    Args:
        source: A folder with a folder per class, whose sorted names give the class ids, or of
            images without labels; a text file with ``path`` or ``path label`` a line; or ``.tar``
            files, with braces.
        transform: PIL image -> tensor; by default :class:`ToTensor`.
        root: What the paths of a list are relative to; by default the list's folder.

    Raises:
        ValueError: There are no images, or a line of the list is not as above.
        OSError: The folder or list cannot be read.
    """
    if re.search(r"\.tar(\.gz)?$", str(source)):
        return Shards(str(source), transform)
    path = Path(source)
    if path.is_dir():
        paths, labels, classes = _folder(path)
    else:
        paths, labels = _listed(path, path.parent if root is None else Path(root))
        classes = []
    if not paths:
        raise ValueError(f"open_images: {path} must hold images ({', '.join(IMAGES)}), it has none")
    return ImageFiles(paths, labels, classes, transform)


def _folder(path: Path) -> tuple[list[Path], list[int], list[str]]:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not classes:
        return (found := _images(path)), [NO_LABEL] * len(found), []
    found, labels = [], []
    for label, name in enumerate(classes):
        own = _images(path / name)
        found += own
        labels += [label] * len(own)
    return found, labels, classes


def _images(path: Path) -> list[Path]:
    return sorted(
        file for file in path.rglob("*") if file.suffix.lower() in IMAGES and file.is_file()
    )


def _listed(path: Path, root: Path) -> tuple[list[Path], list[int]]:
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"-?\d+", label):
            name, label = line.strip(), str(NO_LABEL)
        if int(label) < NO_LABEL:
            raise ValueError(f"open_images: {path}: line {number} must end in a class id")
        paths.append(root / name)
        labels.append(int(label))
    return paths, labels


# --- models -----------------------------------------------------------------------------------


def load_model(
    spec: str, weights: PathLike | None = None, columns: int | None = None
) -> tuple[nn.Module, Transform | None]:
    """A model in evaluation mode, and how it wants its images.

    Args:
        spec: A model of timm, with its pretrained weights; or ``package.module:callable`` without
            arguments, which gives an ``nn.Module`` or a pair of it and a transform from PIL image
            to tensor. The working directory counts as a place to import from.
        weights: A state dict, ``.pt`` or ``.safetensors``, to load instead.
        columns: Of the logits, for a model of timm; None for those it was trained with.

    Returns:
        The model; the transform, None where it has none of its own.

    Raises:
        ValueError: There is no such callable or model, or the weights do not fit.
        TypeError: The callable gives something else.
        ImportError: A package is missing.
    """
    transform: Transform | None = None
    if ":" in spec:
        made = _callable(spec)()
        if isinstance(made, tuple) and len(made) == 2:
            made, transform = made
        if not isinstance(made, nn.Module):
            raise TypeError(f"load_model: {spec} must give an nn.Module, got {type(made).__name__}")
        model = made
    else:
        try:
            import timm
            import timm.data
        except ImportError as error:
            raise ImportError(
                f"load_model: {spec!r} needs timm, which could not be imported ({error}): "
                "pip install 'oodkernels[vision]'; or give package.module:callable"
            ) from error
        if not timm.is_model(spec.removeprefix("hf-hub:").partition(".")[0]) and not (
            spec.startswith("hf-hub:")
        ):
            raise ValueError(f"load_model: timm has no model {spec!r}")
        sized = {} if columns is None else {"num_classes": columns}
        model = timm.create_model(spec, pretrained=weights is None, **sized)
        wanted = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**wanted, is_training=False)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model.eval(), transform


def augmented(model: nn.Module, transform: Transform) -> Transform:
    """How a model wants its images in training, if it has ``transform`` otherwise.

    Raises:
        ValueError: That is neither a :class:`ToTensor` nor timm's.
    """
    if isinstance(transform, ToTensor):
        return RandomCrop(transform.size, transform.crop, transform.mean, transform.std)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError("augmented: the model has a transform of its own, which has to do that")
    import timm.data

    wanted = timm.data.resolve_model_data_config(model)
    made: Transform = timm.data.create_transform(**wanted, is_training=True)
    return made


def _callable(spec: str) -> Callable[[], Any]:
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"load_model: there is no module {module!r}") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"load_model: {module} has no callable {name!r}")
    return found


def _load_weights(model: nn.Module, path: Path) -> None:
    state: Any
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"load_model: {path} does not fit the model: {error}") from None


# --- extracting -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an extraction depends on: one that is interrupted goes on only under the same."""

    model: str
    weights: str | None
    layer: str | None
    data: str
    transform: str
    dtype: str


def extract_images(
    model: nn.Module,
    images: ImageFiles | Shards,
    folder: PathLike,
    plan: Plan,
    *,
    file_format: str = "safetensors",
    batch_size: int = 64,
    part_size: int = 8192,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Logits (N, C), features (N, d) and labels (N,) of images, into a folder.

    They are written in parts, each under its name only when it is complete, and put together at
    the end: killed and started again, an extraction goes on after the last part. ``samples.txt``
    has the images' names, ``classes.txt`` those of the classes where they are known; labels are
    left out where there are none.

    Args:
        model: In evaluation mode, x -> logits.
        images: What to extract from.
        folder: Made where missing.
        plan: The settings; ``plan.layer`` is the layer whose output are the features, None for the
            input of the classifier.
        file_format: "safetensors" for one file ``samples.safetensors``, "npy" for one an array.
        batch_size: Images sent through the model at once.
        part_size: Images in a part.
        workers: Processes that read images.
        device: Where the model runs.
        on_batch: Told the number of images done.

    Returns:
        The files written.

    Raises:
        ValueError: The folder holds an extraction under other settings, an image cannot be read,
            there are none, or the model has no such layer.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    parts_folder = folder / _PARTS
    if is_extracted(folder, plan, file_format):
        return _outputs(folder)
    parts_folder.mkdir(parents=True, exist_ok=True)
    record = _record(plan, file_format)
    write_text(parts_folder / _PLAN, record)
    parts = _complete(parts_folder)
    done = sum(_rows(part) for part in parts)
    on_batch(done)

    wrapped = FeatureModel(model.to(device), plan.layer)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    buffer: list[dict[str, Tensor]] = []
    names: list[str] = []
    for batch in _loader(images, done, batch_size, workers):
        with torch.no_grad():
            found = run(wrapped, to_model(wrapped, batch.image))
        if found.features is None:
            raise ValueError("the model has no linear layer to read features from: give a layer")
        made = {"logits": found.logits, "features": found.features}
        rows = {name: tensor.to("cpu", dtype) for name, tensor in made.items()}
        buffer.append({**rows, "labels": torch.tensor(batch.label)})
        names += batch.name
        done += len(batch.name)
        if len(names) >= part_size:
            parts.append(_save_part(parts_folder, len(parts), buffer, names))
            buffer, names = [], []
        on_batch(done)
    if names:
        parts.append(_save_part(parts_folder, len(parts), buffer, names))
    if not parts:
        raise ValueError(f"{plan.data} holds no images")
    _put_together(folder, parts, images.classes, file_format)
    write_text(folder / _DONE, record)
    shutil.rmtree(parts_folder)
    return _outputs(folder)


def is_extracted(folder: PathLike, plan: Plan, file_format: str) -> bool:
    """Whether a folder holds all of an extraction.

    Raises:
        ValueError: It holds one, or a part of one, under other settings.
    """
    record = _record(plan, file_format)
    for path, what in ((Path(folder, _DONE), "an"), (Path(folder, _PARTS, _PLAN), "a part of an")):
        if path.exists():
            if path.read_text(encoding="utf-8") != record:
                raise ValueError(
                    f"{folder} holds {what} extraction under other settings: choose another "
                    f"folder, or remove {path}"
                )
            return path.name == _DONE
    return False


def _record(plan: Plan, file_format: str) -> str:
    return json.dumps({**asdict(plan), "format": file_format}, indent=2) + "\n"


class _Batch(NamedTuple):
    image: Tensor
    label: list[int]
    name: list[str]


def _collate(samples: Sequence[Sample]) -> _Batch:
    images, labels, names = zip(*samples, strict=True)
    return _Batch(torch.stack(images), list(labels), list(names))


def _loader(
    images: ImageFiles | Shards, start: int, batch_size: int, workers: int
) -> Iterable[_Batch]:
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": _collate}
    if isinstance(images, Shards):
        images.start = start  # one process: workers would each read every shard
        return DataLoader(images, **options)
    return DataLoader(images, sampler=range(start, len(images)), num_workers=workers, **options)


def _save_part(
    folder: Path, number: int, rows: Sequence[dict[str, Tensor]], names: Sequence[str]
) -> Path:
    """The names first: a part counts when its tensors are there."""
    from safetensors.torch import save_file

    path = folder / f"part-{number:06d}.safetensors"
    write_text(path.with_suffix(".txt"), "".join(f"{name}\n" for name in names))
    tensors = {key: torch.cat([row[key] for row in rows]).contiguous() for key in rows[0]}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return path


def _complete(folder: Path) -> list[Path]:
    """The parts that are there, without a gap."""
    parts = sorted(folder.glob("part-*.safetensors"))
    for number, part in enumerate(parts):
        if part.name != f"part-{number:06d}.safetensors":
            raise ValueError(f"{folder} lacks part {number}: remove {folder} to start again")
    return parts


def _rows(part: Path) -> int:
    rows = open_samples(part).num_samples
    assert rows is not None
    return rows


def _outputs(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".npy", ".safetensors", ".txt") and not path.name.startswith(".")
    )


def _put_together(
    folder: Path, parts: Sequence[Path], classes: Sequence[str], file_format: str
) -> None:
    texts = (part.with_suffix(".txt").read_text(encoding="utf-8") for part in parts)
    write_text(folder / "samples.txt", "".join(texts))
    if classes:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes))
    opened = [open_samples(part) for part in parts]
    roles = list(opened[0].arrays)
    if all(bool((s.read("labels") == NO_LABEL).all()) for s in opened):
        roles.remove("labels")
    rows = sum(s.num_samples or 0 for s in opened)

    def chunks(role: str) -> Iterator[Tensor]:
        for samples in opened:
            for batch in samples.only(role).batches():
                yield batch[role]

    shapes = {role: (rows, *(n or 0 for n in opened[0][role].shape[1:])) for role in roles}
    types = {role: opened[0][role].dtype for role in roles}
    if file_format == "npy":
        for role in roles:
            with replacing(folder / f"{role}.npy") as temporary, temporary.open("wb") as file:
                dtype = torch.empty(0, dtype=types[role]).numpy().dtype
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shapes[role],
                }
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in chunks(role):
                    chunk.numpy().tofile(file)
        return
    with (
        replacing(folder / "samples.safetensors") as temporary,
        temporary.open("wb") as file,
    ):
        _write_safetensors(file, shapes, types, chunks)


_SAFETENSORS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


def _write_safetensors(
    file: Any,
    shapes: dict[str, tuple[int, ...]],
    types: dict[str, torch.dtype],
    chunks: Callable[[str], Iterator[Tensor]],
) -> None:
    """The format by hand, because the library writes from tensors that are all in memory."""
    header: dict[str, Any] = {}
    end = 0
    for role, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * types[role].itemsize
        header[role] = {
            "dtype": _SAFETENSORS[types[role]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for role in shapes:
        for chunk in chunks(role):
            file.write(chunk.contiguous().view(torch.uint8).numpy().data)
