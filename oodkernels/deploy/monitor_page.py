"""The page of a monitor, in one file, and its pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import oodkernels._version
from oodkernels.evaluation.report import render

__all__ = ["page"]

_BLUE, _RED, _GREY = "#4477aa", "#cc3311", "#777777"


def page(report: Mapping[str, Any], named: Callable[[str], str]) -> str:
    """The page as HTML.

    Args:
        report: What :meth:`Monitor.report` gives.
        named: Scope -> what it is called.
    """
    rows = [{"name": named(name), **entry} for name, entry in report["scopes"].items()]
    rows.sort(key=lambda row: -row["log10_drift"])
    alarms = [
        {**alarm, "scope": named(alarm["scope"]), "when": _when(alarm["time"])}
        for alarm in report["alarms"]
    ]
    facts = {
        "report": report,
        "rows": rows[:40],
        "hidden": len(rows[40:]),
        "alarms": alarms,
        "until": _when(report["windows"][-1]["time"]) if report["windows"] else "",
        "version": oodkernels._version.__version__,
    }
    draw = {"share": _share, "scores": _scores, "evidence": _evidence}

    def pictures() -> dict[str, Figure]:
        windows = report["windows"]
        return {name: _figure(make, report) for name, make in draw.items()} if windows else {}

    return render("monitor.html.j2", pictures, facts)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _figure(make: Callable[[Axes, Mapping[str, Any]], None], report: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9.2, 2.6), layout="constrained")
    axes = figure.subplots()
    make(axes, report)
    axes.set_xlabel("samples")
    axes.grid(axis="y")
    for alarm in report["alarms"]:
        axes.axvline(alarm["sample"], color=_RED, linewidth=1, linestyle=":")
    ends = [window["end"] for window in report["windows"]]
    axes.set_xlim(ends[0] - (ends[-1] - ends[0]) * 0.02 - 1, ends[-1] + 1)
    return figure


def _column(report: Mapping[str, Any], name: str) -> np.ndarray[Any, Any]:
    return np.array([window[name] for window in report["windows"]])


def _share(axes: Axes, report: Mapping[str, Any]) -> None:
    x = _column(report, "end")
    low, high = 100 * _column(report, "low"), 100 * _column(report, "high")
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.2, linewidth=0)
    axes.plot(x, 100 * _column(report, "flagged"), color=_BLUE, marker=".", label="a window")
    promised = 100 * report["promised"]
    axes.axhline(promised, color=_RED, linewidth=1, label="promised at most")
    axes.set_ylim(0, max(1.6 * promised, 1.05 * float(high.max())))
    axes.set_ylabel("flagged, %")
    axes.legend(loc="upper left", ncols=2)


def _scores(axes: Axes, report: Mapping[str, Any]) -> None:
    x, quantiles = _column(report, "end"), _column(report, "quantiles")
    for outer, alpha in ((0, 0.15), (1, 0.3)):
        low, high = quantiles[:, outer], quantiles[:, 4 - outer]
        axes.fill_between(x, low, high, color=_BLUE, alpha=alpha, linewidth=0)
    axes.plot(x, quantiles[:, 2], color=_BLUE, marker=".", label="median; 25-75 %; 5-95 %")
    axes.set_ylabel("score")
    axes.legend(loc="lower left")


def _evidence(axes: Axes, report: Mapping[str, Any]) -> None:
    x = _column(report, "end")
    for name, color in (("drift", _BLUE), ("rate", _GREY)):
        y = _column(report, f"log10_{name}")
        axes.plot(x, y, color=color, marker=".", label=name)
    limits = (4, 8)
    for factor, color in zip(limits, (_BLUE, _GREY), strict=True):
        limit = math.log10(factor / report["level"])
        axes.axhline(limit, color=color, linewidth=1, linestyle="--")
    axes.set_ylabel("log10 of capital")
    axes.legend(loc="upper left", ncols=2)
