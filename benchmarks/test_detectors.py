"""Several detectors from one pass over the logits, against one pass each and against one read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from shapes import DETECTOR_SHAPES, even_groups, logits_of
from torch import Tensor

from oodkernels.detectors import MOS, MSP, Energy, Entropy, MaxLogit, OODDetector, score_all

shapes = pytest.mark.parametrize("shape", DETECTOR_SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

SOFTMAX: dict[str, OODDetector] = {
    "msp": MSP(),
    "max-logit": MaxLogit(),
    "energy": Energy(),
    "entropy": Entropy(),
}


def restated(logits: Tensor) -> dict[str, Tensor]:
    """The four scores in torch, from one softmax."""
    log_p = logits.log_softmax(1)
    max_logit = logits.amax(1)
    energy = max_logit - log_p.amax(1)
    entropy = (log_p.exp() * log_p).sum(1)
    return {
        "msp": log_p.amax(1).exp(),
        "max-logit": max_logit,
        "energy": energy,
        "entropy": entropy,
    }


def softmax_peers(logits: Tensor) -> dict[str, Callable[[], dict[str, Tensor]]]:
    def others() -> dict[str, Tensor]:
        package = peers.pytorch_ood("detector")
        detectors = {
            "msp": package.MaxSoftmax(None),
            "max-logit": package.MaxLogit(None),
            "energy": package.EnergyBased(None),
            "entropy": package.Entropy(None),
        }
        return {name: -d.predict_logits(logits) for name, d in detectors.items()}

    compiled = torch.compile(restated, dynamic=False)
    return {
        "oodk": lambda: score_all(SOFTMAX, logits=logits),
        "oodk-separately": lambda: {n: d.score(logits=logits) for n, d in SOFTMAX.items()},
        "pytorch-ood": others,
        "eager": lambda: restated(logits),
        "compiled": lambda: compiled(logits),
    }


@shapes
@dtypes
@pytest.mark.parametrize("peer", ["oodk", "oodk-separately", "pytorch-ood", "eager", "compiled"])
def test_softmax_detectors(
    measure: Any, shape: tuple[int, int], dtype: torch.dtype, peer: str
) -> None:
    """MSP, maximum logit, energy and entropy."""
    logits = logits_of(*shape, dtype)
    fn = softmax_peers(logits)[peer]
    # Peers compute in the type of the logits.
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    if peer == "pytorch-ood":  # its entropy clips probabilities, of which there are many
        tolerance = max(tolerance, 0.05)
    found, expected = fn(), score_all(SOFTMAX, logits=logits)
    for name in SOFTMAX:
        torch.testing.assert_close(
            found[name].float(), expected[name], rtol=tolerance, atol=tolerance
        )
    measure(fn, nbytes=logits.nbytes, exps=logits.numel())


@shapes
@dtypes
@pytest.mark.parametrize("together", [True, False], ids=["together", "separately"])
def test_softmax_and_mos(
    measure: Any, shape: tuple[int, int], dtype: torch.dtype, together: bool
) -> None:
    """These four and MOS with its log-odds: two reads instead of six."""
    groups = even_groups(shape[1], 8)
    detectors = {**SOFTMAX, "mos": MOS(groups), "log-odds": MOS(groups, log_odds=True)}
    logits = logits_of(shape[0], groups.width, dtype)

    def separately() -> dict[str, Tensor]:
        return {name: d.score(logits=logits) for name, d in detectors.items()}

    fn = (lambda: score_all(detectors, logits=logits)) if together else separately
    measure(fn, nbytes=logits.nbytes, exps=2 * logits.numel())


@shapes
@dtypes
def test_ceiling_read(measure: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Reading the logits once, all threads: what no score can beat where memory is the limit."""
    logits = logits_of(*shape, dtype).view(-1)
    words = logits[: logits.numel() // 4 * 4].view(torch.int64)  # adding integers costs least
    measure(words.sum, nbytes=words.numel() * 8)
