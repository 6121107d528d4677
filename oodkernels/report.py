"""Results on disk: a CSV table, a JSON record, and an HTML report that needs no other file."""

from __future__ import annotations

import base64
import csv
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sklearn.metrics import roc_curve

import oodkernels
from oodkernels._files import write_text
from oodkernels.demo import ID_SET, DemoResult
from oodkernels.evaluation import (
    AVERAGE,
    CONVENTION,
    METRICS,
    Array,
    Method,
    Row,
    best,
)

METRIC_NAMES = {"fpr95": "FPR95", "auroc": "AUROC", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}

_ID_COLOR = "#4477aa"
_OOD_COLORS = ("#ee6677", "#228833", "#aa3377", "#ccbb44")
_OTHER_ID_COLOR = "#c3d5e8"
# Log-odds order images as the MOS score does: its line is a band below that of MOS.
_METHOD_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#b3b3b3", "lw": 1.7},
    {"color": "#777777", "lw": 1.7, "ls": "--"},
    {"color": "#222222", "lw": 1.7},
    {"color": "#009988", "lw": 1.7},
    {"color": "#009988", "lw": 5, "alpha": 0.25, "zorder": 1},
    {"color": "#ee7733", "lw": 1.7},
    {"color": "#ee7733", "lw": 5, "alpha": 0.25, "zorder": 1},
)
_RC: dict[Any, Any] = {
    "svg.hashsalt": "oodkernels",
    "svg.fonttype": "path",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}


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
        "results.csv": to_csv(result.rows),
        "results.json": to_json(result),
        "report.html": to_html(result),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def to_csv(rows: Sequence[Row]) -> str:
    """One line per method and OOD set, metrics as fractions in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    return buffer.getvalue()


def to_json(result: DemoResult) -> str:
    """The results with what is needed to read and repeat them: conventions, settings, versions."""
    record = {
        "format": "oodkernels.demo",
        "version": 1,
        "convention": CONVENTION,
        "settings": asdict(result.settings),
        "data": {
            "id": ID_SET,
            "train": result.num_train,
            "test": {name: len(images) for name, images in result.images.items()},
        },
        "results": [row._asdict() for row in result.rows],
        "grouped_models": [asdict(model) for model in result.grouped],
        "software": software(),
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def software() -> dict[str, Any]:
    """What the numbers depend on: versions, and how the kernels were built."""
    build = oodkernels.build_info()
    del build["threads"]  # the demo has its own: one
    packages = ("numpy", "scikit-learn", "scikit-image", "matplotlib")
    return {
        "oodkernels": build.pop("version"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        **{name: version(name) for name in packages},
        **build,
    }


def to_html(result: DemoResult) -> str:
    """The report as one HTML page: styles and pictures are inside, nothing is loaded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with matplotlib.rc_context(_RC):
        figures = {
            "histograms": _data_uri(histograms(result.methods)),
            "roc": _data_uri(roc_curves(result.methods)),
            "others": _data_uri(others_per_group(result)),
        }
    return environment.get_template("report.html.j2").render(
        result=result,
        id_set=ID_SET,
        ood_sets=[name for name in result.images if name != ID_SET],
        samples={name: _contact_sheet(images) for name, images in result.images.items()},
        figures=figures,
        methods=_table(result.rows),
        average=AVERAGE,
        metric_names=METRIC_NAMES,
        convention=CONVENTION,
        software=software(),
    )


def _table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method its cells, (value, is it the best), in the order of the header."""
    top = best(rows)

    def cell(row: Row, metric: str) -> tuple[float, bool]:
        value: float = getattr(row, metric)
        return value, value == top[row.ood_set, metric]

    table = []
    for (model, score), group in groupby(rows, lambda row: (row.model, row.score)):
        own = list(group)
        cells = [cell(row, metric) for row in own for metric in METRICS]
        accuracy = cell(own[0], "id_accuracy")
        table.append({"model": model, "score": score, "accuracy": accuracy, "cells": cells})
    return table


def histograms(methods: Sequence[Method]) -> Figure:
    """Per method, the distribution of its score on ID and on each OOD set."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    half = len(methods) // 2
    axes: list[Axes] = []
    grid = figure.add_gridspec(2)
    for i, row in enumerate((methods[:half], methods[half:])):
        panels = np.ravel(figure.add_subfigure(grid[i]).subplots(1, len(row), sharey=True))
        panels[0].set_ylabel("% of images")
        axes += list(panels)
    for one, method in zip(axes, methods, strict=True):
        _histogram(one, method)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _histogram(axes: Axes, method: Method) -> None:
    everything = np.concatenate([method.id_scores, *method.ood_scores.values()])
    bins = np.linspace(everything.min(), everything.max(), 31)

    def draw(scores: Array, **style: Any) -> None:
        axes.hist(scores, bins.tolist(), weights=np.full(len(scores), 100 / len(scores)), **style)

    draw(method.id_scores, color=_ID_COLOR, alpha=0.45, label=f"{ID_SET} (ID)")
    for (name, scores), color in zip(method.ood_scores.items(), _OOD_COLORS, strict=False):
        draw(scores, color=color, histtype="step", lw=1.4, label=name)
    axes.axvline(method.threshold, color="#333333", lw=1, ls="--", label="95 % of ID at or above")
    axes.set(title=method.name, yscale="log", ylim=(0.1, 100))
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")


def roc_curves(methods: Sequence[Method]) -> Figure:
    """Per OOD set, the share of ID kept against the share of OOD kept, one line a method."""
    names = list(methods[0].ood_scores)
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    grid = np.ravel(figure.subplots(1, len(names), sharey=True))
    for axes, name in zip(grid, names, strict=True):
        for method, style in zip(methods, _METHOD_STYLES, strict=True):
            ood = method.ood_scores[name]
            is_id = np.arange(len(method.id_scores) + len(ood)) < len(method.id_scores)
            fpr, tpr, _ = roc_curve(is_id, np.concatenate([method.id_scores, ood]))
            axes.plot(100 * fpr, 100 * tpr, label=method.name, **style)
        axes.axhline(95, color="#333333", lw=1, ls="--")
        axes.set(title=name, xlabel="OOD kept, %", xlim=(0, 50), ylim=(70, 100.4))
        axes.grid()
    grid[0].set_ylabel("ID kept, %")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def others_per_group(result: DemoResult) -> Figure:
    """Mean p_others per group, and of its minimum over the groups, on ID and each OOD set."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    grid = np.ravel(figure.subplots(1, len(result.grouped), sharey=True))
    for axes, model in zip(grid, result.grouped, strict=True):
        last = len(model.groups) + 0.3
        colors = (_ID_COLOR, _OTHER_ID_COLOR, *_OOD_COLORS)
        _bars(axes, np.arange(len(model.groups)), model.others, colors)
        # Matplotlib leaves labels that start with "_" out of the legend.
        least = {f"_{name}": [value] for name, value in model.min_others.items()}
        _bars(axes, np.array([last]), least, (_ID_COLOR, *_OOD_COLORS))
        axes.axvline(last - 0.65, color="#bbbbbb", lw=1)
        ticks = [" ".join(map(str, group)) for group in model.groups]
        axes.set_xticks([*range(len(ticks)), last], [*ticks, "least of\nall groups"])
        axes.set(title=model.name, ylim=(0, 1), xlabel="digits of the group")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
    grid[0].set_ylabel("mean p(others)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _bars(
    axes: Axes, x: Array, series: Mapping[str, Sequence[float]], colors: Sequence[str]
) -> None:
    """Bars side by side around each ``x``, one of every series."""
    width = 0.84 / len(series)
    for i, (label, values) in enumerate(series.items()):
        left = x + (i - len(series) / 2) * width
        axes.bar(left, values, 0.92 * width, color=colors[i], label=label, align="edge")


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


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
