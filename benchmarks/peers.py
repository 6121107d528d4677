"""What people run today: the authors' loops restated, and the best of plain torch."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from clustering import directions, sklearn_kmeans
from numpy.typing import NDArray
from shapes import MosCase
from sklearn import metrics
from torch import Tensor

import oodkernels as oodk

Array = NDArray[Any]


@lru_cache
def pytorch_ood(module: str) -> types.ModuleType:
    """One of its modules: the packages around it want torchvision and more."""
    if "pytorch_ood" in sys.modules:
        (root,) = sys.modules["pytorch_ood"].__path__
    else:
        found = importlib.util.find_spec("pytorch_ood")
        if found is None or not found.submodule_search_locations:
            pytest.skip("needs pytorch-ood")
        (root,) = found.submodule_search_locations
    *parents, _ = f"pytorch_ood.{module}".split(".")
    for i in range(len(parents)):
        package = types.ModuleType(".".join(parents[: i + 1]))
        package.__path__ = [str(Path(root, *parents[1 : i + 1]))]
        sys.modules.setdefault(package.__name__, package)
    return import_module(f"pytorch_ood.{module}")


def official_score(logits: Tensor, slices: Tensor) -> Tensor:
    """The loop over group slices of the MOS code base (large_scale_ood)."""
    others = []
    for start, end in slices:
        others.append(F.softmax(logits[:, start:end], dim=-1)[:, 0])
    return -torch.stack(others, -1).min(-1)[0]


def official_predict(logits: Tensor, slices: Tensor) -> tuple[Tensor, Tensor]:
    """Its prediction: the best class a group, then the best group."""
    probs, labels = [], []
    for start, end in slices:
        best, index = F.softmax(logits[:, start:end], dim=-1)[:, 1:].max(-1)
        probs.append(best)
        labels.append(index)
    best, group = torch.stack(probs, -1).max(-1)
    return best, torch.stack(labels, -1).gather(1, group[:, None])


def official_loss(logits: Tensor, slices: Tensor, group_labels: Tensor) -> Tensor:
    """Its loss: one cross entropy a group; group_labels (rows, K) hold 0 for others."""
    loss = torch.zeros((), device=logits.device)
    for k, (start, end) in enumerate(slices):
        loss = loss + F.cross_entropy(logits[:, start:end], group_labels[:, k])
    return loss


def padded_score(logits: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Vectorised: groups gathered into (rows, K, widest) and padded with -inf."""
    z = logits[:, index].masked_fill(~valid, -torch.inf)
    return -z.softmax(-1)[..., 0].amin(-1)


def segment_score(logits: Tensor, segment: Tensor, first: Tensor) -> Tensor:
    """Vectorised: a scatter-max and a scatter-add over the columns' groups."""
    k = first.shape[0]
    wide = segment.expand_as(logits)
    m = logits.new_full((logits.shape[0], k), -torch.inf).scatter_reduce(1, wide, logits, "amax")
    e = (logits - m[:, segment]).exp()
    s = torch.zeros_like(m).scatter_add(1, wide, e)
    return -(e[:, first] / s).amin(-1)


def padded_loss(logits: Tensor, index: Tensor, valid: Tensor, group_labels: Tensor) -> Tensor:
    """The loss over the same padded view."""
    z = logits[:, index].masked_fill(~valid, -torch.inf)
    target = z.gather(-1, group_labels[..., None])[..., 0]
    return (z.logsumexp(-1) - target).sum(-1).mean()


def split_loss(logits: Tensor, sizes: list[int], columns: Tensor) -> Tensor:
    """Per-group log-sum-exps of ``split`` views: one concatenation in the backward, not K adds."""
    lse = torch.stack([z.logsumexp(-1) for z in logits.split(sizes, -1)], -1)
    return (lse - logits.gather(1, columns)).sum(-1).mean()


def split_score(logits: Tensor, sizes: list[int], first: Tensor) -> Tensor:
    lse = torch.stack([z.logsumexp(-1) for z in logits.split(sizes, -1)], -1)
    return -(logits[:, first] - lse).amin(-1).exp()


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, dynamic=False)


def bind(fn: Callable[..., Any], *args: Any) -> Callable[[Tensor], Any]:
    return lambda z: fn(z, *args)


def mos_scores(case: MosCase) -> dict[str, Callable[[Tensor], Tensor]]:
    """S_MOS of logits, by everybody."""
    padded = (case.index, case.valid)
    split = (case.sizes, case.first)
    return {
        "oodk": bind(oodk.mos_score, case.groups),
        "official": bind(official_score, case.slices),
        "eager-padded": bind(padded_score, *padded),
        "eager-segment": bind(segment_score, case.segment, case.first),
        "eager-split": bind(split_score, *split),
        "compiled-official": bind(compiled(official_score), case.slices),
        "compiled-padded": bind(compiled(padded_score), *padded),
        "compiled-split": bind(compiled(split_score), *split),
    }


def mos_losses(case: MosCase) -> dict[str, Callable[[Tensor], Tensor]]:
    """The mean loss of logits, by everybody."""
    padded = (case.index, case.valid, case.group_labels)
    split = (case.sizes, case.columns)
    return {
        "oodk": bind(oodk.mos_loss, case.target, case.groups),
        "official": bind(official_loss, case.slices, case.group_labels),
        "eager-padded": bind(padded_loss, *padded),
        "eager-split": bind(split_loss, *split),
        "compiled-official": bind(compiled(official_loss), case.slices, case.group_labels),
        "compiled-padded": bind(compiled(padded_loss), *padded),
        "compiled-split": bind(compiled(split_loss), *split),
    }


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """One step's: z requires a gradient."""
    z.grad = None
    loss(z).backward()
    assert z.grad is not None
    return z.grad


def eager_logit_scores(z: Tensor) -> tuple[Tensor, ...]:
    p = z.softmax(-1)
    max_logit, label = z.max(-1)
    return p.amax(-1), max_logit, z.logsumexp(-1), -torch.special.entr(p).sum(-1), label


# --- Outlier Exposure: the first len(target) rows are ID ---------------------------------------


def official_outlier_exposure(logits: Tensor, target: Tensor) -> Tensor:
    """The training loop of the OE code base (outlier-exposure)."""
    n = len(target)
    loss = F.cross_entropy(logits[:n], target)
    return loss + 0.5 * -(logits[n:].mean(1) - torch.logsumexp(logits[n:], dim=1)).mean()


def softmax_outlier_exposure(logits: Tensor, target: Tensor) -> Tensor:
    """One log-softmax of all rows."""
    n = len(target)
    log_p = logits.log_softmax(1)
    return F.nll_loss(log_p[:n], target) - 0.5 * log_p[n:].mean()


def logsumexp_outlier_exposure(logits: Tensor, target: Tensor) -> Tensor:
    """One log-sum-exp of all rows, and a weight a row."""
    n = len(target)
    lse = logits.logsumexp(1)
    loss = (lse[:n] - logits[:n].gather(1, target[:, None])[:, 0]).mean()
    return loss + 0.5 * (lse[n:] - logits[n:].mean(1)).mean()


# --- DOS ------------------------------------------------------------------------------------------


def official_dos(x: Tensor, prob: Tensor, k: int, n_select: int, limit: int | None) -> Array:
    """The selection step of Jiang et al.'s code; prob = p(C + 1 | x)."""
    labels = sklearn_kmeans(directions(x).numpy(), k, 5, limit).labels_
    weight = prob.numpy()
    chosen: list[int] = []
    m = 1 if k > n_select else n_select // k
    for c in range(min(k, n_select)):
        members = np.flatnonzero(labels == c)
        if len(members) > m:
            members = members[np.argsort(weight[members])[:m]]
        chosen.extend(members.tolist())
    others = np.setdiff1d(np.arange(len(x)), chosen)
    fill = np.random.default_rng(0).choice(others, n_select - len(chosen), replace=False)
    return np.concatenate([chosen, fill]).astype(np.int64)


# --- (FPR95, AUROC, AUPR-in, AUPR-out) of ID scores x and OOD scores y ----------------------------


def sklearn_roc(x: Array, y: Array) -> tuple[float, ...]:
    """The three functions of scikit-learn that papers call."""
    label = np.concatenate([np.ones(len(x), np.int8), np.zeros(len(y), np.int8)])
    score = np.concatenate([x, y])
    fpr, tpr, _ = metrics.roc_curve(label, score, drop_intermediate=False)
    return (
        float(fpr[np.searchsorted(tpr, 0.95)]),
        float(metrics.roc_auc_score(label, score)),
        float(metrics.average_precision_score(label, score)),
        float(metrics.average_precision_score(1 - label, -score)),
    )


def numpy_roc(x: Array, y: Array) -> tuple[float, ...]:
    """One sort and cumulative counts at the distinct scores."""
    score = np.concatenate([x, y])
    order = np.argsort(-score)
    score, is_id = score[order], order < len(x)
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))
    tp = np.cumsum(is_id)[last]
    return _figures(np, tp.astype(np.float64), (last + 1 - tp).astype(np.float64))


def torch_roc(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """The same in torch, with its radix sort of 32-bit integer keys."""
    bits = torch.cat([x, y]).view(torch.int32)
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key, order = (-1 - key).sort()
    last = torch.cat([key[1:] != key[:-1], key.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    tp = (order < len(x)).cumsum(0)[last]
    return _figures(torch, tp.double(), (last + 1 - tp).double())


def _figures(xp: Any, tp: Any, fp: Any) -> tuple[float, ...]:
    n, m = tp[-1], fp[-1]
    zero = xp.zeros_like(tp[:1])
    tp0, fp0 = xp.concatenate([zero, tp[:-1]]), xp.concatenate([zero, fp[:-1]])
    gained, false = tp - tp0, fp - fp0
    return (
        float(fp[xp.searchsorted(tp, xp.ceil(0.95 * n))] / m),
        float((false * (tp + tp0)).sum() / (2 * n * m)),
        float((gained * tp / (tp + fp)).sum() / n),
        float((false * (m - fp0) / (m - fp0 + n - tp0)).sum() / m),
    )


def unit_scores(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in [0, 1], lest torchmetrics apply a sigmoid, and labels, 1 for ID."""
    both = torch.cat([x, y])
    label = torch.cat([torch.ones_like(x), torch.zeros_like(y)]).long()
    return (both - both.min()) / (both.max() - both.min()), label


def torchmetrics_roc(classification: Any, score: Tensor, label: Tensor) -> tuple[float, ...]:
    """The exact (unbinned) functions of torchmetrics, for :func:`unit_scores`."""
    fpr, tpr, _ = classification.binary_roc(score, label)
    return (
        float(fpr[torch.searchsorted(tpr, 0.95)]),
        float(classification.binary_auroc(score, label)),
        float(classification.binary_average_precision(score, label)),
        float(classification.binary_average_precision(1 - score, 1 - label)),
    )


def pytorch_ood_roc(package: Any, outlier: Tensor, label: Tensor) -> tuple[float, ...]:
    """One collection, whose metrics share a sort; its FPR95 has OOD as positive."""
    figures = package.MetricCollection(
        [
            package.FPRAtTPR(),
            package.AUROC(),
            package.AUPR(positive="id"),
            package.AUPR(positive="ood"),
        ]
    )
    return tuple(figures.update(scores=outlier, labels=label).compute().values())
