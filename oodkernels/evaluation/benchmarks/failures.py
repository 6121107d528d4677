"""Which samples of a benchmark fail: OOD that looks like ID, ID that is lost, detectors apart."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodkernels._optional import require
from oodkernels.data import ImageFiles
from oodkernels.evaluation.benchmarks.result import BenchmarkResult
from oodkernels.evaluation.benchmarks.run import BenchmarkRun
from oodkernels.evaluation.results import plain, software, write_texts
from oodkernels.ops.roc import exact_ceil

__all__ = ["FailingSample", "FailingSamples", "failing_samples", "thumbnail"]

_SIDE = 96


@dataclass(frozen=True)
class FailingSample:
    """A sample, and what every detector makes of it.

    Attributes:
        index: Its place in the set.
        name: Its file; "" where the set's files have no names for samples.
        predicted: Name of the nearest ID class, the classifier's answer; "" where there is none.
        label: Name of its own class, of ID samples; "" where it is not known.
        shares: Detector -> share of the ID test samples with a lower score, ties counted half: 0
            is the most OOD, 1 the most ID.
        mean: Of the shares.
        spread: Their standard deviation.
        kept: How many detectors take it for ID where they keep 95 % of the ID test samples.
    """

    index: int
    name: str
    predicted: str
    label: str
    shares: Mapping[str, float]
    mean: float
    spread: float
    kept: int


@dataclass(frozen=True, eq=False)
class FailingSamples:
    """The samples of a run that fail.

    Attributes:
        name: Of the benchmark.
        model: Of the model.
        detectors: Labels.
        most_id: OOD set -> its samples of the highest mean share, first the highest.
        lost: The ID test samples of the lowest mean share, first the lowest.
        apart: Test set -> the samples on which detectors differ most.
    """

    name: str
    model: str
    detectors: Sequence[str]
    most_id: Mapping[str, Sequence[FailingSample]]
    lost: Sequence[FailingSample]
    apart: Mapping[str, Sequence[FailingSample]]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"format": "oodkernels.benchmark.samples", "version": 1, **plain(asdict(self))}

    def to_html(self, picture: Callable[[str, FailingSample], str] = lambda key, s: "") -> str:
        """A page that needs no other file; needs the extra ``cli``.

        Args:
            picture: Set and sample -> a data URI; "" for none.
        """
        from oodkernels.evaluation import report

        sections = [("ID samples that are lost", "id/test", self.lost)]
        for key, samples in self.most_id.items():
            sections.append((f"{key}: OOD samples that look most like ID", key, samples))
        for key, samples in self.apart.items():
            sections.append((f"{key}: where detectors differ most", key, samples))
        facts = {
            "title": f"{self.name}: which samples fail",
            "model": self.model,
            "detectors": self.detectors,
            "sections": sections,
            "picture": picture,
            "software": software(),
        }
        return report.render("samples.html.j2", dict, facts)

    def save(
        self,
        folder: str | Path,
        picture: Callable[[str, FailingSample], str] = lambda key, sample: "",
    ) -> list[Path]:
        """Write ``samples.json`` and ``samples.html``.

        Args:
            folder: Where to.
            picture: As for :meth:`to_html`.
        """
        writers: dict[str, Callable[[], str]] = {
            "samples.json": lambda: json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n",
            "samples.html": lambda: self.to_html(picture),
        }
        return write_texts(Path(folder), writers)


def failing_samples(run: BenchmarkRun, result: BenchmarkResult, count: int = 12) -> FailingSamples:
    """The samples that all detectors together get most wrong.

    Args:
        run: After :meth:`BenchmarkRun.score`.
        result: Of the run.
        count: How many of each kind.
    """
    inside = {label: scores.double().sort().values for label, scores in result.id_scores.items()}
    most_id, apart = {}, {}
    keys = {name: f"{result.kinds[name]}/{name}" for name in result.ood_sets}
    for name, key in keys.items():
        own = _Shares(inside, result.scores[name])
        most_id[key] = _samples(run, key, own, (-own.mean).argsort(stable=True)[:count])
        apart[key] = _samples(run, key, own, (-own.spread).argsort(stable=True)[: count // 2])
    own = _Shares(inside, result.id_scores)
    lost = _samples(run, "id/test", own, own.mean.argsort(stable=True)[:count])
    first = (-own.spread).argsort(stable=True)[: count // 2]
    apart = {"id/test": _samples(run, "id/test", own, first), **apart}
    return FailingSamples(result.name, result.model, list(inside), most_id, lost, apart)


def thumbnail(run: BenchmarkRun, key: str, sample: FailingSample) -> str:
    """A sample's image as a data URI; "" where it is no file that can be read."""
    if not isinstance(run.sets[key].data, ImageFiles) or not sample.name:
        return ""
    pillow = require("PIL.Image", "vision", "pictures of samples")
    try:
        with pillow.open(sample.name) as image:
            small = image.convert("RGB")
    except (OSError, ValueError):
        return ""
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class _Shares:
    """What share of the ID samples each sample is above, by every detector."""

    def __init__(self, inside: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        self.of: dict[str, Tensor] = {}
        kept = torch.zeros(())
        for label, ids in inside.items():
            own = scores[label].double()
            below = torch.searchsorted(ids, own) + torch.searchsorted(ids, own, right=True)
            self.of[label] = below.double() / (2 * len(ids))
            kept = kept + (own >= ids[len(ids) - exact_ceil(0.95, len(ids))])
        every = torch.stack(list(self.of.values()))
        self.mean, self.kept = every.mean(0), kept
        self.spread = every.std(0, correction=0)


def _samples(run: BenchmarkRun, key: str, own: _Shares, places: Tensor) -> list[FailingSample]:
    samples = run.samples[key]
    names = _names(run, key)
    answers = run.predictions(key)
    labels = samples.read("labels") if key == "id/test" and "labels" in samples.arrays else None
    found = []
    for i in places.tolist():
        found.append(
            FailingSample(
                index=i,
                name=names[i] if names else "",
                predicted="" if answers is None else _class(run, int(answers[i])),
                label="" if labels is None else _class(run, int(labels[i])),
                shares={label: float(of[i]) for label, of in own.of.items()},
                mean=float(own.mean[i]),
                spread=0.0 if math.isnan(float(own.spread[i])) else float(own.spread[i]),
                kept=int(own.kept[i]),
            )
        )
    return found


def _names(run: BenchmarkRun, key: str) -> list[str]:
    path = run.folder / "sets" / key.replace("/", "-") / "samples.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _class(run: BenchmarkRun, number: int) -> str:
    names = run.samples["id/test"].model_classes or run.samples["id/test"].class_names
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"
