"""Logits and penultimate features of images, extracted once, a part at a time."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from oodkernels._checks import check_count
from oodkernels._files import locked, replacing, write_text
from oodkernels._ranks import gathered, on_first, ranks
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
_PARTS, _PLAN, _SIZE = ".parts", "plan.json", "part_size"


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
    the end: killed and started again, an extraction makes the parts that are missing. Where
    ``torch.distributed`` is initialised, each rank makes its share of the parts, of files or of
    shards; the files are the same whatever the number of ranks. ``samples.txt`` has the images'
    names, ``classes.txt`` those of the classes where they are known, ``skipped.txt`` those that
    could not be read, where ``images.skip_bad`` allows that; labels are left out where there are
    none.

    Args:
        model: In evaluation mode, x -> logits.
        images: What to extract from.
        folder: Made where missing.
        plan: The settings; ``plan.layer`` is the layer whose output are the features, None for the
            input of the classifier.
        file_format: "safetensors" for one file ``samples.safetensors``, "npy" for one an array.
        batch_size: Images sent through the model at once.
        part_size: Images in a part, rounded up to whole batches.
        workers: Processes that read images.
        device: Where the model runs.
        on_batch: Told the number of images done, of all ranks about.

    Returns:
        The files written.

    Raises:
        ValueError: The folder holds an extraction under other settings, an image cannot be read,
            there are none, or the model has no such layer.
        OSError: A file cannot be written.
        OtherRankError: The first rank could not begin or finish.
    """
    batch_size = check_count("extract_images", "batch_size", batch_size)
    part_size = check_count("extract_images", "part_size", part_size)
    workers = check_count("extract_images", "workers", workers, least=0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as lock:
        on_first(lambda: lock.enter_context(locked(folder, "extract_images")) or True)
        if not on_first(lambda: is_extracted(folder, plan, file_format)):
            rows = -(-part_size // batch_size) * batch_size
            parts = _Parts(folder / _PARTS, images, rows)
            on_first(lambda: parts.begin(_settings(plan, file_format)))
            _extract_parts(model.to(device), parts, plan, batch_size, workers, on_batch)
            gathered(None)  # all parts are there
            on_first(lambda: parts.finish(folder, plan, file_format))
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
    image: Tensor | None
    label: list[int]
    name: list[str]
    bad: list[str]


def _collate(samples: Sequence[ImageSample]) -> _ImageBatch:
    bad = [sample.name for sample in samples if sample.image is None]
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in good if sample.image is not None]
    return _ImageBatch(
        torch.stack(images) if images else None,
        [sample.label for sample in good],
        [sample.name for sample in good],
        bad,
    )


def _extract_parts(
    model: nn.Module,
    parts: _Parts,
    plan: ExtractionPlan,
    batch_size: int,
    workers: int,
    on_batch: Callable[[int], None],
) -> None:
    """The parts that are not there yet, of which each rank makes its share."""
    done, (_, world) = parts.done, ranks()
    on_batch(done)
    for start, batches in parts.missing(batch_size, workers):
        part = _Part(start)
        for batch in batches:
            part.add(batch, _outputs(model, batch, plan))
            done += world * (len(batch.name) + len(batch.bad))  # as much as all ranks, about
            on_batch(min(done, parts.total or done))
            if part.size >= parts.rows:
                parts.save(part)
                part = part.next()
        parts.save(part)


def _outputs(model: nn.Module, batch: _ImageBatch, plan: ExtractionPlan) -> dict[str, Tensor]:
    """Arrays of a batch by name; none where no image of it can be read."""
    if batch.image is None:
        return {}
    wrapped = FeatureModel(model, plan.layer, plan.axis)
    dtype: torch.dtype = getattr(torch, plan.dtype)
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
    return {**rows, "labels": torch.tensor(batch.label)}


# --- the files --------------------------------------------------------------------------------


class _Part:
    """Rows of consecutive images, on their way to a file.

    Args:
        key: Number of the unit of work, and of the part in it.
    """

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key
        self.rows: list[dict[str, Tensor]] = []
        self.names: list[str] = []
        self.bad: list[str] = []

    @property
    def size(self) -> int:
        """Images, those that cannot be read among them."""
        return len(self.names) + len(self.bad)

    def add(self, batch: _ImageBatch, rows: dict[str, Tensor]) -> None:
        """Take a batch."""
        if rows:
            self.rows.append(rows)
        self.names += batch.name
        self.bad += batch.bad

    def next(self) -> _Part:
        """The one after it, empty."""
        return _Part((self.key[0], self.key[1] + 1))


class _Parts:
    """The parts of an extraction in a folder; each counts when it is complete.

    The units of work are ranges of files, of a part each, or shards; rank r of n has every n-th
    from r on. Which rank makes a part does not show in it.

    Args:
        folder: Where they are.
        images: What they are of.
        rows: Images in a part, but for the last one of its unit.
    """

    def __init__(self, folder: Path, images: ImageFiles | Shards, rows: int) -> None:
        self.folder, self.images, self.rows = folder, images, rows
        self.total = None if isinstance(images, Shards) else len(images)

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder.parent / RECORD).unlink(missing_ok=True)  # of what is done again
        size = self.folder / _SIZE
        found = size.read_text(encoding="utf-8").strip() if size.exists() else str(self.rows)
        if found != str(self.rows):
            raise ValueError(
                f"{self.folder} holds parts of {found} images: give --part-size {found}, got "
                f"{self.rows} in whole batches; or remove {self.folder} to start again"
            )
        write_text(size, f"{self.rows}\n")
        write_text(self.folder / _PLAN, json.dumps(settings, indent=2) + "\n")

    @property
    def done(self) -> int:
        """Images that the parts hold."""
        return sum(len(_names(path)) + len(_bad(path)) for path in self.paths)

    @property
    def paths(self) -> list[Path]:
        """Those that are there, in order."""
        return sorted(self.folder.glob("part-*.safetensors"))

    def missing(
        self, batch_size: int, workers: int
    ) -> Iterator[tuple[tuple[int, int], Iterable[_ImageBatch]]]:
        """Where this rank's missing parts start, and the batches from there on."""
        rank, world = ranks()
        options: dict[str, Any] = {"collate_fn": _collate}
        if isinstance(self.images, Shards):
            for shard in range(rank, len(self.images.shards), world):
                block = 0
                while self._path((shard, block)).exists():
                    block += 1
                rest = self.images.only(shard, block * self.rows)
                # One process: workers would each read every shard.
                yield (shard, block), DataLoader(rest, batch_size, **options)
            return
        units: dict[int, list[list[int]]] = {}
        for unit, start in enumerate(range(0, len(self.images), self.rows)):
            if unit % world == rank and not self._path((unit, 0)).exists():
                end = min(start + self.rows, len(self.images))
                starts = range(start, end, batch_size)
                units[unit] = [list(range(i, min(i + batch_size, end))) for i in starts]
        sampler = list(itertools.chain.from_iterable(units.values()))
        loader = DataLoader(self.images, batch_sampler=sampler, num_workers=workers, **options)
        batches = iter(loader)
        for unit, own in units.items():
            yield (unit, 0), itertools.islice(batches, len(own))

    def save(self, part: _Part) -> None:
        """Write a part, names first, as it counts when its tensors are there."""
        if not part.size:
            return
        path = self._path(part.key)
        write_text(path.with_suffix(".txt"), _lines(part.names))
        if part.bad:
            write_text(path.with_suffix(".bad"), _lines(part.bad))
        tensors = {
            key: torch.cat([row[key] for row in part.rows]) for key in (part.rows or [{}])[0]
        }
        with replacing(path) as temporary:
            safetensors.write(temporary, tensors)

    def finish(self, folder: Path, plan: ExtractionPlan, file_format: str) -> None:
        """Put them together, and remove them."""
        held = self.done
        if self.total is not None and held != self.total:
            raise ValueError(
                f"{self.folder} holds {held} of {self.total} images: all processes must share it"
            )
        full = [path for path in self.paths if _names(path)]
        if not full:
            unread = f", {held} that cannot be read" if held else ""
            raise ValueError(f"{plan.data} holds no images{unread}")
        bad = [name for path in self.paths for name in _bad(path)]
        _put_together(folder, full, bad, self.images.class_names, plan, file_format)
        shutil.rmtree(self.folder)

    def _path(self, key: tuple[int, int]) -> Path:
        block = f"-{key[1]:06d}" if isinstance(self.images, Shards) else ""
        return self.folder / f"part-{key[0]:06d}{block}.safetensors"


def _lines(names: Iterable[str]) -> str:
    return "".join(f"{one_line(name)}\n" for name in names)


def _names(part: Path) -> list[str]:
    return part.with_suffix(".txt").read_text(encoding="utf-8").splitlines()


def _bad(part: Path) -> list[str]:
    path = part.with_suffix(".bad")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _put_together(
    folder: Path,
    parts: Sequence[Path],
    bad: Sequence[str],
    class_names: Sequence[str] | None,
    plan: ExtractionPlan,
    file_format: str,
) -> None:
    texts = (part.with_suffix(".txt").read_text(encoding="utf-8") for part in parts)
    write_text(folder / "samples.txt", "".join(texts))
    files = ["samples.txt"]
    if bad:
        write_text(folder / "skipped.txt", "".join(f"{name}\n" for name in bad))
        files.append("skipped.txt")
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
    record = {**_settings(plan, file_format), **meaning, "skipped": len(bad), "files": sizes}
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
