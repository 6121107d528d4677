"""The CUDA kernels of outlier_cross_entropy, run on the CPU as in test_cuda_emulation.py."""

from __future__ import annotations

import torch
from cuda_emulator import Emulator
from test_cuda_emulation import (
    Sample,
    assert_close,
    check_backward,
    pytestmark,  # noqa: F401
    samples,
)
from torch import Tensor

from oodkernels import reference


def target_of(sample: Sample) -> Tensor:
    random = torch.Generator().manual_seed(1)
    target = torch.randint(-1, sample.width, (sample.rows,), generator=random)
    target[::3] = -1
    target[1::5] = sample.width - 1
    return target


@samples
def test_outlier_cross_entropy(emulator: Emulator, sample: Sample) -> None:
    logits, target = sample.logits.double().requires_grad_(), target_of(sample)
    expected = reference.outlier_cross_entropy(logits, target)
    outputs = dict.fromkeys(("loss", "logsumexp", "stats"), sample.accumulated)
    inputs = {"logits": sample.storage, "target": target}
    *found, stats = emulator.run("outlier_cross_entropy", inputs, outputs, **sample.values())
    assert_close(found, [e.detach() for e in expected])

    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(sample.rows, generator=random, dtype=sample.accumulated) for _ in range(2)]
    torch.autograd.backward(expected, [g.double() for g in grads])
    check_backward(
        emulator,
        "outlier_cross_entropy_backward",
        sample,
        logits,
        target=target,
        grad_loss=grads[0],
        grad_logsumexp=grads[1],
        stats=stats,
    )


def test_large_logits_lose_nothing(emulator: Emulator) -> None:
    sample = Sample(3, (300,))
    logits = 1e6 + (torch.arange(900).view(3, 300) % 7)  # exact in float32
    target = torch.tensor([-1, 4, -1])
    outputs = dict.fromkeys(("loss", "logsumexp", "stats"), torch.float32)
    loss, _, _ = emulator.run(
        "outlier_cross_entropy", {"logits": logits, "target": target}, outputs, **sample.values()
    )
    assert_close([loss], [reference.outlier_cross_entropy(logits.double(), target)[0]])


def test_invalid_targets_give_nan(emulator: Emulator) -> None:
    sample = Sample(7, (12,))
    target = torch.tensor([-2, 12, 2**62, -(2**63), 2**32, 11, -1])
    bad = torch.tensor([True] * 5 + [False] * 2)
    inputs = {"logits": sample.storage, "target": target}
    outputs = dict.fromkeys(("loss", "logsumexp", "stats"), torch.float32)
    loss, logsumexp, stats = emulator.run(
        "outlier_cross_entropy", inputs, outputs, **sample.values()
    )
    assert torch.equal(loss.isnan(), bad)
    assert_close([logsumexp], [sample.logits.logsumexp(-1)])
    inputs |= {"grad_loss": torch.ones(7), "grad_logsumexp": torch.ones(7), "stats": stats}
    (grad,) = emulator.run(
        "outlier_cross_entropy_backward", inputs, {"grad_logits": torch.float32}, **sample.values()
    )
    assert torch.equal(grad.view(7, 12).isnan(), bad[:, None].expand(7, 12))
