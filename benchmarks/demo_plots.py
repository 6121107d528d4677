"""The figures of docs/many-classes.md and the README, from benchmarks/results/glyphs.json.

python benchmarks/demo_plots.py
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from tables import ROOT, glyphs

from oodkernels.evaluation import Sweep
from oodkernels.evaluation.report import draw_sweep
from oodkernels.metrics.plots import STYLE


def curve() -> Figure:
    """FPR95 and AUROC against the number of classes: mean and standard deviation of the seeds."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    seeds = [seed["curve"] for seed in glyphs()["by seed"]]
    for axes, name in zip(panels, seeds[0], strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            for line, points in seed[name]["series"].items():
                series.setdefault(line, []).extend((x, y) for x, y in points)
        draw_sweep(axes, Sweep(series, y=name))
        axes.set_title(name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def claims() -> Figure:
    """Share of each OOD set that is kept and claimed by each group: mean over the seeds."""
    record = glyphs()
    seeds = [seed["claims"] for seed in record["by seed"]]
    models = [name for name in seeds[0] if name != "MOS outliers"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True)
    image = None
    for axes, model in zip(panels, models, strict=True):
        sets = [name for name in seeds[0][model]["sets"] if name != "test"]
        each = [[seed[model]["sets"][name] for name in sets] for seed in seeds]
        # Only a taxonomy's groups are the same in every seed: of others, the largest first.
        values = np.array(each) if model == "MOS taxonomy" else -np.sort(-np.array(each), axis=2)
        shown = 100 * values.mean(0)
        image = axes.imshow(shown, aspect="auto", vmin=0, vmax=25, cmap="Reds")
        axes.set(title=model, yticks=range(len(sets)), yticklabels=sets)
        names = seeds[0][model]["groups"] if model == "MOS taxonomy" else range(1, 11)
        axes.set_xticks(range(10), names, rotation=90 if model == "MOS taxonomy" else 0)
        if model != "MOS taxonomy":
            axes.set_xlabel("groups, by how much they claim")
    figure.colorbar(image, ax=list(panels), label="% kept and claimed", pad=0.01, extend="max")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"curve": curve, "claims": claims}


def main() -> None:
    """Draw all."""
    folder = ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            path = folder / f"many-classes-{name}.png"
            draw().savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
