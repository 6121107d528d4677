"""FPR95 and AUROC against the number of classes (MOS), and of mined outliers (DOS), at scale.

    python benchmarks/scale.py --out benchmarks/results       # fifteen minutes on four cores
    python benchmarks/scale.py --out scale --quick            # a minute, to see that it works

Needs matplotlib. The features are SYNTHETIC (``oodkernels.data.synthetic``). The study shows how
methods compare in that world, not on images.

MOS (after a figure of Huang & Li, CVPR 2021): linear heads on the features, trained by SGD as in
the paper's fine-tuning of the head alone (zero start, momentum 0.9, batch 512, warm-up, rate
divided by 10 at 30, 60 and 90 % of the steps), without mixup, and with the features' mean taken off
so that few steps at a high rate do. All heads for a number of classes see the same batches in the
same order, and as many steps whatever the number of classes. Flat softmax is scored by MSP and
energy; MOS heads, with groups by taxonomy, from clustered features and at random, by the log-odds
that rank as S_MOS does. OOD: held-out classes of known super-classes (near), held-out super-classes
(far).

DOS (Jiang et al., ICLR 2024): a small network with an absent class is trained on the features, each
step on 64 ID samples and 64 outliers that a miner selects of 384 candidates. Greedy takes the 64
that look most in-distribution, DOS one of each of 64 clusters. One without outliers, scored by
energy, stands beside them. The OOD test sets hold no kind of outlier seen in training, a kind being
a super-class.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import oodkernels
from oodkernels import (
    DOSMiner,
    Groups,
    MOSHead,
    MOSLoss,
    NTOMMiner,
    OutlierMiner,
    UniformMiner,
    logit_scores,
    mos_predict,
    ood_metrics,
)
from oodkernels.data.synthetic import HierarchicalFeatures

Row = dict[str, Any]

SETS = ("near", "far")
FULL: dict[str, Any] = {
    "mos": {
        "classes": [100, 300, 1000, 3000, 10000, 20000],
        "seeds": {100: 3, 300: 3, 1000: 3, 3000: 2},
        "groups": 8,
        "steps": 1600,
        "batch": 512,
        "lr": 4.0,
        "means_per_class": 20,
        "n_id": 20000,
        "n_ood": 10000,
    },
    "dos": {
        "classes": 100,
        "seeds": 4,
        "steps": 2000,
        "batch": 64,
        "candidates": 384,
        "hidden": 256,
        "lr": 0.05,
        "evaluations": 10,
        "n_id": 10000,
        "n_ood": 10000,
    },
}
QUICK: dict[str, Any] = {
    "mos": FULL["mos"]
    | {"classes": [100, 300, 1000], "seeds": {}, "steps": 300, "n_id": 4000, "n_ood": 2000},
    "dos": FULL["dos"] | {"seeds": 1, "steps": 300, "evaluations": 3, "n_id": 4000, "n_ood": 2000},
}


def rate(lr: float, step: int, steps: int) -> float:
    """Of a step: warm-up over 2.5 % of the steps, then as BiT's fine-tuning."""
    warm = min(1.0, (step + 1) / max(1, steps // 40))
    return lr * warm * 0.1 ** sum(step >= share * steps for share in (0.3, 0.6, 0.9))


def metrics(id_scores: Tensor, ood: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    results = ood_metrics(id_scores, ood)
    return {name: {"fpr95": results[name].fpr95, "auroc": results[name].auroc} for name in ood}


# --- MOS ------------------------------------------------------------------------------------------


def mos_study(settings: dict[str, Any], say: Callable[[str], None]) -> Iterator[Row]:
    for classes in settings["classes"]:
        for seed in range(settings["seeds"].get(classes, 1)):
            start = time.perf_counter()
            yield from mos_run(classes, seed, settings)
            say(f"MOS, {classes} classes, seed {seed}: {time.perf_counter() - start:.0f} s")


def mos_run(classes: int, seed: int, settings: dict[str, Any]) -> Iterator[Row]:
    world = HierarchicalFeatures(classes, settings["groups"], seed=seed)
    k = settings["groups"]
    means = class_means(world, settings["means_per_class"] * classes)
    mean = means.mean(0)
    grouped = {
        "taxonomy": world.taxonomy,
        "features": Groups.from_features(means, k, seed=seed),
        "random": Groups.random(classes, k, seed=seed),
    }
    flat = nn.Linear(world.width, classes)
    nn.init.zeros_(flat.weight)
    nn.init.zeros_(flat.bias)
    heads: dict[str, nn.Module] = {"flat": flat}
    heads |= {name: MOSHead(world.width, groups) for name, groups in grouped.items()}
    losses: dict[str, nn.Module] = {"flat": nn.CrossEntropyLoss()}
    losses |= {name: MOSLoss(groups) for name, groups in grouped.items()}
    train_heads(world, mean, heads, losses, settings)

    scores: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    right: dict[str, int] = defaultdict(int)
    with torch.no_grad():
        for split, n in (("test", settings["n_id"]), *((s, settings["n_ood"]) for s in SETS)):
            for batch in world.batches(split, n):  # type: ignore[arg-type]
                for name, head in heads.items():
                    logits = head(batch.features - mean)
                    if name == "flat":
                        found = logit_scores(logits)
                        scores["MSP"][split].append(found.msp)
                        scores["Energy"][split].append(found.energy)
                        label = found.label
                    else:
                        groups = grouped[name]
                        prediction = mos_predict(logits, groups)
                        scores[f"MOS, {name}"][split].append(prediction.log_odds)
                        label = groups.to_class(prediction.label)
                    right[name] += int((label == batch.labels).sum())  # of OOD none is right
    for method, of_split in scores.items():
        by_set = {split: torch.cat(parts) for split, parts in of_split.items()}
        head_name = method.removeprefix("MOS, ") if method.startswith("MOS") else "flat"
        for name, figures in metrics(by_set.pop("test"), by_set).items():
            yield {
                "classes": classes,
                "seed": seed,
                "method": method,
                "set": name,
                **rounded(figures),
                "accuracy": round(right[head_name] / settings["n_id"], 4),
            }


def class_means(world: HierarchicalFeatures, n: int) -> Tensor:
    """Of the first n training samples; of all of them for a class without any."""
    total = torch.zeros(world.num_classes, world.width)
    count = torch.zeros(world.num_classes)
    for batch in world.batches("train", n):
        total.index_add_(0, batch.labels, batch.features)
        count += batch.labels.bincount(minlength=world.num_classes)
    return torch.where(count[:, None] > 0, total / count[:, None], total.sum(0) / count.sum())


def train_heads(
    world: HierarchicalFeatures,
    mean: Tensor,
    heads: dict[str, nn.Module],
    losses: dict[str, nn.Module],
    settings: dict[str, Any],
) -> None:
    steps, batch_size = settings["steps"], settings["batch"]
    parameters = [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.SGD(parameters, settings["lr"], momentum=0.9)
    for step, batch in enumerate(world.batches("train", steps * batch_size, batch_size)):
        optimizer.param_groups[0]["lr"] = rate(settings["lr"], step, steps)
        optimizer.zero_grad()
        for name, head in heads.items():  # one at a time: a head's logits are the most memory
            losses[name](head(batch.features - mean), batch.labels).backward()
        optimizer.step()


# --- DOS ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two hidden layers; gives logits, the absent class last, and penultimate features."""

    def __init__(self, width: int, hidden: int, columns: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, columns)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


MINED: dict[str, Callable[[int, int], OutlierMiner | None]] = {
    "no outliers": lambda n, seed: None,
    "uniform": lambda n, seed: UniformMiner(seed),
    "greedy": lambda n, seed: NTOMMiner(0.0, seed=seed),
    "NTOM": lambda n, seed: NTOMMiner(0.125, seed=seed),
    "DOS": lambda n, seed: DOSMiner(seed=seed),
}


def dos_study(settings: dict[str, Any], say: Callable[[str], None]) -> Iterator[Row]:
    for seed in range(settings["seeds"]):
        for name in MINED:
            start = time.perf_counter()
            yield from dos_run(name, seed, settings)
            say(f"DOS, {name}, seed {seed}: {time.perf_counter() - start:.0f} s")


def dos_run(name: str, seed: int, settings: dict[str, Any]) -> Iterator[Row]:
    classes, steps, batch = settings["classes"], settings["steps"], settings["batch"]
    world = HierarchicalFeatures(classes, seed=seed)
    miner = MINED[name](batch, seed)
    torch.manual_seed(seed)
    model = Net(world.width, settings["hidden"], classes + 1)
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], 0.9, weight_decay=1e-4, nesterov=True
    )
    tests = {s: world.sample(s, settings["n_ood"]).features for s in SETS}
    test = world.sample("test", settings["n_id"])
    kinds = 0.0
    every = steps // settings["evaluations"]
    for step, (inside, pool) in enumerate(
        zip(
            world.batches("train", steps * batch, batch),
            world.batches("outliers", steps * settings["candidates"], settings["candidates"]),
            strict=True,
        )
    ):
        optimizer.param_groups[0]["lr"] = rate(settings["lr"], step, steps)
        x, target = inside.features, inside.labels
        if miner is not None:
            with torch.no_grad():
                logits, features = model(pool.features)
            chosen = miner.select(features, logits, batch)
            kinds += len(pool.groups[chosen].unique()) / steps
            x = torch.cat([x, pool.features[chosen]])
        optimizer.zero_grad()
        logits, _ = model(x)
        loss = F.cross_entropy(logits[:batch], target)
        if miner is not None:
            loss = loss + F.cross_entropy(logits[batch:], torch.full((batch,), classes))
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                logits, _ = model(test.features)
                accuracy = (logits[:, :classes].argmax(1) == test.labels).double().mean()
                scores = {n: absent(model(f)[0], miner is not None) for n, f in tests.items()}
                for set_name, figures in metrics(absent(logits, miner is not None), scores).items():
                    yield {
                        "miner": name,
                        "seed": seed,
                        "step": step + 1,
                        "set": set_name,
                        **rounded(figures),
                        "accuracy": round(float(accuracy), 4),
                        "kinds": round(kinds * steps / (step + 1), 2),
                    }


def absent(logits: Tensor, trained: bool) -> Tensor:
    """Ranks as 1 - p(C + 1 | x); energy over the classes where the absent one has no training."""
    energy = logit_scores(logits[:, :-1]).energy
    return energy - logits[:, -1] if trained else energy


# --- records and figures --------------------------------------------------------------------------


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in figures.items()}


def machine() -> dict[str, Any]:
    try:
        from cpuinfo import get_cpu_info

        processor = get_cpu_info().get("brand_raw")
    except ImportError:
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "oodkernels": oodkernels.__version__,
    }


def write(path: Path, settings: dict[str, Any], rows: list[Row], seconds: float) -> None:
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "data": "synthetic: oodkernels.data.synthetic.HierarchicalFeatures",
        "seconds": round(seconds),
        "machine": machine(),
        "settings": settings,
    }
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "results": [\n{lines}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=os.environ.get("OODK_BENCH_QUICK") == "1",
        help="reduced sizes, to see that it works; so does OODK_BENCH_QUICK=1",
    )
    parser.add_argument("--only", choices=["mos", "dos"], help="one of the two studies")
    parser.add_argument("--plot", action="store_true", help="only plot what --out holds")
    arguments = parser.parse_args()
    import scale_plots  # before the work: matplotlib may be missing

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, study in (("mos", mos_study), ("dos", dos_study)):
        if arguments.only not in (None, name):
            continue
        path = arguments.out / f"scale-{name}.json"
        if not arguments.plot:
            settings = (QUICK if arguments.quick else FULL)[name]
            start = time.perf_counter()
            rows = list(study(settings, lambda line: print(line, flush=True)))
            world = HierarchicalFeatures(100).settings()
            for varies in ("num_classes", "seed"):
                del world[varies]
            write(path, settings | {"world": world}, rows, time.perf_counter() - start)
        scale_plots.PLOTS[name](json.loads(path.read_text()), path.with_suffix(""))


if __name__ == "__main__":
    main()
