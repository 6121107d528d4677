"""Every op of ``torch.ops.oodk`` in plain torch: documentation, and the oracle of the tests.

Written to be read, not to be fast. Pass float64 for a result to hold others against.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
    log_odds, prob, label, rest = [], [], [], []
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
        # (1 - p) / p in logs, which tells probabilities apart that round to 1.
        others = z.scatter(-1, index.unsqueeze(-1) + 1, -math.inf).logsumexp(-1)
        odds = others - z[..., 1:].gather(-1, index.unsqueeze(-1)).squeeze(-1)
        rest.append(torch.where(p.isnan().any(-1), math.nan, odds))
        first_class += z.shape[-1] - 1
    group = torch.stack(rest, -1).argmin(-1)

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


def outlier_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy to the class, to the uniform distribution where target is -1; logsumexp."""
    z = _accumulated(logits)
    log_p = z.log_softmax(-1)
    classified = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = -torch.where(target == -1, log_p.mean(-1), classified)
    nan = log_p.isnan().any(-1)
    return loss, torch.where(nan, math.nan, z.logsumexp(-1))


def logit_scores(
    logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MSP, maximum logit, energy, entropy and label; every score higher = more ID."""
    z = _accumulated(logits)
    p = (z / temperature).softmax(-1)
    energy = temperature * (z / temperature).logsumexp(-1)
    negative_entropy = -torch.special.entr(p).sum(-1)
    return p.amax(-1), z.amax(-1), energy, negative_entropy, z.argmax(-1)


def gen_scores(logits: Tensor, gamma: Sequence[float], m: Sequence[int]) -> Tensor:
    """GEN, -sum of (p (1 - p))^gamma over the m largest p, of each pair of gamma and m."""
    z = _accumulated(logits)
    top = z.topk(min(max(m, default=1), z.shape[-1]))
    every = z.logsumexp(-1, keepdim=True)
    log_p = top.values - every
    others = z.scatter(-1, top.indices[..., :1], -math.inf).logsumexp(-1, keepdim=True) - every
    logs = log_p + torch.cat([others, torch.log1p(-log_p[..., 1:].exp())], -1)
    found = [-(g * logs[..., :k]).exp().sum(-1) for g, k in zip(gamma, m, strict=True)]
    return torch.stack(found, -1) if found else z.new_empty((*z.shape[:-1], 0))


def feature_stats(
    features: Tensor, percentiles: Tensor, rectified: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L1 and L2 norm, sum, and of each percentile the least and the sum of what lies above it."""
    x = _accumulated(features)
    x = x.relu() if rectified else x
    n = x.shape[-1]
    k = (n - (n * percentiles / 100).round().long()).clamp(min=1)
    k = k.expand(*x.shape[:-1], k.shape[-1])
    ordered = x.sort(-1, descending=True).values
    threshold, top = ordered.gather(-1, k - 1), ordered.cumsum(-1).gather(-1, k - 1)
    nan = x.isnan().any(-1, keepdim=True)
    threshold, top = (torch.where(nan, math.nan, t) for t in (threshold, top))
    return x.abs().sum(-1), x.norm(dim=-1), x.sum(-1), threshold, top


def scaled_energy(logits: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Energy of scale (z - bias) + bias for each scale."""
    z = _accumulated(logits)
    b = z.new_zeros(z.shape[-1]) if bias is None else bias
    return (scale[..., None] * (z - b)[..., None, :] + b).logsumexp(-1)


def indexed_distances(x: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Inner product, L1 and L2 distance of rows and those of a table, in float64."""
    wide, rows = x.double()[..., None, :], table.double()[index]
    d = wide - rows
    found = (wide * rows).sum(-1), d.abs().sum(-1), d.square().sum(-1).sqrt()
    return tuple(t.to(table.dtype) for t in found)


def shape_features(
    features: Tensor,
    shape: str,
    percentile: float | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """Features as ReAct (clip), VRA, ASH, SCALE and OptFS shape them; a copy."""
    x = _accumulated(features)
    if shape == "optfs":
        assert low is not None
        assert high is not None
        place = torch.searchsorted(low, x.contiguous(), right=True) - 1
        y = high[place.clamp(0, len(high) - 1)] * x
        y = torch.where((place >= 0) & (place < len(high)) | x.isnan(), y, 0)
        return y.to(features.dtype)
    if high is not None:
        y = x.minimum(high)
        return (y if low is None else torch.where(x < low, 0, y)).to(features.dtype)
    n = x.shape[-1]
    k = max(1, n - round(n * (percentile or 0.0) / 100))
    least = x.topk(k).values[..., -1:]
    above, equal = x > least, x == least
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    total = x.sum(-1, keepdim=True)
    factor = (total / torch.where(kept, x, 0).sum(-1, keepdim=True)).exp()
    y = {"ash-p": x, "ash-b": (total / k).expand_as(x), "ash-s": x * factor, "scale": x * factor}[
        shape
    ]
    y = y if shape == "scale" else torch.where(kept, y, 0)
    return torch.where(x.isnan().any(-1, keepdim=True), math.nan, y).to(features.dtype)


def roc_metrics(id_scores: Tensor, ood_scores: Tensor, tpr: float = 0.95) -> Tensor:
    """The fields of ``ops.ROCMetricsResult`` in one vector, from counts at each distinct score."""
    x, y = (t.double().flatten().contiguous() for t in (id_scores, ood_scores))
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


# --- K-means and DOS: x is one problem (N, d) or a batch of them (..., N, d) ----------------------


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random words of a counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            p1 >> 32 ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            p0 >> 32 ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


SEEDING, SAMPLE, FILL = 0, 1, 2
"""What a random number is for: the last word of the counter."""


def random_bits(seed: int, stream: int, restart: int, step: int, index: int) -> int:
    """64 random bits; a Philox block serves two indices."""
    words = philox((index // 2, step, restart, stream), seed)
    low = index % 2 * 2
    return words[low + 1] << 32 | words[low]


def uniform(bits: int) -> float:
    """Uniform in [0, 1), a multiple of 2^-53."""
    return (bits >> 11) * 2.0**-53


def _per_problem(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits leading dimensions: x (..., N, d), the others by the same leading dimensions."""
    batch = x.shape[:-2]
    flat = [t.reshape((math.prod(batch), *t.shape[len(batch) :])) for t in (x, *others)]
    return list(zip(*flat, strict=True))


def _stacked(batch: torch.Size, results: list[Tensor]) -> Tensor:
    return torch.stack(results).reshape((*batch, *results[0].shape))


def kmeans_points(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Points as they are clustered, and which of them are: all but those with NaN or inf."""
    x = _accumulated(x)
    valid = x.isfinite().all(-1) & (normalize | x.square().sum(-1).isfinite())
    if normalize:
        largest = torch.where(valid, x.abs().amax(-1), 1)
        tiny = (largest > 0) & (largest < math.sqrt(torch.finfo(x.dtype).tiny))  # squares are lost
        x = x / torch.where(tiny, largest, 1)[..., None]
        norm = torch.where(valid, x.norm(dim=-1), 1)
        x = x / torch.where(norm == 0, 1, norm)[..., None]
    return x, valid


def kmeans_init(
    x: Tensor, k: int, n_init: int = 1, n_trials: int = 0, seed: int = 0, normalize: bool = False
) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii, SODA 2007): the best of some candidates a step.

    The first centre is drawn uniformly, candidates with probability proportional to the squared
    distance to the centres so far; the one that leaves the least sum of squared distances wins.
    """
    trials = n_trials or 2 + int(math.log(k))

    def one(x: Tensor, restart: int) -> Tensor:
        points, valid = kmeans_points(x, normalize)
        rows = valid.nonzero()[:, 0]
        points = points[rows]
        chosen: list[int] = []
        d2 = points.new_full((len(points),), math.inf)
        for step in range(min(k, len(points))):
            draws = [uniform(random_bits(seed, SEEDING, restart, step, i)) for i in range(trials)]
            if step == 0:
                candidates = [int(draws[0] * len(points))]
            elif d2.sum() == 0:
                candidates = [min(set(range(len(points))) - set(chosen))]
            else:
                share = d2.double().cumsum(0)
                targets = torch.tensor(draws, dtype=torch.float64, device=x.device) * share[-1]
                candidates = torch.searchsorted(share, targets, right=True).tolist()
            distance = (points[candidates][:, None] - points).square().sum(-1)
            left = torch.minimum(d2, distance)
            best = int(left.sum(-1).argmin())
            chosen.append(candidates[best])
            d2 = left[best]
        unused = rows.new_full((k - len(chosen),), -1)
        return torch.cat([rows[chosen], unused])

    init = [torch.stack([one(p, r) for r in range(n_init)]) for (p,) in _per_problem(x)]
    if not init:
        return torch.empty((*x.shape[:-2], n_init, k), dtype=torch.int64, device=x.device)
    return _stacked(x.shape[:-2], init)


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    distance = (points[:, None] - centroids).square().sum(-1)
    return torch.where(distance.isnan(), math.inf, distance)


def nearest_centroid(
    x: Tensor, centroids: Tensor, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Index of the nearest centroid and the squared distance to it; -1 and NaN for a bad row."""
    if centroids.dim() > 2:
        results = [nearest_centroid(p, c, normalize) for p, c in _per_problem(x, centroids)]
        batch = x.shape[:-2]
        return _stacked(batch, [r[0] for r in results]), _stacked(batch, [r[1] for r in results])
    points, valid = kmeans_points(x.reshape(-1, x.shape[-1]), normalize)
    d2 = _squared_distances(points, centroids.to(points))
    best = d2.argmin(-1)
    found = valid & d2.gather(-1, best[:, None])[:, 0].isfinite()
    distance = torch.where(found, d2.gather(-1, best[:, None])[:, 0], math.nan)
    return torch.where(found, best, -1).view(x.shape[:-1]), distance.view(x.shape[:-1])


def nearest_neighbors(
    queries: Tensor, bank: Tensor, k: int, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared distances to the k nearest rows of the bank, and these rows; NaN and -1 if bad."""
    points, valid = kmeans_points(queries.reshape(-1, queries.shape[-1]), normalize)
    rows, known = kmeans_points(bank, normalize)
    d2 = torch.where(known, _squared_distances(points, rows.to(points)), math.inf)
    near = torch.sort(d2, dim=-1, stable=True)
    distances = torch.where(valid[:, None], near.values[:, :k], math.nan)
    indices = torch.where(valid[:, None], near.indices[:, :k], -1)
    shape = (*queries.shape[:-1], k)
    return distances.reshape(shape), indices.reshape(shape)


def lloyd(
    points: Tensor, centroids: Tensor, max_iter: int, tol: float, renormalize: bool
) -> tuple[Tensor, Tensor, float, int]:
    """Lloyd's iteration on finite points (N, d), from centroids (k, d), NaN where unused.

    Stops as scikit-learn does: when no label changes, or all are those of an iteration before, when
    the squared shifts of the centroids sum to at most tol times the mean variance of a feature, or
    after max_iter iterations.
    """
    k = len(centroids)
    d2 = _squared_distances(points, centroids)
    labels = d2.argmin(-1)
    limit = tol * float(points.var(0, correction=0).mean()) if len(points) else 0.0
    n_iter = 0
    seen: set[bytes] = set()
    while n_iter < max_iter and len(points):
        n_iter += 1
        # Labels that come again, at once or, with ties, after a few others, do not get better.
        state = labels.cpu().numpy().tobytes()
        if state in seen:
            break
        seen.add(state)
        # Empty clusters take the farthest points, from clusters that keep one.
        member = labels.clone()
        distance = d2.gather(1, labels[:, None])[:, 0]
        farthest = iter(distance.argsort(descending=True, stable=True).tolist())
        for c in range(k):
            if not (labels == c).any():
                for i in farthest:
                    if (member == member[i]).sum() > 1:
                        member[i] = c
                        break
        new = torch.stack([points[member == c].mean(0) for c in range(k)])
        if renormalize:
            norm = new.norm(dim=1, keepdim=True)
            new = new / torch.where(norm == 0, 1, norm)
        unused = new.isnan() & centroids.isnan()
        shift = float(torch.where(unused, 0, new - centroids).square().sum())
        centroids = new
        d2 = _squared_distances(points, centroids)
        labels = d2.argmin(-1)
        if shift <= limit:
            break
    inertia = float(d2.gather(1, labels[:, None]).sum()) if len(points) else 0.0
    return centroids, labels, inertia, n_iter


def kmeans(
    x: Tensor,
    init: Tensor,
    max_iter: int = 300,
    tol: float = 1e-4,
    normalize: bool = False,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lloyd's iteration from rows of x (..., n_init, k) or centroids (..., k, d): the best."""

    def one(x: Tensor, init: Tensor) -> tuple[Tensor, ...]:
        points, valid = kmeans_points(x, normalize)
        nan = points.new_full((1, x.shape[-1]), math.nan)
        starts = [init.to(points)]
        if init.dtype == torch.int64:
            usable = torch.cat([torch.where(valid[:, None], points, math.nan), nan])
            starts = [usable[rows] for rows in init]
        fits = [lloyd(points[valid], c, max_iter, tol, renormalize) for c in starts]
        centroids, labels, inertia, n_iter = min(fits, key=lambda fit: fit[2])
        all_labels = torch.full(valid.shape, -1, dtype=torch.int64, device=x.device)
        all_labels[valid] = labels
        return (
            centroids,
            all_labels,
            torch.tensor(inertia, dtype=torch.float64, device=x.device),
            torch.tensor(n_iter, device=x.device),
        )

    results = [one(*problem) for problem in _per_problem(x, init)]
    centroids, labels, inertia, n_iter = (
        _stacked(x.shape[:-2], list(output)) for output in zip(*results, strict=True)
    )
    return centroids, labels, inertia, n_iter


def cluster_argmax(labels: Tensor, scores: Tensor, k: int, m: int = 1) -> Tensor:
    """Rows of the m largest scores of each cluster, (..., k, m), -1 where there are fewer."""
    scores = torch.where(scores.isnan(), -math.inf, scores)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    out = torch.full((*labels.shape[:-1], k, m), -1, dtype=torch.int64, device=labels.device)
    for index in itertools.product(*map(range, labels.shape[:-1])):
        label, rows, best = labels[index], order[index], out[index]
        for c in range(k):
            members = rows[label[rows] == c][:m]
            best[c, : len(members)] = members
    return out


def dos_selection(
    labels: Tensor, scores: Tensor, k: int, n_select: int, seed: int = 0, mode: str = "default"
) -> Tensor:
    """The rows that DOS selects from labels (N,), -1 for a row left out, and scores (N,)."""
    m = 1 if k > n_select else n_select // k
    best = cluster_argmax(labels, scores, k, m)
    if k > n_select and mode == "official":
        best = best[:n_select]
    elif k > n_select:
        used = best[best[:, 0] >= 0]
        value = torch.where(scores.isnan(), -math.inf, scores)[used[:, 0]]
        kept = value.argsort(descending=True, stable=True)[:n_select]
        best = used[kept.sort().values]
    selected = [row for row in best.flatten().tolist() if row >= 0]
    others = [i for i, label in enumerate(labels.tolist()) if label >= 0 and i not in selected]
    others.sort(key=lambda i: (random_bits(seed, FILL, 0, 0, i), i))
    selected = (selected + others + [-1] * n_select)[:n_select]
    return torch.tensor(selected, device=labels.device)


def dos_select(
    features: Tensor,
    scores: Tensor,
    k: int,
    n_select: int,
    n_init: int = 5,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    mode: str = "default",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diverse outlier sampling: Jiang et al., ICLR 2024."""
    init = kmeans_init(features, k, n_init, seed=seed, normalize=True)
    centroids, labels, inertia, _ = kmeans(features, init, max_iter, tol, normalize=True)
    selected = [
        dos_selection(labels[index], scores[index], k, n_select, seed, mode)
        for index in itertools.product(*map(range, labels.shape[:-1]))
    ]
    return _stacked(labels.shape[:-1], selected), labels, centroids, inertia
