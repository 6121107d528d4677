"""The post-hoc detectors in one pass beside pytorch-ood's, and beside what cannot be avoided.

    OODK_BENCH_LARGE=1 pytest benchmarks/test_posthoc.py --benchmark-only \
        --benchmark-group-by=group --benchmark-json=raw.json

Group "all": families A to D on features and logits. "read" reads both once; "products" are the
products of matrices that cannot be avoided (:func:`products`), at torch.mm's rate. pytorch-ood's
detectors, one after the other, take LOOP_ROWS rows, so compare "us a row"; each is first held
against ours of the same name, whose scores it must rank alike. The head is as sure of its classes
as trained networks are: where the largest logit leads by more than 17, scores in float32 are 1, or
pytorch-ood's least logarithm, for both, and have no ranks. Group "percentiles": one and twenty.
"dims": one dimension of ViM and all. "logits": GEN, KL matching and OpenMax beside one read of the
logits. "memory": the most that a process of its own took beyond its inputs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from clustering import QUICK, measure, median
from peers import pytorch_ood
from torch import Tensor, nn

from oodkernels import detectors, feature_stats
from oodkernels.detectors import OODDetector, score_all
from oodkernels.detectors.batch import Batch

Shape = tuple[int, int, int]  # rows, features, classes
LARGE = os.environ.get("OODK_BENCH_LARGE") == "1"
SHAPE: Shape = (40, 24, 6) if QUICK else (50_000, 2048, 1000) if LARGE else (4000, 512, 100)
LOGITS = (40, 12) if QUICK else (65_536, 1000)
LOOP_ROWS = 40 if QUICK else 200
A_B = (
    *("MSP", "MaxLogit", "Energy", "Entropy", "GEN", "KLMatching", "OpenMax"),
    *("SCALE", "LTS", "GradNorm", "FDBD", "NCI", "SHE", "CADRef", "PNML"),
)
C_D = (
    *("ReAct", "VRA", "ASHP", "ASHB", "ASHS", "DICE", "OptFS"),
    *("Mahalanobis", "RMDS", "MahalanobisPlusPlus", "RMDSPlusPlus", "ViM", "Residual", "NECO"),
)
PERCENTILES = torch.linspace(50, 99, 20).tolist()


class World(NamedTuple):
    """A head that classifies by class means, and samples like penultimate features."""

    head: nn.Linear
    train: Tensor
    train_logits: Tensor
    labels: Tensor
    x: Tensor
    logits: Tensor


@cache
def world(rows: int, d: int, classes: int) -> World:
    """Samples to fit to, at least three for each feature and for each class, and to score.

    A sample's class leads by 10 or so: no rounding decides, and every class is predicted.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, d, generator=generator).mul_(0.5)
    head = nn.Linear(d, classes).requires_grad_(False)
    head.weight.copy_((means - means.mean(0)) * 60 / d)
    head.bias.zero_()

    def samples(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, d, generator=generator)
        x = x.add_(means[torch.arange(n) % classes]).relu_()
        return x, head(x)

    train, train_logits = samples(3 * max(d, classes) + 30 * min(classes, 100))
    return World(head, train, train_logits, train_logits.argmax(1), *samples(rows))


@cache
def fitted(name: str, shape: Shape) -> OODDetector:
    kind, w = getattr(detectors, name), world(*shape)
    options: dict[str, Any] = {"head": w.head} if issubclass(kind, detectors.HeadDetector) else {}
    if name in ("ViM", "Residual"):
        options["dim"] = shape[1] // 2
    if "shrinkage" in kind.spec.options:
        options["shrinkage"] = 0.1
    detector: OODDetector = kind(**options)
    return detector.fit(features=w.train, logits=w.train_logits, labels=w.labels)


def theirs(shape: Shape) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """pytorch-ood's detectors by our names, each of (features, logits), higher = OOD."""
    package, w = pytorch_ood("detector"), world(*shape)
    head, weight, bias = w.head, w.head.weight, w.head.bias
    fit = w.train, w.labels
    of_maps = nn.Sequential(nn.Flatten(), head)
    own = nn.Linear(shape[1], shape[2])
    own.load_state_dict(head.state_dict())

    def on_maps(detector: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: detector.predict_feature_maps(x[:, :, None, None])

    def on_features(detector: Any, fits: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
        if fits:
            detector.fit_features(*fit)
        return lambda x, z: detector.predict_features(x)

    def on_logits(detector: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: detector.predict_logits(z)

    clip = float(fitted("ReAct", shape).clip)  # type: ignore[attr-defined]
    gradient = package.GradNorm(own, param_filter=lambda name: name == "weight")
    return {
        "MSP": on_logits(package.MaxSoftmax(None)),
        "MaxLogit": on_logits(package.MaxLogit(None)),
        "Energy": on_logits(package.EnergyBased(None)),
        "Entropy": on_logits(package.Entropy(None)),
        "KLMatching": on_logits(package.KLMatching(None).fit_logits(w.train_logits, w.labels)),
        "SCALE": on_maps(package.SCALE(None, of_maps, 0.85)),
        "LTS": on_features(package.LTS(None, head), fits=False),
        "GradNorm": lambda x, z: gradient.predict(x),
        "FDBD": on_features(package.fDBD(None, head)),
        "NCI": on_features(package.NCI(None, head, alpha=1e-4)),
        "SHE": on_features(package.SHE(None, head)),
        "ReAct": on_maps(package.ReAct(None, of_maps, threshold=clip)),
        "ASHS": on_maps(package.ASH(None, of_maps, "ash-s", 0.9)),
        "DICE": on_features(package.DICE(None, weight, bias, 0.9)),
        "Mahalanobis": on_features(package.Mahalanobis(None)),
        "RMDS": on_features(package.RMD(None)),
        "ViM": on_features(package.ViM(None, shape[1] // 2, weight, bias)),
    }


def ranks_alike(name: str, found: Tensor, expected: Tensor) -> None:
    """Constants and factors aside; a covariance with and without shrinkage is nearly the same."""
    both = torch.stack([found.double(), expected.double()]).argsort(1).argsort(1).double()
    least = 0.5 if name in ("Mahalanobis", "RMDS") else 0.99
    assert float(torch.corrcoef(both)[0, 1]) > least, name


def products(d: int, classes: int) -> list[Tensor]:
    """What features (N, d), or logits (N, C), must be multiplied by, whoever scores them.

    (d, C): the head for ReAct, VRA, ASH-P, ASH-B, ASH-S and DICE, each of other features or other
    weights; the class means for Mahalanobis and RMDS, and again for their ++ forms. (C, C): the
    logarithms of KL matching. A triangle of (d, d), which costs as much as (d, d / 2): the factor
    of PNML's Gram matrix, that of the tied covariance, that of the global one for RMDS, and again
    these two for the ++ forms. (d, d / 2): the principal subspace of ViM and Residual. NECO's few
    components are not counted.
    """
    widths = [*[classes] * 8, *[d // 2] * 6]
    return [torch.randn(classes, classes), *(torch.randn(width, d).T for width in widths)]


@pytest.mark.parametrize("peer", ["together", "A and B", "separately", "read", "products"])
def test_all(benchmark: Any, peer: str) -> None:
    """``score_all`` of all of them, of A and B alone, and one detector after the other."""
    benchmark.group = f"all {SHAPE}"
    w = world(*SHAPE)
    x, z, (rows, d, classes) = w.x, w.logits, SHAPE
    used = {n: fitted(n, SHAPE) for n in (A_B if peer == "A and B" else (*A_B, *C_D))}
    matrices = products(d, classes)
    sides = {d: x, classes: z}
    outs = [x.new_empty(rows, m.shape[1]) for m in matrices]

    def separately() -> None:
        for detector in used.values():
            detector.score(features=x, logits=z)

    calls: dict[str, Callable[[], Any]] = {
        "together": lambda: score_all(used, features=x, logits=z),
        "A and B": lambda: score_all(used, features=x, logits=z),
        "separately": separately,
        "read": lambda: (x.amax(), z.amax()),
        "products": lambda: [
            torch.mm(sides[len(m)], m, out=out) for m, out in zip(matrices, outs, strict=True)
        ],
    }
    measure(benchmark, calls[peer], peer=peer, rows=rows)
    benchmark.extra_info["us a row"] = 1e6 * median(benchmark) / rows


@pytest.mark.parametrize("peer", ["oodkernels", "pytorch-ood"])
@pytest.mark.parametrize("names", ["all", "GradNorm"])
def test_peers(benchmark: Any, names: str, peer: str) -> None:
    """Those that both have, in one ``score_all`` and one after the other; GradNorm alone."""
    benchmark.group = f"peers {SHAPE} {names}"
    w = world(*SHAPE)
    others = theirs(SHAPE)
    others = others if names == "all" else {names: others[names]}
    used = {name: fitted(name, SHAPE) for name in others}
    x, z = w.x[:LOOP_ROWS], w.logits[:LOOP_ROWS]
    expected = score_all(used, features=x, logits=z)
    if peer == "oodkernels":
        x, z = w.x, w.logits
        measure(benchmark, lambda: score_all(used, features=x, logits=z), peer=peer, rows=len(x))
    else:
        for name, call in others.items():
            ranks_alike(name, -call(x, z), expected[name])
        each = list(others.values())
        measure(benchmark, lambda: [call(x, z) for call in each], peer=peer, rows=len(x))
    benchmark.extra_info["us a row"] = 1e6 * median(benchmark) / len(x)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("name", ["feature_stats", "SCALE", "LTS", "ASHS"])
def test_percentiles(benchmark: Any, name: str, count: int) -> None:
    benchmark.group = f"percentiles {SHAPE} {name}"
    w, some = world(*SHAPE), [85.0] if count == 1 else PERCENTILES
    if name == "feature_stats":
        measure(benchmark, lambda: feature_stats(w.x, some), peer=count, rows=len(w.x))
        return
    settings = {f"{p}": fitted(name, SHAPE).varied(percentile=p) for p in some}
    measure(
        benchmark,
        lambda: score_all(settings, features=w.x, logits=w.logits),
        peer=count,
        rows=len(w.x),
    )


@pytest.mark.parametrize("dims", ["one", "all"])
def test_dims(benchmark: Any, dims: str) -> None:
    benchmark.group = f"dims {SHAPE}"
    w, d = world(*SHAPE), SHAPE[1]
    detector = fitted("ViM", SHAPE)
    settings = [{"dim": i} for i in range(1, d)]
    scorer = detector._scorer("ViM", settings)
    batch = Batch(None, w.logits, w.x)
    calls = {
        "one": lambda: detector.score(features=w.x, logits=w.logits),
        "all": lambda: scorer(batch.rows(slice(None))),
    }
    torch.testing.assert_close(calls["all"]()[:, d // 2 - 1], calls["one"](), rtol=1e-3, atol=1e-3)
    measure(benchmark, calls[dims], peer=dims, rows=len(w.x))


@pytest.mark.parametrize("name", ["GEN", "KLMatching", "OpenMax", "logit_scores", "read"])
def test_logits(benchmark: Any, name: str) -> None:
    benchmark.group = f"logits {LOGITS}"
    rows, classes = LOGITS
    w = world(rows, max(24, classes // 2), classes)
    z = w.logits
    kind = getattr(detectors, {"logit_scores": "Energy", "read": "Energy"}.get(name, name))
    detector = kind().fit(logits=w.train_logits, labels=w.labels)
    call = z.amax if name == "read" else lambda: detector.score(logits=z)
    measure(benchmark, call, peer=name, rows=rows)


MEMORY = """
import json, os, re, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_posthoc as bench
from oodkernels.detectors import FDBD, score_all
what, rows, d, classes, threads = sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)

def status(field):
    return int(re.findall(field + r":\\s+(\\d+)", open("/proc/self/status").read())[0]) / 1024

if what == "fdbd":
    g = torch.Generator().manual_seed(0)
    head = torch.randn(classes, d, generator=g), torch.zeros(classes)
    x, z = torch.rand(rows, d, generator=g), torch.randn(rows, classes, generator=g)
    used = {"fdbd": FDBD("norm", head=head).fit(features=x)}
    used["fdbd"]._checked = True  # logits at random cost no product
else:
    w = bench.world(rows, d, classes)
    x, z = w.x, w.logits
    used = {name: bench.fitted(name, (rows, d, classes)) for name in (*bench.A_B, *bench.C_D)}
score_all(used, features=x[:64], logits=z[:64])  # tables that are made once
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
score_all(used, features=x, logits=z)
print(json.dumps({"MiB beyond the inputs": status("VmHWM") - before, "peak MiB": status("VmHWM")}))
"""


@pytest.mark.parametrize("what", ["all", "fdbd"])
def test_memory(benchmark: Any, what: str) -> None:
    """All detectors at once; fDBD at the 21,841 classes of ImageNet-21k."""
    shape = SHAPE if what == "all" else (60, 16, 5000) if QUICK else (2000, 2048, 21_841)
    benchmark.group = f"memory {shape} {what}"
    arguments = [str(Path(__file__).parent), what, *map(str, (*shape, torch.get_num_threads()))]

    def run() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, *arguments],
            check=True,
            cwd=Path(__file__).parent,  # in a checkout its unbuilt sources would come first
            stdout=subprocess.PIPE,
            text=True,
        )
        found: dict[str, float] = json.loads(done.stdout)
        return found

    found = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(found, peer="oodkernels", threads=torch.get_num_threads())
