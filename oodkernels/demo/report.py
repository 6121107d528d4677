"""The demo's results on disk: a CSV table, a JSON record and an HTML report."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from oodkernels.demo.methods import DETECTOR_OPTIONS, FLAT, METHODS, TAXONOMY
from oodkernels.demo.study import StudyResult
from oodkernels.evaluation import Evaluation, plain, report, software, write_texts
from oodkernels.evaluation.tables import AVERAGE, Line, Row, lines
from oodkernels.metrics.plots import as_label

__all__ = ["averages", "kinds", "to_html", "to_json", "write_report"]

_PACKAGES = ("scikit-learn", "scikit-image", "matplotlib")
POST_HOC, ALONE, OUTLIERS = "the flat head", "characters alone", "characters and outliers"
_SHOWN = ("msp", "energy", "mahalanobis", "knn")
_CONFUSED, _EXAMPLES = 6, 8


def write_report(result: StudyResult, out: Path) -> list[Path]:
    """Write ``results.csv``, ``results.json`` and ``report.html`` into the folder ``out``.

    Each file appears under its name only when it is complete, and the same result gives the same
    bytes. The folder is made where it is missing.

    Returns:
        The three paths, in that order.

    Raises:
        OSError: The folder or a file cannot be written.
    """
    writers: dict[str, Callable[[], str]] = {
        "results.csv": result.evaluation.to_csv,
        "results.json": partial(to_json, result),
        "report.html": partial(to_html, result),
    }
    return write_texts(out, writers)


def to_json(result: StudyResult) -> str:
    """The results with what is needed to read and repeat them: conventions, settings, versions."""
    settings = asdict(result.settings)
    del settings["jobs"]
    record = {
        **result.evaluation.as_dict(),
        "format": "oodkernels.demo",
        "settings": settings,
        "methods": {
            name: {
                "what": METHODS[name].what,
                "trained on": kind_of(name),
                "setting": dict(choice.setting),
                "tried": choice.tried,
                "chosen score": best_score(result, name),
                "validation AUROC": result.validation[name],
            }
            for name, choice in result.choices.items()
        },
        "detector options": DETECTOR_OPTIONS,
        "data": result.data.record | {"test": sizes(result)},
        "curve": {name: plain(asdict(sweep)) for name, sweep in result.curve.items()},
        "claims": {name: claims(result, name) for name in grouped(result)},
        "software": software(*_PACKAGES),
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def to_html(result: StudyResult) -> str:
    """The demo's report: that of the evaluation, with methods, images and settings."""
    data = result.data
    sheets = {"training": data.train, "test": data.test, **data.ood}
    sheets |= {"validation, OOD": data.validation_ood, "outliers": data.outliers}
    return result.evaluation.to_html(
        "Which characters are none of these thousand?",
        "demo.html.j2",
        partial(_figures, result),
        result=result,
        shown_methods=_selected(result),
        lines_of={kind: _sorted(result.evaluation, kind) for kind in kinds(result.evaluation)},
        chosen={name: best_score(result, name) for name in result.choices},
        methods={name: METHODS[name] for name in result.choices},
        detector_options=DETECTOR_OPTIONS,
        confused=[
            (name, confusions(result, name)) for name in (FLAT, TAXONOMY) if name in result.choices
        ],
        samples={n: (_sheet(s.images), f"{len(s.images)} images") for n, s in sheets.items()},
        software=software(*_PACKAGES),
    )


# --- what is told of the results -------------------------------------------------------------


def kind_of(model: str) -> str:
    """What a model was trained on."""
    return OUTLIERS if METHODS[model].outliers else POST_HOC if model == FLAT else ALONE


def kinds(evaluation: Evaluation) -> dict[str, list[str]]:
    """What was trained on -> names of the models, which are best compared with each other."""
    found: dict[str, list[str]] = {}
    for model in dict.fromkeys(method.model for method in evaluation.methods):
        found.setdefault(kind_of(model), []).append(model)
    return found


def averages(evaluation: Evaluation, kind: str) -> list[Row]:
    """Means over the OOD sets of the models of a kind."""
    models = kinds(evaluation)[kind]
    return [row for row in evaluation.rows if row.ood_set == AVERAGE and row.model in models]


def sizes(result: StudyResult) -> dict[str, int]:
    """Number of images of each test set."""
    found = {"test": len(result.data.test.labels)}
    return found | {name: len(s.labels) for name, s in result.data.ood.items()}


def best_score(result: StudyResult, model: str) -> str:
    """The detector of a model that is best on the validation sets."""
    found = result.validation[model]
    return max(found, key=lambda score: found[score])


def grouped(result: StudyResult) -> list[str]:
    """Names of the models with groups."""
    return [name for name, choice in result.choices.items() if choice.head.groups is not None]


def claims(result: StudyResult, model: str) -> dict[str, Any]:
    """Where the samples fall that a model with groups takes for ID, as shares of their set.

    Returns:
        Set -> share kept and claimed by each group; and of the kept samples of "nearest", whose
        classes were held out of a group of the taxonomy, the share that a class of that group gets.
    """
    groups = result.choices[model].head.groups
    assert groups is not None
    found: dict[str, Any] = {"groups": list(groups.names), "sets": {}}
    for name, (label, kept) in result.taken[model].items():
        counts = torch.bincount(groups.class_to_group[label[kept]], minlength=len(groups))
        found["sets"][name] = (counts / len(kept)).tolist()
    label, kept = result.taken[model]["nearest"]
    own = result.data.groups.class_to_group[label[kept]] == result.siblings[kept]
    found["to a sibling"] = float(own.double().mean()) if bool(kept.any()) else None
    return found


class Confusion(NamedTuple):
    """An ID class that OOD samples are taken for."""

    name: str
    taken: int
    picture: str
    examples: str


def confusions(result: StudyResult, model: str) -> dict[str, list[Confusion]]:
    """OOD set -> the classes that most of its samples are taken for, with pictures."""
    data, found = result.data, {}
    for name in ("nearest", "scripts", "symbols"):
        label, kept = result.taken[model][name]
        counts = torch.bincount(label[kept], minlength=len(data.class_names))
        rows = []
        for c in counts.argsort(descending=True, stable=True)[:_CONFUSED].tolist():
            wrong = data.ood[name].images[kept & (label == c)]
            if not len(wrong):
                continue
            own = data.test.images[data.test.labels == c]
            shown = wrong[np.linspace(0, len(wrong) - 1, min(_EXAMPLES, len(wrong))).round()]
            title = data.class_names[c].lower()
            rows.append(Confusion(title, len(wrong), _sheet(own[:2], 1, 2), _row(shown)))
        found[name] = rows
    return found


# --- pictures ---------------------------------------------------------------------------------


def _selected(result: StudyResult) -> Evaluation:
    """The own score of each model and the one that validation favours; of the flat one a few."""
    wanted = {(FLAT, score) for score in _SHOWN}
    for name in result.choices:
        wanted |= {(name, METHODS[name].score), (name, best_score(result, name))}
    methods = [m for m in result.evaluation.methods if (m.model, m.score) in wanted]
    return replace(result.evaluation, methods=methods)


def _sorted(evaluation: Evaluation, kind: str) -> list[Line]:
    """A line for each method of a kind; those of the flat head the best first."""
    models = kinds(evaluation)[kind]
    rows = [row for row in evaluation.rows if row.model in models]
    if kind == POST_HOC:
        rank = {row.score: -row.auroc for row in rows if row.ood_set == AVERAGE}
        rows.sort(key=lambda row: rank[row.score])
    return lines(rows)


def _figures(result: StudyResult, evaluation: Evaluation) -> dict[str, Figure]:
    shown = _selected(result)
    found = report.figures(replace(evaluation, methods=shown.methods), without=("roc",))
    found["curve"] = _curve(result)
    if grouped(result):
        found["claims"] = _claims(result)
    for kind, models in kinds(shown).items():
        methods = [method for method in shown.methods if method.model in models]
        found[f"roc, {kind}"] = report.roc_curves(methods)
    return found


def _curve(result: StudyResult) -> Figure:
    """FPR95 and AUROC against the number of classes."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(result.curve))
    for axes, sweep in zip(panels, result.curve.values(), strict=True):
        report.draw_sweep(axes, sweep)
        axes.set_title(sweep.y)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _claims(result: StudyResult) -> Figure:
    """Share of each test set that is kept and claimed by each group."""
    names = grouped(result)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    found = [claims(result, name) for name in names]
    top = max(v for each in found for n, row in each["sets"].items() if n != "test" for v in row)
    image = None
    for axes, name, each in zip(panels, names, found, strict=True):
        shown = {n: row for n, row in each["sets"].items() if n != "test"}
        image = axes.imshow(
            100 * np.array(list(shown.values())), aspect="auto", vmin=0, vmax=100 * top, cmap="Reds"
        )
        axes.set(title=as_label(name), yticks=range(len(shown)), yticklabels=list(shown))
        ticks = range(len(each["groups"]))
        axes.set_xticks(ticks, map(as_label, each["groups"]), rotation=90, fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="% kept and claimed", pad=0.01)
    return figure


def _row(images: Tensor) -> str:
    return _sheet(images, 1, len(images))


def _sheet(images: Tensor, rows: int = 2, columns: int = 24, gap: int = 1) -> str:
    """Images from the whole of a set, side by side, as a PNG data URI at one dot per pixel."""
    pixels = images[:, 0].numpy()
    chosen = pixels[np.linspace(0, len(pixels) - 1, rows * columns).round().astype(int)]
    height, width = (side + gap for side in pixels.shape[1:])
    sheet = np.full((rows * height - gap, columns * width - gap), 255, np.uint8)
    for i, image in enumerate(chosen):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = image
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, sheet, cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
