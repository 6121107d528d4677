"""The figures of scale.py, from its records: PNG to look at, SVG for the web."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

Row = dict[str, Any]

STYLE: dict[str, dict[str, Any]] = {
    "MSP": {"color": "#999999", "marker": "o"},
    "Energy": {"color": "#222222", "marker": "s"},
    "MOS, taxonomy": {"color": "#009988", "marker": "^"},
    "MOS, features": {"color": "#ee7733", "marker": "v"},
    "MOS, random": {"color": "#cc3377", "marker": "D"},
    "no outliers": {"color": "#bbbbbb", "ls": "--"},
    "uniform": {"color": "#222222"},
    "greedy": {"color": "#cc3377"},
    "NTOM": {"color": "#ee7733"},
    "DOS": {"color": "#009988"},
}
RC: dict[Any, Any] = {
    "svg.hashsalt": "oodkernels",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e9e9e9",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.dpi": 160,
}
KINDS = {"near": "Near OOD: unseen classes", "far": "Far OOD: unseen super-classes"}
ROWS = (("fpr95", "FPR95 (lower is better)"), ("auroc", "AUROC (higher is better)"))


def curves(
    axes: Axes, rows: Sequence[Row], x: str, y: str, line: str, names: Sequence[str]
) -> None:
    """Mean over the seeds, and a band of one standard deviation."""
    for name in names:
        mine = [row for row in rows if row[line] == name]
        at = sorted({row[x] for row in mine})
        values = [[row[y] for row in mine if row[x] == value] for value in at]
        mean = np.array([np.mean(v) for v in values])
        std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
        style = {"lw": 1.7, "ms": 4.5, **STYLE[name]}
        axes.plot(at, mean, label=name, **style)
        axes.fill_between(at, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def names_of(rows: Sequence[Row], line: str) -> list[str]:
    return list(dict.fromkeys(row[line] for row in rows))


def plot_mos(record: Row, path: Path) -> None:
    rows = record["results"]
    names = names_of(rows, "method")
    with mpl.rc_context(RC):
        figure, grid = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
        for i, (key, title) in enumerate(ROWS):
            for j, (kind, kind_title) in enumerate(KINDS.items()):
                axes = grid[i, j]
                curves(axes, of_set(rows, kind), "classes", key, "method", names)
                axes.sharey(grid[i, 0])
                axes.set_title(kind_title if i == 0 else "")
                axes.set_ylabel(title)
        accuracy = [
            row | {"method": "MSP" if row["method"] == "Energy" else row["method"]}
            for row in of_set(rows, "near")
        ]
        heads = [name for name in names if name != "Energy"]
        curves(grid[0, 2], accuracy, "classes", "accuracy", "method", heads)
        grid[0, 2].set_title("ID classes: accuracy")
        for axes in grid.flat:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(record["settings"]["classes"]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:g}k"
            )
            axes.set_xlabel("classes")
        grid[1, 2].axis("off")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        labels = [label + (" (flat softmax)" if "MOS" not in label else "") for label in labels]
        grid[1, 2].legend(handles, labels, loc="upper left", fontsize=10)
        steps, batch = (record["settings"][name] for name in ("steps", "batch"))
        note(
            grid[1, 2],
            f"Synthetic features. {record['settings']['groups']} groups.\nLinear heads, {steps} "
            f"steps of {batch}\nfor every head and number of classes.",
        )
        save(figure, path)


def plot_dos(record: Row, path: Path) -> None:
    rows = record["results"]
    names = names_of(rows, "miner")
    settings = record["settings"]
    with mpl.rc_context(RC):
        figure, grid = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
        for i, (key, title) in enumerate(ROWS):
            for j, (kind, kind_title) in enumerate(KINDS.items()):
                axes = grid[i, j]
                curves(axes, of_set(rows, kind), "step", key, "miner", names)
                axes.sharey(grid[i, 0])
                axes.set_title(kind_title if i == 0 else "")
                axes.set_ylabel(title)
                axes.set_xlabel("training step")
        last = [row for row in of_set(rows, "near") if row["step"] == max(r["step"] for r in rows)]
        bars(grid[0, 2], last, "accuracy", names, "{:.1%}", "ID classes: accuracy")
        mined = [name for name in names if name != "no outliers"]
        bars(
            grid[1, 2],
            last,
            "kinds",
            mined,
            "{:.1f}",
            f"Kinds among {settings['batch']} selected",
        )
        handles, labels = grid[0, 0].get_legend_handles_labels()
        title = (
            f"Synthetic features, {settings['classes']} classes. Each step: {settings['batch']} "
            f"outliers of {settings['candidates']} candidates, selected by"
        )
        figure.legend(handles, labels, title=title, loc="outside lower center", ncols=len(names))
        save(figure, path)


def bars(
    axes: Axes, rows: Sequence[Row], key: str, names: Sequence[str], text: str, title: str
) -> None:
    values = [float(np.mean([row[key] for row in rows if row["miner"] == name])) for name in names]
    axes.barh(names, values, color=[STYLE[name]["color"] for name in names], height=0.6)
    for i, value in enumerate(values):
        axes.text(value, i, " " + text.format(value), va="center", color="#333333")
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlim(0, 1.2 * max(values))
    axes.xaxis.set_major_formatter(NullFormatter())
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def of_set(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["set"] == kind]


def note(axes: Axes, text: str) -> None:
    axes.text(0.03, 0.02, text, transform=axes.transAxes, color="#555555", va="bottom")


def save(figure: Figure, path: Path) -> None:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
    plt.close(figure)


PLOTS: dict[str, Callable[[Row, Path], None]] = {"mos": plot_mos, "dos": plot_dos}
