"""Logits and penultimate features of images, extracted once, a part at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from oodkernels._checks import check_count
from oodkernels._files import locked, replacing, write_text
from oodkernels.data.arrays import PathLike
from oodkernels.data.formats import npy, safetensors
from oodkernels.data.images import NO_LABEL, ImageFiles, ImageSample, Shards, one_line
from oodkernels.data.samples import METADATA, RECORD, open_samples
from oodkernels.detectors import FeatureModel
from oodkernels.detectors.model import run, to_model

__all__ = ["EXTRACT_FORMATS", "ExtractionPlan", "extract_images", "is_extracted"]

EXTRACT_FORMATS = {
    "safetensors": ("float16", "bfloat16", "float32", "float64"),
    "npy": ("float16", "float32", "float64"),
}
"""What is written, one ``samples.safetensors`` or a ``.npy`` for each array, and its types."""
_PARTS, _PLAN = ".parts", "plan.json"


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction depends on: one that is interrupted goes on only under the same."""

    model: str
    weights: str | None
    layer: str | None
    data: str
    transform: str
    dtype: str
    model_classes: Sequence[str] | None = None
    """Names of the model's classes by class id; None where they are not known."""
    absent_column: int | None = None
    """Column of the model's absent class, if it has one."""
    groups: str | None = None
    """Groups of a MOS model, as :meth:`oodkernels.Groups.to_json` writes them."""
    axis: int | None = None
    """Axis of the features of ``layer``, as :class:`oodkernels.detectors.FeatureModel` has it."""


def extract_images(
    model: nn.Module,
    images: ImageFiles | Shards,
    folder: PathLike,
    plan: ExtractionPlan,
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
    batch_size = check_count("extract_images", "batch_size", batch_size)
    part_size = check_count("extract_images", "part_size", part_size)
    workers = check_count("extract_images", "workers", workers, least=0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "extract_images"):
        if not is_extracted(folder, plan, file_format):
            parts = _Parts(folder / _PARTS, _settings(plan, file_format))
            on_batch(parts.done)
            loader = _loader(images, parts.done, batch_size, workers)
            for rows, names in _outputs(model.to(device), loader, plan):
                parts.add(rows, names)
                if parts.waiting >= part_size:
                    parts.save()
                on_batch(parts.done)
            parts.save()
            if not parts.paths:
                raise ValueError(f"{plan.data} holds no images")
            _put_together(folder, parts.paths, images.class_names, plan, file_format)
            shutil.rmtree(folder / _PARTS)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return [folder / name for name in record["files"]]


def is_extracted(folder: PathLike, plan: ExtractionPlan, file_format: str) -> bool:
    """Whether a folder holds all of an extraction; not so if a file of it is gone or was changed.

    Raises:
        ValueError: It holds one, or a part of one, under other settings.
    """
    settings = _settings(plan, file_format)
    for path, what in ((Path(folder, RECORD), "an"), (Path(folder, _PARTS, _PLAN), "a part of an")):
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key, value in settings.items() if found.get(key) != value]
            files = dict(found.get("files") or {})
        except (AttributeError, RecursionError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged: remove it to start again") from None
        if differing:
            raise ValueError(
                f"{folder} holds {what} extraction under other settings ("
                + ", ".join(f"{key} {found.get(key)!r:.60}" for key in differing)
                + f"): choose another folder, or remove {path}"
            )
        if path.name == RECORD and all(
            Path(folder, name).is_file() and Path(folder, name).stat().st_size == size
            for name, size in files.items()
        ):
            return bool(files)
    return False


def _settings(plan: ExtractionPlan, file_format: str) -> dict[str, Any]:
    types = EXTRACT_FORMATS.get(file_format)
    if types is None:
        raise ValueError(
            f"extract_images: file_format must be {' or '.join(EXTRACT_FORMATS)}, got "
            f"{file_format!r}"
        )
    if plan.dtype not in types:
        raise ValueError(
            f"extract_images: dtype must be {', '.join(types)} for {file_format}, got "
            f"{plan.dtype!r}"
        )
    settings: dict[str, Any] = json.loads(json.dumps({**asdict(plan), "format": file_format}))
    return settings


# --- the model --------------------------------------------------------------------------------


class _ImageBatch(NamedTuple):
    image: Tensor
    label: list[int]
    name: list[str]


def _collate(samples: Sequence[ImageSample]) -> _ImageBatch:
    images, labels, names = zip(*samples, strict=True)
    return _ImageBatch(torch.stack(images), list(labels), list(names))


def _loader(
    images: ImageFiles | Shards, start: int, batch_size: int, workers: int
) -> Iterable[_ImageBatch]:
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": _collate}
    if isinstance(images, Shards):
        images.start = start  # one process: workers would each read every shard
        return DataLoader(images, **options)
    return DataLoader(images, sampler=range(start, len(images)), num_workers=workers, **options)


def _outputs(
    model: nn.Module, loader: Iterable[_ImageBatch], plan: ExtractionPlan
) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Arrays of a batch by name, and its images' names."""
    wrapped = FeatureModel(model, plan.layer, plan.axis)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    for batch in loader:
        with torch.no_grad():
            found = run(wrapped, to_model(wrapped, batch.image))
        if found.features is None:
            raise ValueError("the model has no linear layer to read features from: give a layer")
        made = {"logits": found.logits, "features": found.features}
        if found.confidence is not None:
            made["confidence_logit"] = found.confidence.reshape(len(batch.name))
        rows = {}
        for name, tensor in made.items():
            rows[name] = tensor.to("cpu", dtype)
            lost = rows[name].isinf() & tensor.cpu().isfinite()
            if bool(lost.any()):
                row = int(lost.nonzero()[0, 0])
                most = float(tensor[row].abs().max())
                raise ValueError(
                    f"{name} of {batch.name[row]} reach {most:.6g}, which {plan.dtype} cannot "
                    "hold: give --dtype bfloat16 or float32"
                )
        yield {**rows, "labels": torch.tensor(batch.label)}, batch.name


# --- the files --------------------------------------------------------------------------------


class _Parts:
    """The parts of an extraction in a folder; each counts when it is complete."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / RECORD).unlink(missing_ok=True)  # of what is done again
        write_text(folder / _PLAN, json.dumps(settings, indent=2) + "\n")
        self.paths = sorted(folder.glob("part-*.safetensors"))
        for number, part in enumerate(self.paths):
            if part != self._path(number):
                raise ValueError(f"{folder} lacks part {number}: remove {folder} to start again")
        self.done = sum(open_samples(part).num_samples or 0 for part in self.paths)
        self._rows: list[dict[str, Tensor]] = []
        self._names: list[str] = []

    @property
    def waiting(self) -> int:
        """Images that are not on disk yet."""
        return len(self._names)

    def add(self, rows: dict[str, Tensor], names: Sequence[str]) -> None:
        """Take a batch."""
        self._rows.append(rows)
        self._names += names
        self.done += len(names)

    def save(self) -> None:
        """Make a part of what is waiting; names first, as it counts when its tensors are there."""
        if not self._names:
            return
        path = self._path(len(self.paths))
        write_text(path.with_suffix(".txt"), _lines(self._names))
        tensors = {key: torch.cat([row[key] for row in self._rows]) for key in self._rows[0]}
        with replacing(path) as temporary:
            safetensors.write(temporary, tensors)
        self.paths.append(path)
        self._rows, self._names = [], []

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"


def _lines(names: Iterable[str]) -> str:
    return "".join(f"{one_line(name)}\n" for name in names)


def _put_together(
    folder: Path,
    parts: Sequence[Path],
    class_names: Sequence[str] | None,
    plan: ExtractionPlan,
    file_format: str,
) -> None:
    texts = (part.with_suffix(".txt").read_text(encoding="utf-8") for part in parts)
    write_text(folder / "samples.txt", "".join(texts))
    files = ["samples.txt"]
    if class_names:
        write_text(folder / "classes.txt", _lines(class_names))
        files.append("classes.txt")
    opened = [open_samples(part) for part in parts]
    roles = list(opened[0].arrays)
    if all(bool((s.read("labels") == NO_LABEL).all()) for s in opened):
        roles.remove("labels")
    rows = sum(s.num_samples or 0 for s in opened)

    def chunks(name: str) -> Iterator[Tensor]:
        for samples in opened:
            for batch in samples.only(stored[name]).batches():
                yield batch[stored[name]]

    stored = {opened[0][role].name: role for role in roles}
    shapes = {
        name: (rows, *(n or 0 for n in opened[0][role].shape[1:])) for name, role in stored.items()
    }
    types = {name: opened[0][role].dtype for name, role in stored.items()}
    meaning = {
        "class_names": None if class_names is None else list(class_names),
        "model_classes": None if plan.model_classes is None else list(plan.model_classes),
        "absent_column": plan.absent_column,
        "groups": plan.groups,
    }
    if file_format == "npy":
        for name in stored:
            with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
                npy.write_header(file, shapes[name], types[name])
                for chunk in chunks(name):
                    chunk.numpy().tofile(file)
            files.append(f"{name}.npy")
    else:
        with (
            replacing(folder / "samples.safetensors") as temporary,
            temporary.open("wb") as file,
        ):
            metadata = {METADATA: json.dumps(meaning)}
            safetensors.write_chunks(file, shapes, types, chunks, metadata)
        files.append("samples.safetensors")
    sizes = {name: (folder / name).stat().st_size for name in sorted(files)}
    record = {**_settings(plan, file_format), **meaning, "files": sizes}
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
