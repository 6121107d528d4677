"""What people run today: the authors' loops restated, and the best of plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


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
    loss = torch.zeros(())
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
