"""Every op of ``torch.ops.oodk`` in plain torch: documentation, and the oracle of the tests.

Written to be read, not to be fast. Pass float64 for a result to hold others against.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _split(logits: Tensor, groups: Tensor) -> list[Tensor]:
    offsets = groups.tolist()
    logits = _accumulated(logits)
    return [logits[..., a:b] for a, b in pairwise(offsets)]


def mos_score(logits: Tensor, groups: Tensor) -> Tensor:
    """S_MOS = -min_k p_others^k: Huang & Li, CVPR 2021, section 3."""
    others = [z.softmax(-1)[..., 0] for z in _split(logits, groups)]
    return -torch.stack(others, -1).amin(-1)


def mos_predict(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, log-odds, class, group and probability of the class."""
    log_odds, prob, label = [], [], []
    first_class = 0
    for z in _split(logits, groups):
        p = z.softmax(-1)
        odds = z[..., 1:].logsumexp(-1) - z[..., 0]
        log_odds.append(torch.where(p[..., 0].isnan(), p[..., 0], odds))
        # Equal logits may get unequal probabilities in the last bit, so the logits decide.
        best = torch.where(p.isnan().any(-1, keepdim=True), torch.zeros_like(z), z)
        index = best[..., 1:].argmax(-1)
        prob.append(p[..., 1:].gather(-1, index.unsqueeze(-1)).squeeze(-1))
        label.append(index + first_class)
        first_class += z.shape[-1] - 1
    probs = torch.stack(prob, -1)
    group = probs.argmax(-1)

    def pick(per_group: list[Tensor]) -> Tensor:
        return torch.stack(per_group, -1).gather(-1, group.unsqueeze(-1)).squeeze(-1)

    score = mos_score(logits, groups)
    return score, torch.stack(log_odds, -1).amax(-1), pick(label), group, pick(prob)


def mos_log_others(logits: Tensor, groups: Tensor) -> Tensor:
    """Log p_others of every group, (..., K)."""
    return torch.stack([z.log_softmax(-1)[..., 0] for z in _split(logits, groups)], -1)


def mos_loss(logits: Tensor, target: Tensor, groups: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over the groups of each group's cross entropy, (...,); the paper averages the batch.

    A group that does not hold the target's class has target "others", its first column.
    """
    ignored = target == ignore_index
    loss = torch.zeros(target.shape, dtype=_accumulated(logits[:0]).dtype, device=logits.device)
    first_class = 0
    for z in _split(logits, groups):
        n_classes = z.shape[-1] - 1
        inside = (target >= first_class) & (target < first_class + n_classes) & ~ignored
        index = torch.where(inside, target - first_class + 1, 0)
        loss = loss - z.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        first_class += n_classes
    return torch.where(ignored, torch.zeros_like(loss), loss)


def logit_scores(
    logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MSP, maximum logit, energy, entropy and label; every score higher = more ID."""
    z = _accumulated(logits)
    p = (z / temperature).softmax(-1)
    energy = temperature * (z / temperature).logsumexp(-1)
    negative_entropy = -torch.special.entr(p).sum(-1)
    return p.amax(-1), z.amax(-1), energy, negative_entropy, z.argmax(-1)


def roc_metrics(id_scores: Tensor, ood_scores: Tensor, tpr: float = 0.95) -> Tensor:
    """The fields of ``ops.ROCMetrics`` in one vector, from counts at each distinct score."""
    x, y = id_scores.double().flatten(), ood_scores.double().flatten()
    n, m = len(x), len(y)
    level = torch.cat([x, y]).unique()
    # How many scores at each level, from it upwards, and up to it.
    a = torch.bincount(torch.searchsorted(level, x), minlength=len(level)).double()
    b = torch.bincount(torch.searchsorted(level, y), minlength=len(level)).double()
    id_from, ood_from = n - a.cumsum(0) + a, m - b.cumsum(0) + b
    id_to, ood_to = a.cumsum(0), b.cumsum(0)
    wins = (a * (ood_to - b)).sum() + (a * b).sum() / 2
    aupr_in = (a / n * (id_from / (id_from + ood_from))).sum()
    aupr_out = (b / m * (ood_to / (id_to + ood_to))).sum()
    share = Fraction(repr(tpr))
    kept = (id_from * share.denominator >= share.numerator * n).nonzero()[-1, 0]
    flagged = (ood_to * share.denominator >= share.numerator * m).nonzero()[0, 0]
    errors = (1 - id_from / n) / 2 + ood_from / m / 2
    fpr, fpr_out = ood_from[kept] / m, id_to[flagged] / n
    error = errors.amin().clamp(max=0.5)  # 0.5: a threshold beyond all scores
    areas = [wins / n / m, aupr_in, aupr_out]
    points = [fpr, fpr_out, level[kept], level[flagged], error]
    shares = [n / (n + m), m / (n + m), (a * b).sum() / n / m, n, m]
    return torch.tensor([*areas, *points, *shares], dtype=torch.float64, device=x.device)


def roc_histogram_(
    counts: Tensor,
    table: Tensor,
    scores: Tensor,
    side: int,
    rows: Tensor | None = None,
    atoms: Tensor | None = None,
) -> None:
    """Each score's counter from its order-preserving key; NaN is counted as refused."""
    n_atoms = 0 if atoms is None else atoms.numel()
    bins = counts.shape[1] - n_atoms - 4
    scores = scores.reshape(-1)
    row = torch.full_like(scores, side, dtype=torch.int64)
    if rows is not None:
        row += rows.reshape(-1)
    single = scores.float()
    bits = (single + 0.0).view(torch.int32)
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()

    entry = table[(key >> 16) + 32768]
    counter = (entry >> 5 & 0x7FFFFFF) + ((key & 0xFFFF) >> (entry & 31))
    if atoms is not None and n_atoms:
        place = torch.searchsorted(atoms.long(), key).clamp(max=n_atoms - 1)
        counter = torch.where(atoms[place] == key, bins + place, counter)
    facts = counts.shape[1] - 4
    counter = torch.where(scores.isnan(), facts + 1, counter)
    counts.index_put_((row, counter), torch.ones_like(key), accumulate=True)
    counts[:, facts] += torch.bincount(row[~scores.isnan()], minlength=counts.shape[0])
    counts[side, facts + 2] += (~scores.isnan() & (single.double() != scores.double())).sum()
    for low in (bits & 0xFFFF).unique().tolist():
        counts[side, facts + 3] |= low
