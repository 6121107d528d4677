"""Which benchmarks a run has time for: ours, the ceilings, and the best peer of each.

``pytest benchmarks --benchmark-only`` ends within ten minutes and says what it leaves out;
``--full`` runs everything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = 9.0
"""After so many nothing new is begun, as what has begun takes up to a minute."""
LONG = 1000.0
"""Milliseconds of a call whose benchmark waits until all shorter ones are done."""
PEER_PARAMETERS = ("peer", "name")
PEERS = (
    *("authors", "binned", "compiled", "eager", "faiss", "histc", "np.", "numpy", "official"),
    *("pytorch-ood", "scikit-learn", "sklearn", "torchmetrics"),
)
"""How the names of peers begin; "torch" is one, torch.mm and torch.sort are ceilings."""
CEILINGS = ("products", "read", "sgemm", "torch.mm")
"""Parameters of benchmarks that measure what no implementation can beat."""
RATES = {"read": "GB/s", "exp": "Gexp/s"}
"""Benchmarks named test_ceiling_... and the rate for which they are one."""


def recorded_times(folder: Path = RESULTS) -> dict[str, float]:
    """Name of a benchmark -> median in ms, of all that are recorded."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        rows = json.loads(file.read_text()).get("results")
        for row in rows if isinstance(rows, list) else ():
            if "median_ms" in row:
                found[row["name"]] = row["median_ms"]
    return found


def peer_of(parameters: Mapping[str, Any]) -> str | None:
    """The name of the peer that a benchmark with these parameters measures; None: it is ours."""
    for key in PEER_PARAMETERS:
        value = parameters.get(key)
        if isinstance(value, str) and (value == "torch" or value.startswith(PEERS)):
            return value
    return None


def best_peers(items: Sequence[Any], times: Mapping[str, float]) -> set[Any]:
    """Of every group of items that differ in the peer alone, the one with the least recorded time;
    where none is recorded the first."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for item in items:
        others = {k: str(v) for k, v in item.callspec.params.items() if k not in PEER_PARAMETERS}
        key = (item.nodeid.split("[")[0], *sorted(others.items()))
        groups.setdefault(key, []).append(item)
    return {min(group, key=lambda i: times.get(i.name, float("inf"))) for group in groups.values()}


def chosen(items: Sequence[Any], times: Mapping[str, float]) -> tuple[list[Any], list[Any]]:
    """Those that are run, and those that are left out: of what is short ours first, then the peers,
    then what takes long."""
    peers = [i for i in items if hasattr(i, "callspec") and peer_of(i.callspec.params)]
    best, every = best_peers(peers, times), set(peers)
    ours = [item for item in items if item not in every]
    run = ours + [i for i in peers if i in best]
    run.sort(key=lambda item: times.get(item.name, 0.0) > LONG)
    return run, [i for i in peers if i not in best]


def left_out(names: Iterable[str], total: int) -> str:
    """What a run has not measured, as lines."""
    files = Counter(name.split("/")[-1].split("[")[0].replace("::", " ") for name in names)
    if not files:
        return ""
    parts = "\n".join(f"  {n:4d} of {name}" for name, n in sorted(files.items()))
    count = sum(files.values())
    return f"{count} of {total} benchmarks were left out; --full runs them:\n{parts}"


def ceiling_shares(benchmarks: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """File and test -> shares of the ceiling, of every benchmark of ours that has one beside it.

    A share is a rate over that of ``test_ceiling_read`` or ``test_ceiling_exp`` at the same shape,
    of whichever it is nearer to; or the time of the slowest ceiling in the same group over ours.

    Args:
        benchmarks: As pytest-benchmark writes them, each with its ``stats["median"]`` in seconds.
    """
    rates: dict[tuple[str, str, str], float] = {}
    times: dict[tuple[str, str], float] = {}
    ours = []
    for one in benchmarks:
        file, test = one["fullname"].split("[")[0].split("/")[-1].split("::")
        shape = one["name"].partition("[")[2].rstrip("]")
        kind = test.removeprefix("test_ceiling_")
        if kind in RATES:
            rates[file, RATES[kind], shape] = one["extra_info"][RATES[kind]]
        elif any((one["params"] or {}).get(key) in CEILINGS for key in PEER_PARAMETERS):
            key = file, one["group"]
            times[key] = max(times.get(key, 0.0), one["stats"]["median"])
        elif peer_of(one["params"] or {}) is None:
            ours.append((file, test, shape, one))
    found: dict[str, list[float]] = {}
    for file, test, shape, one in ours:
        shares = [
            one["extra_info"][rate] / ceiling
            for (where, rate, suffix), ceiling in rates.items()
            if where == file and f"-{shape}".endswith(f"-{suffix}") and rate in one["extra_info"]
        ]
        if one["group"] and (file, one["group"]) in times:
            shares.append(times[file, one["group"]] / one["stats"]["median"])
        if shares:
            found.setdefault(f"{file} {test}", []).append(max(shares))
    return found


def share_lines(shares: Mapping[str, Sequence[float]]) -> str:
    """What :func:`ceiling_shares` found, a line a family."""
    lines = [
        f"  {family}: {median(each):.0%}, from {min(each):.0%} to {max(each):.0%} of {len(each)}"
        for family, each in sorted(shares.items())
    ]
    return "\n".join(["share of the ceiling, the median of ours:", *lines] if lines else [])
