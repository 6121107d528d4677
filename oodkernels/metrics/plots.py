"""Pictures of metrics, in one style, on axes of their own outside pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodkernels._optional import require
from oodkernels.metrics.ood import in_one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]

STYLE: dict[Any, Any] = {
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
"""Matplotlib's settings for every picture of this package."""


def new_axes(function: str) -> Axes:
    """Axes on a figure of their own; errors name ``function``.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = require("matplotlib.figure", "demo", function)
    with require("matplotlib", "demo", function).rc_context(STYLE):
        axes: Axes = figure.Figure(figsize=(5, 5), layout="constrained").subplots()
    return axes


def as_label(name: str) -> str:
    """A name as matplotlib shows it: no mathematics between dollars, in legends from ``_`` on.

    Lines stay lines; whatever else cannot be printed is shown as Python escapes it.
    """
    text = "\n".join(map(in_one_line, name.split("\n"))).replace("$", r"\$")
    # A label that begins with an underscore is left out of legends.
    return f" {text}" if text.startswith("_") else text


def draw_roc(
    curves: Mapping[str, tuple[Curve, Curve]], tpr: float, axes: Axes
) -> tuple[Figure, Axes]:
    """Draw ROC curves.

    Args:
        curves: Label -> FPR and TPR of the curve, (2, P), and the outline of the band in which it
            lies, (2, Q).
        tpr: Where a line is drawn across.
        axes: Where.

    Returns:
        The figure and the axes.
    """
    for label, (middle, band) in curves.items():
        (line,) = axes.plot(*middle, lw=1.5, label=as_label(label))
        axes.fill(*band, color=line.get_color(), alpha=0.25, lw=0)
    axes.axhline(tpr, color="0.6", lw=0.8, ls=":")
    axes.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
    axes.set(xlabel="FPR: share of OOD kept", ylabel="TPR: share of ID kept")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.legend(loc="lower right", frameon=False)
    return figure_of(axes), axes


def figure_of(axes: Axes) -> Figure:
    """The figure that axes are on."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
