"""The demo's results on disk: a CSV table, a JSON record and an HTML report."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np

from oodkernels import report
from oodkernels._files import write_text
from oodkernels.demo import ID_SET, DemoResult
from oodkernels.evaluation import Array, software

_PACKAGES = ("scikit-learn", "scikit-image", "matplotlib")


def write_report(result: DemoResult, out: Path) -> list[Path]:
    """Write ``results.csv``, ``results.json`` and ``report.html`` into the folder ``out``.

    Each file appears under its name only when it is complete, and the same result gives the same
    bytes. The folder is made where it is missing.

    Returns:
        The three paths, in that order.

    Raises:
        OSError: The folder or a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.csv": result.evaluation.to_csv(),
        "results.json": to_json(result),
        "report.html": to_html(result),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def to_json(result: DemoResult) -> str:
    """The results with what is needed to read and repeat them: conventions, settings, versions."""
    record = {
        **result.evaluation.as_dict(),
        "format": "oodkernels.demo",
        "settings": asdict(result.settings),
        "data": {
            "id": ID_SET,
            "train": result.num_train,
            "test": {name: len(images) for name, images in result.images.items()},
        },
        "software": software(*_PACKAGES),
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def to_html(result: DemoResult) -> str:
    """The demo's report: that of the evaluation, with the images and settings."""
    return report.to_html(
        result.evaluation,
        "Which images are not digits?",
        "demo.html.j2",
        result=result,
        samples={name: _contact_sheet(images) for name, images in result.images.items()},
        software=software(*_PACKAGES),
    )


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
