"""The demo over several seeds, and what the page on many classes says of it.

    python benchmarks/demo_table.py --out benchmarks/results/glyphs.json --folder glyphs

runs what ``oodk demo`` runs, a seed at a time or ``--jobs`` of them, and writes mean and standard
deviation of every figure. A backbone that the folder holds is used. Beside the demo: scores of the
MOS heads that the package has not (``mos_scores.py``), and MOS with other numbers of groups.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from mos_scores import measured
from tables import FIGURES, demo_table

from oodkernels import Groups
from oodkernels._files import write_text
from oodkernels.demo.heads import Features, Task, choose, read_features
from oodkernels.demo.methods import METHODS, Settings
from oodkernels.demo.report import grouped, kinds, to_json
from oodkernels.demo.study import Study, StudyResult
from oodkernels.evaluation import evaluate
from oodkernels.training import reproducible

COUNTS = (2, 5, 30, 100)
"""Numbers of groups beside the taxonomy's."""


def one(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of a seed."""
    start = time.process_time()
    with reproducible(settings.seed):
        study = Study(settings, folder, lambda what, done, total: None)
        result = study.run()
        features = read_features(study.folder / "features")
        record: dict[str, Any] = json.loads(to_json(result))
        record["kinds"] = kinds(result.evaluation)
        record["scores"] = {name: scores(result, name, features) for name in grouped(result)}
        record["group counts"] = counts(result, features)
    return record | {"CPU seconds": round(time.process_time() - start)}


@torch.no_grad()
def scores(result: StudyResult, name: str, features: Features) -> dict[str, Any]:
    """Every score that was tried on a MOS head, on test and validation sets."""
    head = result.choices[name].head
    sets = ("test", *result.data.ood)
    found = measured({n: head(features[n][0]) for n in sets}, head.groups)
    seen = measured(
        {n: head(features[n][0]) for n in ("validation", "validation_ood")},
        head.groups,
        "validation",
    )
    return {n: {**found[n], "validation": seen[n]["validation_ood"]} for n in found}


def counts(result: StudyResult, features: Features) -> list[dict[str, Any]]:
    """Averages of MOS in other numbers of groups, by the rate chosen for ten."""
    x, y = features["train"]
    total = int(y.max()) + 1
    means = torch.stack([x[y == c].mean(0) for c in range(total)])
    seed, rows = result.settings.seed, []
    for k in (k for k in COUNTS if k < total):
        for name, groups in (
            ("MOS features", Groups.from_features(means, k, seed=seed)),
            ("MOS random", Groups.random(total, k, seed=seed)),
        ):
            task = Task(name, torch.arange(total), groups, [result.choices[name].setting])
            head = choose(features, result.settings, task).head
            ood = {n: _loaded(features[n]) for n in result.data.ood}
            found = evaluate(head, _loaded(features["test"]), ood, [METHODS[name].score])
            (method,) = found.methods
            figures = method.figures["average"]
            row = {"model": name, "groups": k, "id_accuracy": method.id_accuracy}
            rows.append(row | {key: figures[key] for key in ("fpr95", "auroc")})
    return rows


def _loaded(samples: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"features": samples[0], "labels": samples[1]}]


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and OOD set, mean and standard deviation (n - 1) of each figure over the seeds.

    A method that one of the seeds has not, as its detector refused the data, is left out.
    """

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": _rounded(mean(values)), "std": _rounded(stdev(values))}

    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        for row in record["results"]:
            key = row["ood_set"], row["model"], row["score"]
            found.setdefault(key, []).append(row)
    return [
        dict(zip(("ood_set", "model", "score"), key, strict=True))
        | {figure: over([row[figure] for row in rows]) for figure in FIGURES}
        for key, rows in found.items()
        if len(rows) == len(records)
    ]


def per_seed(seeds: Sequence[int], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The averages over the OOD sets of every seed."""
    return [
        {"seed": seed}
        | {key: row[key] for key in ("ood_set", "model", "score")}
        | {figure: _rounded(row[figure]) for figure in FIGURES}
        for seed, record in zip(seeds, records, strict=True)
        for row in record["results"]
        if row["ood_set"] == "average"
    ]


def _rounded(fraction: float) -> float:
    return round(fraction, 6)


OF_SEED = ("methods", "curve", "claims", "scores", "group counts", "CPU seconds")
"""What is kept of every seed as it is."""


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--folder", type=Path, required=True, help="of backbones and features")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="as oodk demo --quick")
    given = parser.parse_args()
    if len(given.seeds) < 2:
        parser.error("--seeds must be at least two, for a standard deviation")
    make = Settings.quick if given.quick else Settings
    settings = [make(seed=seed) for seed in given.seeds]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(partial(one, folder=given.folder), settings))
    shared = {key: records[0][key] for key in ("convention", "data", "kinds", "software")}
    found = summary(records)
    head = {
        "format": "oodkernels.demo_table",
        "version": 2,
        **shared,
        "settings": {k: v for k, v in records[0]["settings"].items() if k != "seed"},
        "seeds": given.seeds,
    }
    text = json.dumps(head, indent=2)[:-2]
    seeds = [{key: record[key] for key in OF_SEED} for record in records]
    rows = {"summary": found, "results": per_seed(given.seeds, records), "by seed": seeds}
    for key, lines in rows.items():
        body = ",\n".join("    " + json.dumps(line, allow_nan=False) for line in lines)
        text += f',\n  "{key}": [\n{body}\n  ]'
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, text + "\n}\n")
    print(demo_table(found, shared["kinds"]))


if __name__ == "__main__":
    main()
