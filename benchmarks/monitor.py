"""False alarms of the monitor on a million ID samples, and how soon it finds a shift.

    python benchmarks/monitor.py --out benchmarks/results/monitor.json

Calibration and stream are drawn anew for each run. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from environment import package
from torch import nn

from oodkernels._files import write_text
from oodkernels.deploy import Bundle, ConformalPValues, Decision, Monitor
from oodkernels.detectors import Energy

CLASSES, CALIBRATION = 3, 2000
LEVEL = 0.05
DRAWS = {
    "normal": lambda random, n: random.normal(size=n),
    "exponential": lambda random, n: -random.exponential(size=n),
    "twenty values": lambda random, n: random.binomial(20, 0.7, size=n).astype(float),
}


def bundle_of(scores: np.ndarray[Any, Any]) -> Bundle:
    """A bundle that was calibrated on these scores."""
    energy = Energy()
    threshold = energy.calibrate(scores)
    held = ConformalPValues(scores)
    return Bundle(nn.Identity(), energy, threshold, p_values=held, input_shape=(CLASSES,))


def feed(monitor: Monitor, scores: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> None:
    for begin in range(0, len(scores), 512):
        part = torch.from_numpy(scores[begin : begin + 512])
        classes = torch.from_numpy(label[begin : begin + 512])
        flagged = ~(part >= monitor.bundle.cut)
        monitor.update(Decision(classes, part, flagged, None, None))


def false_alarms(name: str, runs: int, length: int) -> dict[str, Any]:
    kinds: list[list[str]] = []
    shares = []
    for seed in range(runs):
        random = np.random.default_rng([seed, length])
        monitor = Monitor(bundle_of(DRAWS[name](random, CALIBRATION)), LEVEL)
        feed(monitor, DRAWS[name](random, length), random.integers(CLASSES, size=length))
        kinds.append(sorted({f"{a.kind} {a.scope}" for a in monitor.alarms}))
        shares.append(monitor.flagged / monitor.samples)
    return {
        "scores": name,
        "runs": runs,
        "samples_a_run": length,
        "samples": runs * length,
        "level": LEVEL,
        "runs_with_a_false_alarm": sum(map(bool, kinds)),
        "alarms": [kind for run in kinds for kind in run],
        "flagged_share": [min(shares), max(shares)],
    }


def delays(shift: float, runs: int, quiet: int) -> dict[str, Any]:
    """Samples from the shift to the first alarm; those that came before it are counted apart."""
    found: list[int] = []
    early = 0
    by: dict[str, int] = {}
    for seed in range(runs):
        random = np.random.default_rng([seed, 7])
        monitor = Monitor(bundle_of(random.normal(size=CALIBRATION)), LEVEL)
        feed(monitor, random.normal(size=quiet), random.integers(CLASSES, size=quiet))
        if monitor.alarms:
            early += 1
            continue
        while not monitor.alarms and monitor.samples < quiet + 50_000:
            feed(monitor, random.normal(shift, size=16), random.integers(CLASSES, size=16))
        found.append(monitor.samples - quiet)
        first = monitor.alarms[0].kind if monitor.alarms else "none"
        by[first] = by.get(first, 0) + 1
    return {
        "shift_in_sigma": shift,
        "quiet_samples": quiet,
        "runs": runs,
        "false_alarms_before": early,
        "median": median(found),
        "least": min(found),
        "most": max(found),
        "first_alarm_by": by,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="see that it works")
    given = parser.parse_args()
    scale = 100 if given.quick else 1
    runs = 4 if given.quick else 40
    record = {
        "command": "python benchmarks/monitor.py",
        "package": {k: v for k, v in (package() or {}).items() if k in ("version", "torch")},
        "calibration_samples": CALIBRATION,
        "level": LEVEL,
        "false_alarms": [false_alarms(name, runs, 25_000 // scale) for name in DRAWS]
        + [false_alarms("normal", 1, 1_000_000 // scale)],
        "delays": [
            delays(sign * size, runs // 2, 10_000 // scale)
            for size in (0.25, 0.5, 1.0)
            for sign in (-1, 1)
        ],
    }
    write_text(given.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
