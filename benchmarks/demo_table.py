"""The demo's table over several seeds: mean and standard deviation of every method.

    python benchmarks/demo_table.py --out benchmarks/results/demo-five-seeds.json

writes all figures of all seeds with the settings, and prints the table in Markdown. What ``oodk
demo`` trains, with its settings; each seed has its own train/test split, initial weights, order of
images, random groups and clustering.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tables import FIGURES, demo_table

from oodkernels._files import write_text
from oodkernels.demo.protocol import Settings, run
from oodkernels.demo.report import kinds, to_json
from oodkernels.training import TrainConfig


def one(settings: Settings) -> dict[str, Any]:
    """The record of a run, and which models were trained on what."""
    result = run(settings)
    record: dict[str, Any] = json.loads(to_json(result))
    return record | {"kinds": kinds(result.evaluation)}


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and OOD set, mean and standard deviation (n - 1) of each figure over the seeds."""

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": _rounded(mean(values)), "std": _rounded(stdev(values))}

    found = []
    for rows in zip(*(record["results"] for record in records), strict=True):
        keys = {key: rows[0][key] for key in ("ood_set", "model", "score")}
        assert all(keys.items() <= row.items() for row in rows)
        found.append(keys | {figure: over([row[figure] for row in rows]) for figure in FIGURES})
    return found


def per_seed(seeds: list[int], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every seed."""
    return [
        {"seed": seed}
        | {key: row[key] for key in ("ood_set", "model", "score")}
        | {figure: _rounded(row[figure]) for figure in FIGURES}
        for seed, record in zip(seeds, records, strict=True)
        for row in record["results"]
    ]


def _rounded(fraction: float) -> float:
    return round(fraction, 6)


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, a thread each")
    parser.add_argument("--epochs", type=int, help="by default those of the demo")
    parser.add_argument("--methods", nargs="+", help="by default all")
    given = parser.parse_args()
    if len(given.seeds) < 2:
        parser.error("--seeds must be at least two, for a standard deviation")
    chosen: dict[str, Any] = {}
    if given.epochs is not None:
        chosen["recipe"] = TrainConfig(epochs=given.epochs, accelerator="cpu")
    if given.methods is not None:
        chosen["methods"] = given.methods
    settings = [Settings(seed=seed, **chosen) for seed in given.seeds]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(one, settings))
    shared = {key: records[0][key] for key in ("convention", "methods", "data", "kinds")}
    found = summary(records)
    head = {
        "format": "oodkernels.demo_table",
        "version": 1,
        **shared,
        "settings": {k: v for k, v in records[0]["settings"].items() if k != "seed"},
        "seeds": given.seeds,
        "software": records[0]["software"],
    }
    text = json.dumps(head, indent=2)[:-2]
    for key, rows in (("summary", found), ("results", per_seed(given.seeds, records))):
        body = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in rows)
        text += f',\n  "{key}": [\n{body}\n  ]'
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, text + "\n}\n")
    print(demo_table(found, shared["kinds"]))


if __name__ == "__main__":
    main()
