"""The demo's results on disk: a CSV table, a JSON record and an HTML report."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from oodkernels.demo.protocol import ID_SET, METHODS, DemoResult, outliers_per_image
from oodkernels.evaluation import Array, Evaluation, report, software, write_texts
from oodkernels.evaluation.tables import AVERAGE, Row, lines

_PACKAGES = ("scikit-learn", "scikit-image", "matplotlib")
_ALONE, _OUTLIERS = "digits alone", "digits and outliers"


def write_report(result: DemoResult, out: Path) -> list[Path]:
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


def to_json(result: DemoResult) -> str:
    """The results with what is needed to read and repeat them: conventions, settings, versions."""
    record = {
        **result.evaluation.as_dict(),
        "format": "oodkernels.demo",
        "settings": asdict(result.settings),
        "methods": {name: _differences(name) for name in result.settings.methods},
        "data": {
            "id": ID_SET,
            "train": result.num_train,
            "outliers": len(result.outliers),
            "test": {name: len(images) for name, images in result.images.items()},
        },
        "software": software(*_PACKAGES),
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def to_html(result: DemoResult) -> str:
    """The demo's report: that of the evaluation, with methods, images and settings."""
    sheets = {
        name: (images, f"{'ID' if name == ID_SET else 'OOD'}, {len(images)} test images")
        for name, images in result.images.items()
    }
    found = kinds(result.evaluation)
    if _OUTLIERS in found:
        sheets["outliers"] = (result.outliers, f"{len(result.outliers)} to train on")
    return result.evaluation.to_html(
        "Which images are not digits?",
        "demo.html.j2",
        _figures,
        result=result,
        kinds=found,
        average_of={kind: lines(averages(result.evaluation, kind)) for kind in found},
        methods={name: METHODS[name] for name in result.settings.methods},
        samples={name: (_contact_sheet(images), what) for name, (images, what) in sheets.items()},
        software=software(*_PACKAGES),
    )


def kinds(evaluation: Evaluation) -> dict[str, list[str]]:
    """What was trained on -> names of the models, which are best compared with each other."""
    outliers = {
        model for name, m in METHODS.items() if outliers_per_image(name) for model in m.models
    }
    found: dict[str, list[str]] = {}
    for model in dict.fromkeys(method.model for method in evaluation.methods):
        found.setdefault(_OUTLIERS if model in outliers else _ALONE, []).append(model)
    return found


def averages(evaluation: Evaluation, kind: str) -> list[Row]:
    """Means over the OOD sets of the models of a kind."""
    models = kinds(evaluation)[kind]
    return [row for row in evaluation.rows if row.ood_set == AVERAGE and row.model in models]


def _differences(name: str) -> dict[str, Any]:
    """What a method has otherwise than the others, for the record."""
    method = METHODS[name]
    return {
        "models": list(method.models),
        "outliers_per_image": outliers_per_image(name),
        "options": dict(method.options),
        "recipe": dict(method.recipe),
    }


def _figures(evaluation: Evaluation) -> dict[str, Figure]:
    """The report's pictures; the ROC curves in one for each kind of model, to be told apart."""
    found = report.figures(evaluation, without=("roc",))
    for kind, models in kinds(evaluation).items():
        methods = [method for method in evaluation.methods if method.model in models]
        found[f"roc, {kind}"] = report.roc_curves(methods)
    return found


def _contact_sheet(images: Array, rows: int = 2, columns: int = 30, gap: int = 1) -> str:
    """Images from the whole of a set, side by side, as a PNG data URI at one dot per pixel."""
    chosen = images[np.linspace(0, len(images) - 1, rows * columns).round().astype(int)]
    height, width = (side + gap for side in images.shape[1:])
    sheet = np.ones((rows * height - gap, columns * width - gap))
    for i, image in enumerate(chosen):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = image
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, sheet, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
