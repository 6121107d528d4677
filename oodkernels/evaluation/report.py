"""The HTML report of an evaluation, in one file, and its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oodkernels.detectors import Tuning
from oodkernels.evaluation.methods import (
    OTHER,
    Array,
    GroupOthers,
    Levels,
    MethodResult,
    StreamedMethodResult,
    Sweep,
    ood_set_names,
)
from oodkernels.metrics.calibration import draw_reliability
from oodkernels.metrics.plots import STYLE, as_label

if TYPE_CHECKING:
    from oodkernels.metrics.calibration import CalibrationBins

Methods: TypeAlias = MethodResult | StreamedMethodResult

_ID_COLOR = "#4477aa"
_OOD_COLORS = ("#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#bb5500", "#882255")
_OTHER_ID_COLOR = "#c3d5e8"
_METHOD_COLORS = (
    *("#b3b3b3", "#777777", "#222222", "#009988", "#ee7733"),
    *("#0077bb", "#cc3311", "#33bbee", "#ee3377", "#004d44"),
)
_BARS = 12
"""Groups up to which their "others" are drawn as bars."""


def render(template: str, draw: Callable[[], dict[str, Figure]], facts: Mapping[str, Any]) -> str:
    """A report as one HTML page: styles and pictures are inside, nothing is loaded.

    Args:
        template: A file in ``templates``.
        draw: Makes the pictures.
        facts: What that file shows beside them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oodkernels"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with matplotlib.rc_context(STYLE):
        drawn = {name: _data_uri(figure) for name, figure in draw().items()}
    names = ("histograms", "roc", "others", "reliability", "sweep", "tuning")
    return environment.get_template(template).render(
        {"figures": dict.fromkeys(names) | drawn, **facts}
    )


class Shown(Protocol):
    """What there are pictures of: an :class:`oodkernels.evaluation.Evaluation`."""

    @property
    def methods(self) -> list[Methods]: ...  # noqa: D102
    @property
    def others(self) -> list[GroupOthers]: ...  # noqa: D102
    @property
    def reliability(self) -> dict[str, CalibrationBins]: ...  # noqa: D102
    @property
    def sweep(self) -> Sweep | None: ...  # noqa: D102
    @property
    def tuning(self) -> Tuning | None: ...  # noqa: D102


def figures(evaluation: Shown, without: Sequence[str] = ()) -> dict[str, Figure]:
    """The report's pictures by name, those for which there is something to show.

    Args:
        evaluation: What to show.
        without: Names of pictures to leave out, of "histograms" and "roc".
    """
    always = {"histograms": histograms, "roc": roc_curves}
    found = {n: draw(evaluation.methods) for n, draw in always.items() if n not in without}
    if evaluation.others:
        found["others"] = others_per_group(evaluation.others)
    if evaluation.reliability:
        found["reliability"] = reliability(evaluation.reliability)
    if evaluation.sweep is not None:
        found["sweep"] = sweep(evaluation.sweep)
    if evaluation.tuning is not None and any(
        d.varied for d in evaluation.tuning.detectors.values()
    ):
        found["tuning"] = tuning(evaluation.tuning)
    return found


# --- pictures ---------------------------------------------------------------------------------


def _panels(
    figure: Figure, count: int, columns: int = 4, *, even: bool = True, **options: Any
) -> list[Axes]:
    """Axes in rows of at most ``columns``; if ``even``, of as equal a number as can be."""
    rows = -(-count // columns)
    if even:
        columns = -(-count // rows)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False, **options))
    for unused in grid[count:]:
        unused.set_axis_off()
    return list(grid[:count])


def _height(count: int, each: float, columns: int = 4) -> float:
    return 0.9 + each * -(-count // columns)


def histograms(methods: Sequence[Methods]) -> Figure:
    """Per method, the distribution of its score on ID and on each OOD set."""
    figure = Figure(figsize=(11, _height(len(methods), 2.3)), layout="constrained")
    axes = _panels(figure, len(methods))
    colors = {name: _ood_color(i) for i, name in enumerate(ood_set_names(methods))}
    for one, method in zip(axes, methods, strict=True):
        _histogram(one, method, colors)
        if one.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            one.set_ylabel("% of samples")
    _legend(figure, axes, 6, loc="outside upper left")
    return figure


def _legend(figure: Figure, panels: Sequence[Axes], columns: int, **options: Any) -> None:
    """Draw the legend of all panels together, each label once."""
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), ncols=min(columns, len(entries)), **options)


def _histogram(axes: Axes, method: Methods, colors: Mapping[str, str]) -> None:
    levels = {name: method.levels(name) for name in method.sizes[1]}
    first = next(iter(levels.values()))
    ranges = [_range(first.values, first.n_id)]
    ranges += [_range(level.values, level.n_ood) for level in levels.values()]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    bins = np.linspace(low, high if high > low else low + 1, 31)

    def draw(values: Array, counts: Array, **style: Any) -> None:
        inside = np.clip(values, bins[0], bins[-1])
        share = np.histogram(inside, bins, weights=100 * counts / counts.sum())[0]
        axes.stairs(share, bins, **style)

    draw(first.values, first.n_id, color=_ID_COLOR, alpha=0.45, fill=True, label="ID")
    for name, level in levels.items():
        draw(level.values, level.n_ood, color=colors[name], lw=1.4, label=as_label(name))
    axes.axvline(method.threshold, color="#333333", lw=1, ls="--", label="95 % of ID at or above")
    axes.set(title=as_label(method.name), yscale="log", ylim=(0.1, 100))
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")


def _range(values: Array, counts: Array) -> tuple[float, float]:
    """All but the outermost 0.1 % on either side, of the finite values."""
    used = np.isfinite(values) & (counts > 0)
    if not used.any():
        return 0.0, 0.0
    total = np.cumsum(counts[used])
    ends = np.searchsorted(total, [0.001 * total[-1], 0.999 * total[-1]])
    low, high = values[used].astype(np.float64)[np.minimum(ends, len(total) - 1)]
    return float(low), float(high)


def _ood_color(i: int) -> str:
    return _OOD_COLORS[i % len(_OOD_COLORS)]


def roc_curves(methods: Sequence[Methods]) -> Figure:
    """Per OOD set, the share of ID kept against the share of OOD kept, one line a method."""
    names = ood_set_names(methods)
    worst = max(m.figures[name]["fpr95"] for m in methods for name in m.sizes[1])
    right, bottom = (50, 70) if worst <= 0.5 else (100, 0)
    legend_rows = -(-len(methods) // 4)
    height = _height(len(names), 3.1) + 0.2 * legend_rows
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = _panels(figure, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for i, method in enumerate(methods):
            if name not in method.sizes[1]:
                continue
            fpr, tpr = _roc(method.levels(name))
            color = _METHOD_COLORS[i % len(_METHOD_COLORS)]
            style = ("-", (0, (4, 2)))[(i + i // len(_METHOD_COLORS)) % 2]
            axes.plot(
                100 * fpr, 100 * tpr, label=as_label(method.name), color=color, ls=style, lw=1.7
            )
        axes.axhline(95, color="#333333", lw=1, ls="--")
        axes.set(title=as_label(name), xlabel="OOD kept, %", xlim=(0, right))
        axes.set_ylim(bottom, 100 + 0.004 * (100 - bottom))
        axes.grid()
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("ID kept, %")
    _legend(figure, panels, 4, loc="outside lower center")
    return figure


def _roc(levels: Levels, steps: int = 2000) -> tuple[Array, Array]:
    """FPR and TPR from (0, 0) to (1, 1), points nearer than a ``steps``-th left out."""
    fpr, tpr = (
        np.concatenate(([0], np.cumsum(n[::-1]))) / n.sum() for n in (levels.n_ood, levels.n_id)
    )
    cells = np.stack((fpr * steps, tpr * steps)).astype(np.int64)
    kept = np.flatnonzero((np.diff(cells, prepend=-1) != 0).any(0))
    kept = np.union1d(kept, [len(fpr) - 1])
    return fpr[kept], tpr[kept]


def others_per_group(models: Sequence[GroupOthers]) -> Figure:
    """Mean p_others per group, and of its minimum over the groups, on ID and each OOD set."""
    if max(len(model.groups) for model in models) > _BARS:
        return _others_as_map(models)
    figure = Figure(figsize=(11, _height(len(models), 2.6, 2)), layout="constrained")
    panels = _panels(figure, len(models), 2, sharey=True)
    for axes, model in zip(panels, models, strict=True):
        last = len(model.groups) + 0.3
        ood = [_ood_color(i) for i in range(len(model.min_others) - 1)]
        own = [_ID_COLOR, _OTHER_ID_COLOR] if OTHER in model.others else [_ID_COLOR]
        _bars(axes, np.arange(len(model.groups)), model.others, [*own, *ood])
        labels = [next(iter(model.others)), *list(model.min_others)[1:]]
        least = {name: [v] for name, v in zip(labels, model.min_others.values(), strict=True)}
        _bars(axes, np.array([last]), least, [_ID_COLOR, *ood])
        axes.axvline(last - 0.65, color="#bbbbbb", lw=1)
        names = _names(model)
        slanted: dict[str, Any] = (
            {"rotation": 40, "ha": "right"} if max(map(len, names)) > 8 else {}
        )
        ticks = [*range(len(model.groups)), last]
        axes.set_xticks(ticks, [*names, "least of\nall groups"], **slanted)
        axes.set(title=as_label(model.name), ylim=(0, 1), xlabel="group")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylabel("mean p(others)")
    _legend(figure, panels, 12, loc="outside upper left")
    return figure


def _others_as_map(models: Sequence[GroupOthers]) -> Figure:
    kinds = max(len(model.others) for model in models)
    height = (1.6 + 0.25 * kinds) * len(models)
    figure = Figure(figsize=(11, height), layout="constrained")
    image = None
    panels = _panels(figure, len(models), 1)
    for axes, model in zip(panels, models, strict=True):
        shown = np.array(list(model.others.values()))
        image = axes.imshow(shown, aspect="auto", vmin=0, vmax=1, cmap="Blues")
        axes.set_yticks(range(len(model.others)), list(map(as_label, model.others)))
        axes.set(title=as_label(model.name))
        if len(model.groups) <= 50:
            axes.set_xticks(range(len(model.groups)), _names(model), rotation=90, fontsize=7)
        else:
            axes.set_xlabel("group")
    assert image is not None
    figure.colorbar(image, ax=panels, label="mean p(others)", pad=0.01)
    return figure


def _names(model: GroupOthers) -> list[str]:
    """Names of the groups: their own, or where these are but numbers, their few classes."""
    numbered = model.names == [str(i) for i in range(len(model.names))]
    if numbered and max(map(len, model.groups)) <= 8:
        return [" ".join(map(str, group)) for group in model.groups]
    return list(map(as_label, model.names))


def _bars(
    axes: Axes, x: Array, series: Mapping[str, Sequence[float]], colors: Sequence[str]
) -> None:
    """Bars side by side around each ``x``, one of every series."""
    width = 0.84 / len(series)
    for i, (label, values) in enumerate(series.items()):
        left = x + (i - len(series) / 2) * width
        axes.bar(left, values, 0.92 * width, color=colors[i], label=as_label(label), align="edge")


def reliability(given: Mapping[str, CalibrationBins]) -> Figure:
    """Per model, the share of right answers on ID samples against their confidence."""
    count = len(given)
    figure = Figure(figsize=(11, _height(count, 3.2, 3)), layout="constrained")
    panels = _panels(figure, count, 3, even=False)
    for axes, (model, bins) in zip(panels, given.items(), strict=True):
        draw_reliability(bins, axes)
        axes.set_title(as_label(model))
    return figure


def sweep(given: Sweep) -> Figure:
    """A figure in per cent against what is varied: mean and standard deviation at each point."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_sweep(axes, given)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_sweep(axes: Axes, given: Sweep) -> None:
    """Draw a sweep's lines, without a legend."""
    for i, (name, points) in enumerate(given.series.items()):
        by_x: dict[float, list[float]] = {}
        for x, y in sorted(points):
            by_x.setdefault(x, []).append(100 * y)
        xs = np.array(list(by_x))
        mean = np.array([np.mean(ys) for ys in by_x.values()])
        spread = np.array([np.std(ys, ddof=1) if len(ys) > 1 else 0 for ys in by_x.values()])
        color = _METHOD_COLORS[(2 + i) % len(_METHOD_COLORS)]
        axes.plot(xs, mean, "o-", color=color, lw=1.7, ms=4, label=as_label(name))
        axes.fill_between(xs, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
    every = [x for points in given.series.values() for x, _ in points]
    if min(every) > 0 and max(every) >= 10 * min(every):
        axes.set_xscale("log")
    ticks = sorted(set(every))
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=as_label(given.x), ylabel=f"{as_label(given.y)}, %")
    axes.grid()


def tuning(given: Tuning) -> Figure:
    """Per detector, what it was chosen by against the first of the options that were varied.

    A line for each combination of the others; the setting that was chosen has a ring.
    """
    shown = {name: found for name, found in given.detectors.items() if found.varied}
    figure = Figure(figsize=(11, _height(len(shown), 2.6)), layout="constrained")
    for axes, (name, found) in zip(_panels(figure, len(shown)), shown.items(), strict=True):
        first, *others = found.varied
        values = list(dict.fromkeys(str(one.get(first)) for one in found.settings))
        place = _places(values)
        lines: dict[str, list[tuple[float, float]]] = {}
        for one, figures in zip(found.settings, found.mean, strict=True):
            label = ", ".join(f"{option}={one.get(option)}" for option in others)
            point = place[str(one.get(first))], 100 * getattr(figures, given.by)
            lines.setdefault(label, []).append(point)
        many = len(values) > 20
        for i, (label, points) in enumerate(lines.items()):
            color = _METHOD_COLORS[(3 + i) % len(_METHOD_COLORS)]
            xs, ys = zip(*sorted(points), strict=True)
            marker = "" if many else "o"
            axes.plot(xs, ys, marker=marker, ms=3, lw=1.4, color=color, label=as_label(label))
        best = getattr(found.mean[found.chosen], given.by)
        x = place[str(found.best.get(first))]
        axes.plot([x], [100 * best], "o", ms=9, mfc="none", color="#222222")
        if not many:
            axes.set_xticks(list(place.values()), list(place), fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=as_label(name), xlabel=as_label(first))
        axes.grid()
        if others and len(lines) <= 8:
            axes.legend(fontsize=6)
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel(f"{given.by.upper()}, %")
    return figure


def _places(values: Sequence[str]) -> dict[str, float]:
    """Where values stand on an axis: many numbers at their value, all else in order."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if len(numbers) <= 20:
        numbers = list(map(float, range(len(values))))
    return dict(zip(values, numbers, strict=True))


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
