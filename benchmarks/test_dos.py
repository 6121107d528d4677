"""DOS selection: the whole call beside the official one, and its share of a training step.

    pytest benchmarks/test_dos.py --benchmark-only --benchmark-group-by=group

The official call normalises the features with torch, clusters them with scikit-learn
(n_clusters=K, n_init=5) and loops over the clusters in NumPy. OODK_BENCH_QUICK=1 runs one round of
the smallest shape.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.benchmark
from clustering import QUICK, features, measure, median, shapes
from peers import official_dos
from torch import Tensor, nn

from oodkernels import dos_select

SELECT = 16 if QUICK else 64


@pytest.mark.parametrize("peer", ["oodkernels", "official", "official, 1 thread"])
@shapes((384, 342, 64), (384, 256, 64), (2048, 512, 64), (2048, 512, 256), (8192, 512, 256))
def test_selection(benchmark: Any, shape: tuple[int, int, int], peer: str) -> None:
    n, d, k = shape
    benchmark.group = f"DOS {shape}"
    x, prob = features(n, d), torch.rand(n)
    limit = 1 if "1 thread" in peer else None
    calls = {
        "oodkernels": lambda: dos_select(x, -prob, k, SELECT),
        "official": lambda: official_dos(x, prob, k, SELECT, limit),
    }
    measure(benchmark, calls[peer.split(",")[0]], peer=peer)


class WideResNet(nn.Module):
    """WRN-40-2 (Zagoruyko & Komodakis, BMVC 2016) for 32x32 images; logits and features."""

    def __init__(self, classes: int, depth: int = 40, width: int = 2) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        sizes = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            Block(
                sizes[stage] if i == 0 else sizes[stage + 1],
                sizes[stage + 1],
                2 if stage and i == 0 else 1,
            )
            for stage in range(3)
            for i in range(blocks)
        )
        self.norm = nn.BatchNorm2d(sizes[3])
        self.head = nn.Linear(sizes[3], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).relu().mean((2, 3))
        return self.head(x), x


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(x).relu()
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(out)).relu())


def test_share_of_a_training_step(benchmark: Any) -> None:
    """A DOS step on WRN-40-2: 384 candidates scored, 64 selected, 64 + 64 trained on."""
    benchmark.group = "training step"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, pool = (4, 24) if QUICK else (64, 384)
    classes = 10
    model = WideResNet(classes + 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    candidates = torch.randn(pool, 3, 32, 32, device=device)

    def score() -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            logits, x = model(candidates)
        return -logits.softmax(1)[:, -1], x

    def select(scores: Tensor, x: Tensor) -> Tensor:
        return dos_select(x, scores, batch, batch).indices

    def step() -> None:
        scores, x = score()
        chosen = select(scores, x)
        model.train()
        optimizer.zero_grad()
        logits, _ = model(torch.cat([images, candidates[chosen]]))
        target = torch.cat([labels, torch.full((batch,), classes, device=device)])
        nn.functional.cross_entropy(logits[:batch], target[:batch]).add(
            nn.functional.cross_entropy(logits[batch:], target[batch:])
        ).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    measure(benchmark, step, seconds=20, device=device)
    scores, x = score()
    timer = torch.utils.benchmark.Timer(
        "select(scores, x)", globals={"select": select, "scores": scores, "x": x}
    )
    seconds = timer.timeit(3 if QUICK else 50).median
    benchmark.extra_info["ms of selection"] = 1e3 * seconds
    benchmark.extra_info["share of the step"] = seconds / median(benchmark)
    assert QUICK or not seconds > 0.05 * median(benchmark)  # NaN where benchmarks are disabled
