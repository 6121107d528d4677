"""Scores of a MOS head that were tried, by name; those that pay are detectors of the package.

    python benchmarks/mos_scores.py --out benchmarks/results/scale-scores.json

measures them on the SYNTHETIC features of ``scale.py``; ``demo_table.py`` does on the glyphs. Of a
group ``odds`` are logsumexp of its classes' logits less the logit of its "others"; the paper ranks
by their maximum.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodkernels import Groups, MOSHead, MOSLoss, mos_predict, ood_metrics
from oodkernels.data.synthetic import HierarchicalFeatures
from oodkernels.training import MOSOutlierObjective


class Parts:
    """What the scores are made of: of N samples and K groups."""

    def __init__(self, logits: Tensor, groups: Groups) -> None:
        slices = [logits[:, a:b] for a, b in groups.slices().tolist()]
        self.classes = torch.cat([part[:, 1:] for part in slices], 1)  # (N, C)
        self.lse = torch.stack([part[:, 1:].logsumexp(1) for part in slices], 1)  # (N, K)
        self.top = torch.stack([part[:, 1:].amax(1) for part in slices], 1)
        self.odds = self.lse - torch.stack([part[:, 0] for part in slices], 1)
        self.best = self.odds.argmax(1, keepdim=True)
        # Of the largest p^k_c of each group, in double as it nears 1.
        p = self.odds.double().sigmoid() * (self.top - self.lse).double().exp()
        self.class_odds = p.clamp(1e-300, 1 - 1e-15).logit()


def soft(temperature: float) -> Callable[[Parts], Tensor]:
    """All groups' odds, by a soft maximum."""
    return lambda p: temperature * (p.odds / temperature).logsumexp(1)


FORMULAS: dict[str, Callable[[Parts], Tensor]] = {
    "the paper's: maximum of log-odds": lambda p: p.odds.amax(1),
    "soft maximum, T = 1": soft(1),
    "soft maximum, T = 2": soft(2),
    "soft maximum, T = 4": soft(4),
    "sum of log-odds": lambda p: p.odds.sum(1),
    "energy of the classes": lambda p: p.classes.logsumexp(1),
    "MSP of the classes": lambda p: p.classes.softmax(1).amax(1),
    "log-odds times share in the group": lambda p: (
        p.odds.amax(1) * (p.top - p.lse).gather(1, p.best)[:, 0].exp()
    ),
    "log-odds times share among all classes": lambda p: (
        p.odds.amax(1) * p.classes.softmax(1).amax(1)
    ),
    "log-odds of the best class, which rank as its p^k_c": lambda p: p.class_odds.amax(1),
    "soft maximum of the groups' best classes, T = 1": lambda p: p.class_odds.logsumexp(1),
    "soft maximum of the groups' best classes, T = 2": lambda p: (p.class_odds / 2).logsumexp(1),
}


def measured(
    logits: dict[str, Tensor], groups: Groups, inside: str = "test"
) -> dict[str, dict[str, dict[str, float]]]:
    """Formula -> OOD set -> FPR95 and AUROC."""
    parts = {name: Parts(z, groups) for name, z in logits.items()}
    found = {}
    for name, formula in FORMULAS.items():
        scores = {key: formula(part) for key, part in parts.items()}
        results = ood_metrics(scores.pop(inside), scores)
        found[name] = {
            key: {"fpr95": round(results[key].fpr95, 5), "auroc": round(results[key].auroc, 5)}
            for key in scores
        }
    return found


def synthetic(classes: int, seed: int, steps: int = 400) -> list[dict[str, Any]]:
    """Rows of one world of ``scale.py``, and a quarter of its steps."""
    import scale

    settings = scale.FULL["mos"] | {"steps": steps}
    world = HierarchicalFeatures(classes, settings["groups"], seed=seed)
    means = scale.class_means(world, settings["means_per_class"] * classes)
    k = settings["groups"]
    grouped = {
        "taxonomy": world.taxonomy,
        "features": Groups.from_features(means, k, seed=seed),
        "random": Groups.random(classes, k, seed=seed),
    }
    heads: dict[str, nn.Module] = {n: MOSHead(world.width, g) for n, g in grouped.items()}
    losses: dict[str, nn.Module] = {n: MOSLoss(g) for n, g in grouped.items()}
    mean = means.mean(0)
    scale.train_heads(world, mean, heads, losses, settings)
    samples = {"test": world.sample("test", 5000)}
    samples |= {name: world.sample(name, 3000) for name in ("near", "far")}  # type: ignore[arg-type]
    grouped["taxonomy, with outliers"] = world.taxonomy
    heads["taxonomy, with outliers"] = with_outliers(world, mean, settings)
    rows = []
    with torch.no_grad():
        for name, head in heads.items():
            logits = {key: head(batch.features - mean) for key, batch in samples.items()}
            label = grouped[name].to_class(mos_predict(logits["test"], grouped[name]).label)
            accuracy = float((label == samples["test"].labels).double().mean())
            rows.append(
                {
                    "classes": classes,
                    "seed": seed,
                    "groups": name,
                    "accuracy": round(accuracy, 4),
                    "scores": measured(logits, grouped[name]),
                }
            )
    return rows


def with_outliers(world: HierarchicalFeatures, mean: Tensor, settings: dict[str, Any]) -> MOSHead:
    """A head whose others learn from the training world's outliers too, as many as there are ID."""
    import scale

    steps, size = settings["steps"], settings["batch"]
    head = MOSHead(world.width, world.taxonomy)
    objective = MOSOutlierObjective(groups=world.taxonomy)
    objective.prepare(head, lambda: mean)
    optimizer = torch.optim.SGD(head.parameters(), settings["lr"], momentum=0.9)
    batches = (world.batches(split, steps * size, size) for split in ("train", "outliers"))  # type: ignore[arg-type]
    for step, (inside, outside) in enumerate(zip(*batches, strict=True)):
        optimizer.param_groups[0]["lr"] = scale.rate(settings["lr"], step, steps)
        optimizer.zero_grad()
        x, outliers = inside.features - mean, outside.features - mean
        loss, _ = objective.step(head, x, inside.labels, outliers, None)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
    return head


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--classes", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    start = time.process_time()
    rows = [row for c in given.classes for s in given.seeds for row in synthetic(c, s)]
    head = {"data": "synthetic: oodkernels.data.synthetic.HierarchicalFeatures", "steps": 400}
    head |= {"CPU seconds": round(time.process_time() - start)}
    body = ",\n".join("    " + json.dumps(row) for row in rows)
    given.out.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "results": [\n{body}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
