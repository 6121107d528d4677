"""Whether what comes in is still like what was calibrated on: in fixed memory, with a stated error.

Everything that raises an alarm is a test that may be looked at after every sample. All of them
together raise a false one with probability at most ``level``, however long the stream is, as long
as it and the calibration samples are exchangeable:

- **rate**: a betting martingale against "at most the promised share is flagged", the promise being
  what the calibration sample vouches for;
- **drift**: a conformal test martingale: each score's randomised rank among the calibration scores
  and all scores before it is uniform and independent of those before it, on which it bets;
- **ks**: each window against the calibration scores, the k-th at level / (k (k + 1)).

Martingales start anew all the time, with capital 1 / (k (k + 1)) for the k-th start, so that a
change after a long quiet time is found about as fast as an early one, at the same error. Scores are
compared by the bins that half of the calibration scores make; the other half is what is ranked
among: given the first half, all others are exchangeable.

Sources: Vovk, "Testing randomness online", Statistical Science 2021; Howard, Ramdas, McAuliffe,
Sekhon, "Time-uniform confidence sequences", Annals of Statistics 2021 (the beta-binomial mixture);
Ramdas, Grunwald, Vovk, Shafer, "Game-theoretic statistics", Statistical Science 2023.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oodkernels._checks import check_confidence, check_count, plain
from oodkernels._optional import require
from oodkernels._safetensors import read_tensors, write_tensors
from oodkernels.deploy.bundle import Bundle, Decision
from oodkernels.metrics.intervals import clopper_pearson
from oodkernels.ops.roc import exact_ceil

PathLike: TypeAlias = str | os.PathLike[str]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

__all__ = ["Alarm", "Monitor", "confidence_sequence"]

_FORMAT, _VERSION = "oodkernels.monitor", 1
_BINS, _CLASS_BINS = 256, 32
_RESTART = 128  # samples between two starts of a martingale
_MOST_ALARMS = 64
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Bets on a uniform rank: as a normal one that moves or widens. Against a rate: how often it is.
_SHIFTS = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
_SCALES = (0.6, 0.8, 1.25, 1.7)
_RATES = (1.25, 1.6, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Alarm:
    """Evidence that what comes in is not what was calibrated on.

    Attributes:
        kind: "rate", "drift" or "ks".
        scope: "all", "class 3" or "group 1".
        sample: How many samples there had been.
        time: Seconds since 1970.
        evidence: Of a martingale its capital, of a window 1 / p: what is to be expected of ID
            samples once in as many times.
        limit: What the evidence had to exceed.
        text: The same in words.
    """

    kind: str
    scope: str
    sample: int
    time: float
    evidence: float
    limit: float
    text: str


class Monitor:
    """Watches the decisions of a bundle.

    Threads may share it. Its memory is fixed: a histogram, a few numbers for each class and group,
    and the last windows.

    Args:
        bundle: Calibrated by :meth:`Bundle.calibrate`, or with ``p_values``.
        level: Probability of any false alarm, ever, in (0, 1).
        rate: The share of ID samples that may be flagged, in (0, 1); None for what the threshold's
            calibration vouches for.
        window: Samples of a window.
        keep: Windows that are kept.
        half_life: Samples after which the "recent" figures have forgotten half.
        path: File that the state is written to after each window, and read from if it is there.
        clock: Gives the time.

    Attributes:
        promised: The share of ID samples that may be flagged.
        alarms: The first alarm of each kind and scope, at most 64, until :meth:`acknowledge`.

    Raises:
        ValueError: The bundle has no threshold or p-values, an argument is out of range, or the
            file is of another bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        level: float = 0.01,
        *,
        rate: float | None = None,
        window: int = 1000,
        keep: int = 48,
        half_life: float = 5000,
        path: PathLike | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        where = "Monitor"
        if bundle.threshold is None or bundle.p_value_info is None:
            raise ValueError(f"{where}: bundle must be calibrated: bundle.calibrate(held-out data)")
        self.bundle = bundle
        self.level = check_confidence(where, level, "level")
        self.window = check_count(where, "window", window)
        self.keep = check_count(where, "keep", keep)
        self.half_life = float(plain(half_life))
        if not 0 < self.half_life < math.inf:
            raise ValueError(f"{where}: half_life must be positive and finite, got {half_life}")
        self.clock, self.path = clock, None if path is None else Path(path)
        self.promised = (
            _promised(bundle.threshold, self.level / 8)
            if rate is None
            else check_confidence(where, rate, "rate")
        )
        self._lock = threading.RLock()
        self._calibration = bundle.fingerprints()["calibration"]
        self._split(bundle)
        groups = 0 if bundle.groups is None else len(bundle.groups)
        self._scopes = [f"class {i}" for i in range(bundle.num_classes)]
        self._scopes += [f"group {i}" for i in range(groups)]
        self._log_rates = _rate_bets(self.promised)
        self._clear()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _split(self, bundle: Bundle) -> None:
        """Half of the calibration scores make bins, of which the other half are counted."""
        scores = bundle.scores.cpu().numpy()
        counts = bundle.counts.cpu().numpy()
        order = np.argsort(scores, kind="stable")
        values, first = np.unique(scores[order], return_index=True)
        counts = np.add.reduceat(counts[order], first)
        n = int(counts.sum())
        if n < 20:
            raise ValueError(f"Monitor: bundle must have at least 20 calibration scores, got {n}")
        random = np.random.default_rng(0)
        half = random.multivariate_hypergeometric(counts, n // 2, method="marginals")
        kept = counts - half
        at = np.linspace(0, n // 2, _BINS + 1)[1:-1]
        places = np.searchsorted(np.cumsum(half), at)
        self._edges = np.unique(values[places.clip(max=len(values) - 1)])
        self._base = np.bincount(
            np.searchsorted(self._edges, values, side="right"),
            weights=kept,
            minlength=len(self._edges) + 1,
        ).astype(np.int64)
        self._coarse = np.arange(len(self._base)) * _CLASS_BINS // len(self._base)

    def _clear(self) -> None:
        bins, scopes = len(self._base), len(self._scopes)
        self.samples = self.flagged = self.not_numbers = 0
        self.alarms: list[Alarm] = []
        self.windows: list[dict[str, Any]] = []
        self._closed = self._starts = 0
        self._since = 0  # samples since the last start
        self._bag = self._base.copy()
        self._now = np.zeros(bins, np.int64)
        self._now_flagged = 0
        self._recent = np.zeros(bins)
        self._recent_flagged = 0.0
        self._drift = np.full(len(_SHIFTS) + len(_SCALES), -np.inf)
        self._rate = np.full(len(self._log_rates), -np.inf)
        self._scope_bags = np.zeros((scopes, _CLASS_BINS), np.int64)
        self._scope_drift = np.full((scopes, len(self._drift)), -np.inf)
        self._scope_counts = np.zeros((scopes, 2), np.int64)
        self._scope_recent = np.zeros((scopes, 2))
        self._random = np.random.Generator(np.random.PCG64(1))

    # --- taking decisions in ------------------------------------------------------------------

    def __call__(self, x: Tensor | ArrayLike) -> Decision:
        """Decide on a batch by the bundle, and take the decisions in."""
        found = self.bundle(x)
        self.update(found)
        return found

    def update(self, found: Decision) -> list[Alarm]:
        """Take in decisions of the bundle, in the order in which the samples came.

        Returns:
            The alarms that are new.

        Raises:
            ValueError: Groups are missing.
        """
        score = _numpy(found.score).astype(np.float64)
        flagged, label = _numpy(found.is_ood), _numpy(found.label)
        if (found.group is None) != (self.bundle.groups is None):
            raise ValueError("Monitor.update: decisions must have groups as the bundle has")
        group = None if found.group is None else _numpy(found.group)
        nan = np.isnan(score)
        bins = np.searchsorted(self._edges, np.where(nan, -np.inf, score), side="right")
        new: list[Alarm] = []
        with self._lock:
            begin = 0
            while begin < len(score):
                if self._since == 0:
                    self._start()
                room = min(_RESTART - self._since, self.window - self.samples % self.window)
                rows = slice(begin, begin + room)
                begin += room
                self.not_numbers += int(nan[rows].sum())
                part = None if group is None else group[rows]
                new += self._take(bins[rows], flagged[rows], label[rows], part)
        return new

    def _start(self) -> None:
        """Start every martingale once more, with the capital that is put aside for it."""
        self._starts += 1
        capital = -math.log(self._starts) - math.log(self._starts + 1)
        for logs in (self._drift, self._rate, self._scope_drift):
            np.logaddexp(logs, capital, out=logs)

    def _take(
        self, bins: Ints, flagged: NDArray[np.bool_], label: Ints, group: Ints | None
    ) -> list[Alarm]:
        n = len(bins)
        u = self._ranks(self._bag, bins)
        drift = self._bet(self._drift, _rank_bets(u))
        rate = self._bet(self._rate, self._log_rates[:, flagged.astype(np.int64)].T)
        forget = 0.5 ** (n / self.half_life)
        np.add.at(self._now, bins, 1)
        self._recent *= forget
        np.add.at(self._recent, bins, 1)
        self._recent_flagged = self._recent_flagged * forget + int(flagged.sum())
        self._now_flagged += int(flagged.sum())
        self.flagged += int(flagged.sum())
        self.samples += n
        self._since = (self._since + n) % _RESTART
        new = [
            self._raise("rate", "all", rate, 8 / self.level),
            self._raise("drift", "all", drift, 4 / self.level),
            *self._take_scopes(bins, flagged, label, group, forget),
        ]
        if self.samples % self.window == 0:
            new.append(self._close())
        return [alarm for alarm in new if alarm is not None]

    def _ranks(self, bag: Ints, bins: Ints) -> Floats:
        """Uniform ranks of scores, each among the bag and those before it, which are added."""
        sizes = len(bag)
        before = np.zeros((len(bins), sizes), np.int64)
        before[np.arange(1, len(bins)), bins[:-1]] = 1
        upto = bag + before.cumsum(0)
        below = upto.cumsum(1)
        at = np.arange(len(bins))
        same = upto[at, bins]
        under = below[at, bins] - same
        u = (under + self._random.random(len(bins)) * (same + 1)) / (below[:, -1] + 1)
        np.add.at(bag, bins, 1)
        return u.clip(1e-12, 1 - 1e-12)

    def _bet(self, logs: Floats, bets: Floats) -> float:
        """Let capital (bets,) grow by log-bets (n, bets); the largest it had, as a logarithm."""
        paths = logs + bets.cumsum(0)
        logs[:] = paths[-1]
        top = paths.max(1)
        total = top + np.log(np.exp(paths - top[:, None]).mean(1))
        return float(np.logaddexp(total.max(), -math.log(self._starts + 1)))

    def _take_scopes(
        self,
        bins: Ints,
        flagged: NDArray[np.bool_],
        label: Ints,
        group: Ints | None,
        forget: float,
    ) -> list[Alarm | None]:
        """The same for each class and group that is there; there were none at the beginning."""
        self._scope_recent *= forget
        classes = self.bundle.num_classes
        found = []
        limit = 4 * len(self._scopes) / self.level
        for ids, first in ((label, 0), (group, classes)):
            for i in () if ids is None else np.unique(ids[ids >= 0]):
                rows, scope = ids == i, first + int(i)
                u = self._ranks(self._scope_bags[scope], self._coarse[bins[rows]])
                capital = self._bet(self._scope_drift[scope], _rank_bets(u))
                count = rows.sum(), (flagged & rows).sum()
                self._scope_counts[scope] += count
                self._scope_recent[scope] += count
                found.append(self._raise("drift", self._scopes[scope], capital, limit))
        return found

    def _close(self) -> Alarm | None:
        """End a window."""
        self._closed += 1
        distance = _distance(self._now, self._base)
        n, m = self.window, int(self._base.sum())
        p = min(1.0, 2 * math.exp(-2 * distance**2 * n * m / (n + m)))
        share = self._now_flagged / n
        low, high = confidence_sequence(self._now_flagged, n, 1 - self.level)
        self.windows.append(
            {
                "end": self.samples,
                "time": self.clock(),
                "flagged": share,
                "low": low,
                "high": high,
                "ks": distance,
                "ks_p": p,
                "log10_drift": self._capital(self._drift) / math.log(10),
                "log10_rate": self._capital(self._rate) / math.log(10),
                "quantiles": self._quantiles(self._now),
            }
        )
        del self.windows[: -self.keep]
        self._now[:] = 0
        self._now_flagged = 0
        limit = 4 * self._closed * (self._closed + 1) / self.level
        found = self._raise("ks", "all", -math.log(max(p, 1e-300)), limit, distance)
        if self.path is not None:
            self.save(self.path)
        return found

    def _capital(self, logs: Floats) -> float:
        """A martingale's capital, what is put aside included, as a logarithm."""
        top = float(logs.max())
        held = top + math.log(float(np.exp(logs - top).mean())) if top > -math.inf else -math.inf
        return float(np.logaddexp(held, -math.log(self._starts + 1)))

    def _raise(
        self, kind: str, scope: str, log_evidence: float, limit: float, distance: float = 0.0
    ) -> Alarm | None:
        if log_evidence < math.log(limit) or len(self.alarms) >= _MOST_ALARMS:
            return None
        if any(alarm.kind == kind and alarm.scope == scope for alarm in self.alarms):
            return None
        evidence = math.exp(min(log_evidence, 690.0))
        once = f"ID samples give such evidence once in {evidence:.3g} times"
        about = {
            "rate": f"more than {100 * self.promised:.2f} % of samples are flagged",
            "drift": "scores are not those of before",
            "ks": f"a window's scores are {distance:.3f} from the calibration's (KS)",
        }
        alarm = Alarm(
            kind, scope, self.samples, self.clock(), evidence, limit, f"{about[kind]}: {once}"
        )
        self.alarms.append(alarm)
        return alarm

    def _quantiles(self, counts: Ints) -> list[float]:
        """Scores at which a histogram's quantiles lie, to the width of a bin."""
        upto = counts.cumsum()
        places = np.searchsorted(upto, [q * upto[-1] for q in _QUANTILES])
        found: list[float] = self._edges[places.clip(max=len(self._edges) - 1)].tolist()
        return found

    def acknowledge(self) -> None:
        """Take note of the alarms: forget them, and start every test anew with its full level."""
        with self._lock:
            self.alarms = []
            self._starts = self._since = self._closed = 0
            for logs in (self._drift, self._rate, self._scope_drift):
                logs[:] = -np.inf

    # --- figures ------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Everything that is known, as JSON can hold it.

        ``share`` is that of all flagged samples, with a confidence sequence at 1 - level: its ends
        hold at all times at once, as long as the share does not change. ``recent`` forgets
        exponentially, and has no guarantee.
        """
        with self._lock:
            total = float(self._recent.sum())
            sizes = self._scope_counts
            low, high = confidence_sequence(self.flagged, self.samples, 1 - self.level)
            return {
                "samples": self.samples,
                "flagged": self.flagged,
                "not_numbers": self.not_numbers,
                "share": self.flagged / self.samples if self.samples else 0.0,
                "share_low": low,
                "share_high": high,
                "promised": self.promised,
                "level": self.level,
                "log10_drift": self._capital(self._drift) / math.log(10),
                "log10_rate": self._capital(self._rate) / math.log(10),
                "recent": {
                    "samples": total,
                    "share": self._recent_flagged / total if total else 0.0,
                    "ks": _distance(self._recent, self._base) if total else 0.0,
                },
                "windows": [dict(window) for window in self.windows],
                "scopes": {
                    name: {
                        "samples": int(sizes[i, 0]),
                        "flagged": int(sizes[i, 1]),
                        "recent_share": float(
                            self._scope_recent[i, 1] / max(self._scope_recent[i, 0], 1e-9)
                        ),
                        "log10_drift": self._capital(self._scope_drift[i]) / math.log(10),
                    }
                    for i, name in enumerate(self._scopes)
                    if sizes[i, 0]
                },
                "alarms": [asdict(alarm) for alarm in self.alarms],
            }

    def to_json(self) -> str:
        """:meth:`report` as JSON."""
        return json.dumps(self.report(), allow_nan=False)

    def to_prometheus(self) -> str:
        """:meth:`report` in Prometheus' text format, for a server's ``/metrics``."""
        found = self.report()
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: Mapping[str, float]) -> None:
            lines.append(f"# HELP oodk_{name} {about}")
            lines.append(f"# TYPE oodk_{name} {kind}")
            lines.extend(f"oodk_{name}{labels} {value!r}" for labels, value in values.items())

        scopes = {_labels(scope=name): entry for name, entry in found["scopes"].items()}
        recent = found["recent"]
        raised = {_labels(kind=k): 0 for k in ("rate", "drift", "ks")}
        for alarm in found["alarms"]:
            raised[_labels(kind=alarm["kind"])] += 1
        add("samples_total", "counter", "Samples taken in.", {"": found["samples"]})
        add("flagged_total", "counter", "Samples called OOD.", {"": found["flagged"]})
        add("nan_total", "counter", "Samples whose score is NaN.", {"": found["not_numbers"]})
        shares = {
            _labels(of="all"): found["share"],
            _labels(of="all_low"): found["share_low"],
            _labels(of="all_high"): found["share_high"],
            _labels(of="recent"): recent["share"],
            _labels(of="promised"): found["promised"],
        }
        if found["windows"]:
            shares[_labels(of="window")] = found["windows"][-1]["flagged"]
        add("flagged_share", "gauge", "Share of samples called OOD.", shares)
        evidence = {
            _labels(kind="drift"): found["log10_drift"],
            _labels(kind="rate"): found["log10_rate"],
        }
        add("evidence_log10", "gauge", "Logarithm of a martingale's capital.", evidence)
        add("recent_ks", "gauge", "Distance of recent scores.", {"": recent["ks"]})
        add("alarms", "gauge", "Alarms not acknowledged.", raised)
        for name, key in (("samples", "samples"), ("flagged", "flagged")):
            values = {labels: entry[key] for labels, entry in scopes.items()}
            add(f"scope_{name}_total", "counter", f"{name.capitalize()} by class, group.", values)
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """A page with the last windows and the alarms; extra "cli"."""
        require("jinja2", "cli", "Monitor.to_html")
        require("matplotlib", "cli", "Monitor.to_html")
        from oodkernels.deploy.monitor_page import page

        return page(self.report(), self._named)

    def _named(self, scope: str) -> str:
        kind, _, number = scope.partition(" ")
        names: Sequence[str] | None = self.bundle.class_names
        if kind == "group" and self.bundle.groups is not None:
            names = self.bundle.groups.names
        return scope if names is None or not number else f"{kind} {names[int(number)]}"

    # --- keeping ------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Write the state to a file that is replaced whole or not at all; extra "files".

        Raises:
            ImportError: safetensors is missing.
            OSError: The file cannot be written.
        """
        with self._lock:
            arrays = {name: torch.from_numpy(getattr(self, f"_{name}")) for name in _ARRAYS}
            content = {
                **{name: getattr(self, name) for name in _NUMBERS},
                "settings": self._settings(),
                "windows": self.windows,
                "alarms": [asdict(alarm) for alarm in self.alarms],
                "random": self._random.bit_generator.state,
            }
            write_tensors("Monitor.save", path, arrays, _FORMAT, _VERSION, content)

    def load(self, path: PathLike) -> None:
        """Go on from a file that :meth:`save` wrote, of a monitor like this one.

        Raises:
            ValueError: It is none of these, or of another bundle or other settings.
            ImportError: safetensors is missing.
            OSError: The file cannot be read.
        """
        with self._lock:
            self._read(Path(path))

    def merge(self, others: Sequence[Monitor]) -> Monitor:
        """One monitor of what this one and others, in other processes, have seen.

        Counts add up; windows are put in the order of their time. Martingales are averaged, which
        keeps their error; each monitor's own alarms are kept, and have an error of their own:
        give each of P processes level / P for one of ``level`` in all.

        Args:
            others: Of the same bundle and settings; such as ``Monitor(bundle)`` after ``load``.

        Returns:
            A new monitor.

        Raises:
            ValueError: They are of another bundle or other settings.
        """
        made = Monitor(
            self.bundle,
            self.level,
            rate=self.promised,
            window=self.window,
            keep=self.keep,
            half_life=self.half_life,
            clock=self.clock,
        )
        parts = [self, *others]
        for part in parts:
            if part._settings() != self._settings():
                raise ValueError("Monitor.merge: monitors must be of one bundle and settings")
        for name in ("samples", "flagged", "not_numbers", "_closed", "_now_flagged"):
            setattr(made, name, sum(getattr(part, name) for part in parts))
        made._recent_flagged = sum(part._recent_flagged for part in parts)
        made._starts = max(part._starts for part in parts)
        for name in ("now", "recent", "scope_counts", "scope_recent", "scope_bags", "bag"):
            total = sum(getattr(part, f"_{name}") for part in parts)
            if name == "bag":
                total = total - (len(parts) - 1) * self._base
            setattr(made, f"_{name}", total)
        for name in ("drift", "rate", "scope_drift"):
            logs = np.stack([getattr(part, f"_{name}") for part in parts])
            setattr(made, f"_{name}", np.logaddexp.reduce(logs) - math.log(len(parts)))
        windows = sorted((w for part in parts for w in part.windows), key=lambda w: w["time"])
        made.windows = windows[-self.keep :]
        alarms = sorted((a for part in parts for a in part.alarms), key=lambda a: a.time)
        made.alarms = alarms[:_MOST_ALARMS]
        return made

    def _settings(self) -> dict[str, Any]:
        return {
            "calibration": self._calibration,
            "level": self.level,
            "promised": self.promised,
            "window": self.window,
            "half_life": self.half_life,
        }

    def _read(self, path: Path) -> None:
        where = f"Monitor.load: {path}"
        content, arrays = read_tensors(where, path, _FORMAT, _VERSION)
        for name, wanted in self._settings().items():
            if (found := content.get("settings", {}).get(name)) != wanted:
                raise ValueError(
                    f"{where}: must be of this bundle and these settings: {name} must be "
                    f"{wanted!r}, got {found!r}"
                )
        try:
            for name in _ARRAYS:
                array, mine = arrays[name].numpy(), getattr(self, f"_{name}")
                if array.shape != mine.shape or array.dtype != mine.dtype:
                    raise ValueError(f"{name} must be {mine.dtype} {mine.shape}")
                setattr(self, f"_{name}", array.copy())
            for name in _NUMBERS:
                setattr(self, name, content[name])
            self.windows = list(content["windows"])[-self.keep :]
            self.alarms = [Alarm(**alarm) for alarm in content["alarms"]]
            self._random.bit_generator.state = content["random"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error!r}") from None


_ARRAYS = (
    *("bag", "now", "recent", "drift", "rate"),
    *("scope_bags", "scope_drift", "scope_counts", "scope_recent"),
)
_NUMBERS = (
    *("samples", "flagged", "not_numbers"),
    *("_closed", "_starts", "_since", "_now_flagged", "_recent_flagged"),
)


def confidence_sequence(
    successes: int, trials: int, confidence: float = 0.99
) -> tuple[float, float]:
    """Interval for a probability that may be looked at after every trial.

    With probability ``confidence`` the intervals of all times hold at once. Those p whose
    likelihood is at least 1 - confidence times that of the Beta(1/2, 1/2) mixture (Howard et al.,
    2021; by Ville's inequality).

    Args:
        successes: 0 <= successes <= trials.
        trials: >= 0.
        confidence: In (0, 1).

    Returns:
        (low, high) in [0, 1].
    """
    confidence = check_confidence("confidence_sequence", confidence)
    if not 0 <= successes <= trials:
        raise ValueError(
            f"confidence_sequence: successes must be in 0..trials, got {successes} of {trials}"
        )
    failures = trials - successes

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    level = log_beta(successes + 0.5, failures + 0.5) - log_beta(0.5, 0.5)
    level += math.log(1 - confidence)

    def inside(p: float) -> bool:
        log = (successes * math.log(p) if successes else 0.0) + (
            failures * math.log1p(-p) if failures else 0.0
        )
        return log >= level

    def end(away: float) -> float:
        near = successes / trials if trials else 0.5
        for _ in range(60):
            middle = (near + away) / 2
            if 0 < middle < 1 and inside(middle):
                near = middle
            else:
                away = middle
        return away

    low = end(0.0) if successes else 0.0
    return low, end(1.0) if failures else 1.0


def _promised(threshold: Any, error: float) -> float:
    """The share of ID samples that is flagged, at most, but for a probability ``error``."""
    k = exact_ceil(threshold.tpr, threshold.n_id)
    kept = clopper_pearson(k, threshold.n_id, 1 - 2 * error)[0]
    return float(min(max(1 - kept, 1e-9), 1 - 1e-9))


def _rate_bets(promised: float) -> Floats:
    """Log-bets (bets, 2) on a sample that is kept, and on one that is flagged."""
    rates = {min(factor * promised, (1 + promised) / 2) for factor in _RATES}
    found = [
        (math.log1p(-rate) - math.log1p(-promised), math.log(rate / promised))
        for rate in sorted(rates)
    ]
    return np.array(found)


def _rank_bets(u: Floats) -> Floats:
    """Log-bets (n, bets) on uniform ranks: likelihood ratios of normal ranks."""
    z = _normal_quantile(u)[:, None]
    shift, scale = np.array(_SHIFTS), np.array(_SCALES)
    moved = shift * z - shift**2 / 2
    widened = z**2 / 2 - z**2 / (2 * scale**2) - np.log(scale)
    return np.concatenate([moved, widened], 1)


def _normal_quantile(u: Floats) -> Floats:
    """The standard normal distribution's quantile function."""
    found: Floats = torch.special.ndtri(torch.from_numpy(u)).numpy()
    return found


def _distance(counts: NDArray[Any], base: Ints) -> float:
    """Kolmogorov and Smirnov's distance of two histograms."""
    own, other = counts.cumsum() / counts.sum(), base.cumsum() / base.sum()
    return float(np.abs(own - other).max())


def _numpy(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.detach().cpu().numpy()
    return array


def _labels(**labels: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}"
