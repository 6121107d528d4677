"""Outlier mining: which of many candidate outliers a training step, or an epoch, learns from.

One interface, :meth:`OutlierMiner.select`, for the candidates of one step or a whole pool:

==================== ==================================== ======================================
:class:`UniformMiner` at random                            Outlier Exposure, Hendrycks, ICLR 2019
:class:`NTOMMiner`    a window of the hardest              Chen et al., ECML 2021
:class:`POEMMiner`    nearest a sampled boundary           Ming et al., ICML 2022
:class:`DOSMiner`     the hardest of every cluster         Jiang et al., ICLR 2024
==================== ==================================== ======================================

Features and logits are what the model gives for the candidates in evaluation mode; tensors on any
device, or NumPy arrays, memory-mapped ones too: those are read where they are. All random numbers
follow from the miner's seed and the number of selections before, so a run that is resumed from
:meth:`~OutlierMiner.state_dict` draws as one that was not interrupted, on CPU and CUDA alike.
"""

from __future__ import annotations

import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._checks import accumulate_type, check_floating
from oodkernels.ops import dos_select, logit_scores
from oodkernels.training._plain import Recorded

__all__ = [
    "MINERS",
    "DOSMiner",
    "MiningLog",
    "NTOMMiner",
    "OutlierMiner",
    "POEMMiner",
    "ScoreHistogram",
    "UniformMiner",
]

Candidates: TypeAlias = Tensor | NDArray[Any]
Score: TypeAlias = Literal["absent-class", "energy", "max-logit"]
Mode: TypeAlias = Literal["default", "official"]

_CHUNK = 1 << 14  # rows that are converted to a wider type at once


class ScoreHistogram(NamedTuple):
    """What :meth:`MiningLog.histogram` returns; NumPy arrays."""

    edges: NDArray[np.float64]
    """(bins + 1,): bin i spans [edges[i], edges[i + 1]), the last one both its edges."""
    candidates: NDArray[np.int64]
    """(bins,): candidates in each bin."""
    selected: NDArray[np.int64]
    """(bins,): of those, how many were selected."""


@dataclass(frozen=True, eq=False)
class MiningLog:
    """What one selection looked at. Figures are computed when they are asked for.

    Attributes:
        step: Number of the selection, from 0.
        indices: (n,) int64, what was selected.
        candidates: N, number of candidates.
        scores: (N,) what they were ranked by: how in-distribution they look, higher = more (NTOM,
            DOS), or the distance from the boundary, abs(beta . z) (POEM). None: by nothing.
        labels: (N,) int64 cluster of each candidate (DOS), else None.
        clusters: Number of clusters (DOS), else 0.
    """

    step: int
    indices: Tensor
    candidates: int
    scores: Tensor | None = None
    labels: Tensor | None = None
    clusters: int = 0

    @property
    def occupancy(self) -> Tensor | None:
        """Candidates in each cluster, (clusters,) int64; None where nothing was clustered."""
        return None if self.labels is None else self.labels.bincount(minlength=self.clusters)

    @property
    def empty_clusters(self) -> int | None:
        """Number of clusters without a candidate; None where nothing was clustered."""
        occupancy = self.occupancy
        return None if occupancy is None else int((occupancy == 0).sum())

    def histogram(self, bins: int = 32) -> ScoreHistogram | None:
        """Scores of the candidates and of the selected, in equal bins; None without scores."""
        if self.scores is None:
            return None
        scores = self.scores.double().cpu().numpy()
        counts, edges = np.histogram(scores, bins)
        selected, _ = np.histogram(scores[self.indices.cpu().numpy()], edges)
        return ScoreHistogram(edges, counts, selected)

    def summary(self) -> dict[str, float]:
        """The figures that go into a line of a training log."""
        figures: dict[str, float] = {
            "step": self.step,
            "candidates": self.candidates,
            "selected": len(self.indices),
        }
        if self.scores is not None:
            figures["score_mean"] = float(self.scores.mean())
            figures["score_mean_selected"] = float(self.scores[self.indices].mean())
        occupancy = self.occupancy
        if occupancy is not None:
            figures["clusters"] = self.clusters
            figures["empty_clusters"] = int((occupancy == 0).sum())
            figures["largest_cluster"] = int(occupancy.max())
        return figures


class OutlierMiner(Recorded, ABC):
    """Selects outliers to train on. See the subclasses.

    Args:
        seed: Of all random numbers, >= 0.

    Attributes:
        name: That in :data:`MINERS`.
        options: The arguments that it was made with, as plain values.
        needs: Which of ``"features"`` and ``"logits"`` :meth:`select` reads.
        step: Number of selections so far.
        last: What the last selection looked at; None before the first.
    """

    name: ClassVar[str] = "miner"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, seed: int = 0) -> None:
        self.seed = operator.index(seed)
        if self.seed < 0:
            raise ValueError(f"{type(self).__name__}: seed must be >= 0, got {seed}")
        self.step = 0
        self.last: MiningLog | None = None

    @torch.no_grad()
    def select(self, features: Candidates | None, logits: Candidates | None, n: int) -> Tensor:
        """Select n of N candidates.

        Args:
            features: (N, d) penultimate features, float64, float32, bfloat16 or float16; None where
                the miner does not need them.
            logits: (N, C), or (N, C + 1) with the absent class last; of such a type; None where the
                miner does not need them.
            n: Candidates to select, 1..N.

        Returns:
            (n,) int64, distinct indices of candidates, on their device.

        Raises:
            ValueError: Something that is needed is missing, a shape is wrong, ``n`` is out of
                range, or what is needed of a row is not finite.
            TypeError: Not of a floating-point type above.
        """
        where = f"{type(self).__name__}.select"
        x, z = _matrix(where, "features", features), _matrix(where, "logits", logits)
        for name, value in (("features", x), ("logits", z)):
            if value is None and name in self.needs:
                raise ValueError(f"{where}: {name} must be given, got None")
        given = z if x is None else x
        if given is None:
            raise ValueError(f"{where}: features or logits must be given, got neither")
        if x is not None and z is not None and (len(x), x.device) != (len(z), z.device):
            raise ValueError(
                f"{where}: features and logits must be of the same candidates on one device, got "
                f"{len(x)} on {x.device} and {len(z)} on {z.device}"
            )
        candidates = len(given)
        n = operator.index(n)
        if not 1 <= n <= candidates:
            raise ValueError(
                f"{where}: n must be in 1..{candidates}, the number of candidates, got {n}"
            )
        self.last = self._select(where, x, z, n)
        self.step += 1
        return self.last.indices

    @abstractmethod
    def _select(self, where: str, x: Any, z: Any, n: int) -> MiningLog:
        """Select from (N, d) features and (N, C) logits that passed the checks."""

    def update(self, features: Candidates, labels: Tensor, repeats: int = 1) -> None:
        """Learn from the model's features of ID and outlier samples; only POEM does.

        Args:
            features: (N, d), as for :meth:`select`.
            labels: (N,) integers, negative for outliers.
            repeats: How often each counts.
        """

    def reset(self) -> None:
        """Forget what :meth:`update` learned."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to draw as this one would: tensors and plain values."""
        return {
            "miner": type(self).__name__,
            "options": {name: v for name, v in self.options.items() if name != "seed"},
            "seed": self.seed,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a miner of this kind.

        Raises:
            ValueError: It is of another miner or one with other options, or something is missing.
        """
        name = type(self).__name__
        if state.get("miner") != name:
            raise ValueError(
                f"{name}.load_state_dict: state must be of a {name}, got {state.get('miner')!r}"
            )
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"{name}.load_state_dict: state must have {sorted(missing)}")
        for option, mine in self.options.items():
            if option != "seed" and (then := state["options"].get(option)) != mine:
                raise ValueError(
                    f"{name}.load_state_dict: state must be of a {name} with {option}={mine!r}, "
                    f"got {then!r}"
                )
        self.seed, self.step = state["seed"], state["step"]
        self.last = None

    def __repr__(self) -> str:
        """The call that makes it."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({given})"

    def _bits(self) -> int:
        """62 random bits, of this seed and step alone."""
        entropy = np.random.SeedSequence((self.seed, self.step))
        return int(entropy.generate_state(1, np.uint64)[0]) >> 2

    def _generator(self) -> torch.Generator:
        # Always the CPU's, so that CUDA draws the same.
        return torch.Generator().manual_seed(self._bits())


class UniformMiner(OutlierMiner):
    """Selects uniformly at random, without replacement: the baseline of every other miner.

    Args:
        seed: Of all random numbers, >= 0.
    """

    name = "uniform"

    def _select(self, where: str, x: Any, z: Any, n: int) -> MiningLog:
        given = z if x is None else x
        rows = torch.randperm(len(given), generator=self._generator())[:n]
        return MiningLog(self.step, rows.to(given.device), len(given))


class NTOMMiner(OutlierMiner):
    """NTOM (Chen et al., "ATOM", ECML 2021): a window of those that look most in-distribution.

    Candidates stand in order of p(C + 1 | x), the least first; the window is
    ``[floor(q N), floor(q N) + n)``, and ends with the last candidate where it would pass it. With
    q > 0 the very hardest, which may be in-distribution, are left out. The authors score a pool of
    4 n candidates an epoch; the candidates of one step do as well.

    Args:
        q: Quantile at which the window starts, 0 <= q < 1.
        score: What stands for 1 - p(C + 1 | x): see :class:`DOSMiner`.
        seed: As for every miner; nothing is drawn.

    The first of ``indices`` is the hardest. Ties: the lowest index first.
    """

    name = "ntom"
    needs = frozenset({"logits"})

    def __init__(self, q: float = 0.125, score: Score = "absent-class", seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= q < 1:
            raise ValueError(f"NTOMMiner: q must be in [0, 1), got {q}")
        self.q = float(q)
        self.score = _check_score("NTOMMiner", score)

    def _select(self, where: str, x: Tensor | None, z: Tensor, n: int) -> MiningLog:
        scores = _in_distribution(where, z, self.score)
        start = math.floor(self.q * len(z))
        if start + n > len(z) > n:
            warnings.warn(
                f"{where}: the window of {n} from quantile {self.q} on does not fit into {len(z)} "
                f"candidates and starts at {1 - n / len(z):.3g}; with more candidates, or a "
                "smaller q, it does",
                stacklevel=3,
            )
        start = min(start, len(z) - n)
        return MiningLog(self.step, _order(-scores)[start : start + n], len(z), scores)


class POEMMiner(OutlierMiner):
    r"""POEM (Ming et al., ICML 2022): the candidates nearest a boundary drawn by Thompson sampling.

    Bayesian linear regression of +-``target`` on the features: the weights have the prior
    N(0, ``sigma`` I), the targets noise of variance ``noise``, so that with the rows z seen so far
    and their targets y the posterior is N(mu, A^-1) with

        A = Z^T Z / noise + I / sigma,    mu = A^-1 Z^T y / noise.

    Each selection draws weights beta from it and takes the smallest abs(beta . z), the nearest
    first. :meth:`update` takes in features of ID samples (target +``target``: higher = more ID) and
    of outliers trained on. Once an epoch the authors forget what the features were (:meth:`reset`)
    and take in those of the last four epochs' outliers, and of all ID data once for each of these
    epochs. Before the first update the prior is drawn from.

    Sums and posterior are float64; of the rows no more than some thousand are ever converted.

    Args:
        sigma: Variance of the prior, > 0.
        noise: Variance of the targets' noise, > 0.
        target: > 0.
        mode: ``"official"`` multiplies the posterior covariance by ``sigma``, as the authors' code
            does: more exploration than the posterior has. The one number, drawn once, that it adds
            to all targets is left out.
        seed: Of all random numbers, >= 0.
    """

    name = "poem"
    needs = frozenset({"features"})

    def __init__(
        self,
        sigma: float = 20.0,
        noise: float = 0.5,
        target: float = 3.0,
        mode: Mode = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, value in (("sigma", sigma), ("noise", noise), ("target", target)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"POEMMiner: {name} must be positive and finite, got {value}")
        self.sigma, self.noise, self.target = float(sigma), float(noise), float(target)
        self.mode = _check_mode("POEMMiner", mode)
        self.reset()

    def reset(self) -> None:
        """Forget all samples: back to the prior, for features of any width."""
        self._gram = torch.zeros(0, 0, dtype=torch.float64)  # Z^T Z
        self._moment = torch.zeros(0, dtype=torch.float64)  # Z^T y

    @torch.no_grad()
    def update(self, features: Candidates, labels: Tensor, repeats: int = 1) -> None:
        """Take in samples: add to Z^T Z and Z^T y.

        Args:
            features: (N, d), float64, float32, bfloat16 or float16.
            labels: (N,) integers: negative for outliers, a class index for ID samples.
            repeats: How often each counts, >= 1.

        Raises:
            ValueError: A wrong shape, another width than before, or rows that are not finite;
                nothing is taken in.
            TypeError: ``features`` is not of a floating-point type above, ``labels`` not integers.
        """
        where = "POEMMiner.update"
        x = _matrix(where, "features", features)
        if x is None:
            raise ValueError(f"{where}: features must be given, got None")
        if operator.index(repeats) < 1:
            raise ValueError(f"{where}: repeats must be >= 1, got {repeats}")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"{where}: labels must be integers, got {labels.dtype}")
        if labels.shape != x.shape[:1]:
            raise ValueError(
                f"{where}: labels must have shape ({len(x)},), got {tuple(labels.shape)}"
            )
        gram, moment = (t.clone() for t in self._sums(where, x))
        targets = self.target * torch.where(labels < 0, -1, 1).to(moment)
        for rows, y in zip(x.split(_CHUNK), targets.split(_CHUNK), strict=True):
            rows = rows.double()
            gram.addmm_(rows.T, rows, alpha=repeats)
            moment.addmv_(rows.T, y, alpha=repeats)
        if not gram.diagonal().isfinite().all():
            _check_finite(where, "features", torch.cat([r.sum(1) for r in x.split(_CHUNK)]))
        self._gram, self._moment = gram, moment

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and lower Cholesky factor (d, d) of the precision A; float64."""
        eye = torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        factor = torch.linalg.cholesky(self._gram / self.noise + eye / self.sigma)
        mean = torch.cholesky_solve(self._moment[:, None] / self.noise, factor)[:, 0]
        return mean, factor

    def _select(self, where: str, x: Tensor, z: Tensor | None, n: int) -> MiningLog:
        self._gram, self._moment = self._sums(where, x)
        mean, factor = self.posterior()
        normal = torch.randn(len(mean), generator=self._generator(), dtype=torch.float64)
        normal = normal.to(x.device)[:, None]
        spread = torch.linalg.solve_triangular(factor.T, normal, upper=True)[:, 0]
        if self.mode == "official":
            spread *= math.sqrt(self.sigma)
        beta = (mean + spread).to(accumulate_type(x.dtype))
        distance = torch.cat([rows.to(beta.dtype) @ beta for rows in x.split(_CHUNK)]).abs_()
        _check_finite(where, "features", distance)
        return MiningLog(self.step, _order(distance)[:n], len(x), distance)

    def _sums(self, where: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Z^T Z and Z^T y for rows like those of x, on their device."""
        d = x.shape[1]
        if not len(self._gram):
            zeros = torch.zeros(d, d, dtype=torch.float64, device=x.device)
            return zeros, zeros.new_zeros(d)
        if d != len(self._gram):
            raise ValueError(
                f"{where}: features must have the width of those before, {len(self._gram)}, got {d}"
            )
        return self._gram.to(x.device), self._moment.to(x.device)

    def state_dict(self) -> dict[str, Any]:
        """Keep what every miner does, and Z^T Z and Z^T y."""
        return super().state_dict() | {"gram": self._gram, "moment": self._moment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, as every miner does."""
        super().load_state_dict(state)
        self._gram, self._moment = state["gram"].clone(), state["moment"].clone()


class DOSMiner(OutlierMiner):
    """DOS (Jiang et al., ICLR 2024): cluster the candidates, take the hardest of each cluster.

    :func:`~oodkernels.dos_select` on directions of features, seeded anew each step. Its cost grows
    with candidates times clusters: over a whole pool give ``block``, and the candidates are divided
    at random into blocks of at most that many, each with its share of ``n``, as the steps of the
    authors' training (384 each) would meet them.

    Args:
        k: Clusters; None for as many as are selected (of a block), as the authors have it.
        n_init: Restarts of K-means, >= 1.
        score: What is largest for the hardest: ``"absent-class"``, which ranks as
            1 - p(C + 1 | x), the absent class being the last column, and as a difference of logits
            never saturates; for models without one ``"energy"`` or ``"max-logit"``.
        mode: As for :func:`~oodkernels.dos_select`.
        block: Most candidates to cluster together; None for all.
        seed: Of all random numbers, >= 0.
    """

    name = "dos"
    needs = frozenset({"features", "logits"})

    def __init__(
        self,
        k: int | None = None,
        n_init: int = 5,
        score: Score = "absent-class",
        mode: Mode = "default",
        block: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, value in (("k", k), ("n_init", n_init), ("block", block)):
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"DOSMiner: {name} must be >= 1, got {value}")
        self.k, self.block = (None if v is None else int(v) for v in (k, block))
        self.n_init = int(n_init)
        self.score = _check_score("DOSMiner", score)
        self.mode = _check_mode("DOSMiner", mode)

    def _select(self, where: str, x: Tensor, z: Tensor, n: int) -> MiningLog:
        scores = _in_distribution(where, z, self.score)
        seed = self._bits()
        selected: list[Tensor] = []
        labels = torch.full((len(x),), -1, device=x.device)
        clusters = 0
        for i, (rows, share) in enumerate(self._blocks(len(x), n, x.device)):
            k = self.k or share
            found = dos_select(
                x[rows], scores[rows], k, share, self.n_init, seed=seed + i, mode=self.mode
            )
            labels[rows] = torch.where(found.labels < 0, -1, found.labels + clusters)
            clusters += k
            # Index arithmetic would turn a slice into a copy of the candidates.
            selected.append(found.indices if isinstance(rows, slice) else rows[found.indices])
        _check_finite(where, "features", torch.where(labels < 0, torch.nan, 0.0))
        return MiningLog(self.step, torch.cat(selected), len(x), scores, labels, clusters)

    def _blocks(self, n_rows: int, n: int, device: torch.device) -> list[tuple[Any, int]]:
        """Rows of every block, and how many to select of them."""
        if self.block is None or n_rows <= self.block:
            return [(slice(None), n)]
        count = min(-(-n_rows // self.block), n)
        order = torch.randperm(n_rows, generator=self._generator())
        # The first blocks take the remainders of both divisions, so no share exceeds its block.
        shares = [n // count + (i < n % count) for i in range(count)]
        rows = [part.sort().values.to(device) for part in order.tensor_split(count)]
        return list(zip(rows, shares, strict=True))


MINERS: dict[str, type[OutlierMiner]] = {
    kind.name: kind for kind in (UniformMiner, NTOMMiner, POEMMiner, DOSMiner)
}
"""Every miner by its short name."""


def _matrix(where: str, name: str, value: Candidates | None) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        with warnings.catch_warnings():  # of read-only arrays: nothing here writes to them
            warnings.simplefilter("ignore", UserWarning)
            value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor or array, got {type(value).__name__}")
    check_floating(where, name, value.new_empty(1))
    if value.dim() != 2 or value.shape[1] < 1:
        raise ValueError(f"{where}: {name} must have shape (N, columns), got {tuple(value.shape)}")
    return value.detach()


def _check_finite(where: str, name: str, per_row: Tensor) -> None:
    if not per_row.isfinite().all():
        bad = ~per_row.isfinite()
        raise ValueError(
            f"{where}: {name} must be finite, got {int(bad.sum())} rows that are not, the first "
            f"at index {int(bad.nonzero()[0])}"
        )


def _check_score(where: str, score: Score) -> Score:
    if score not in ("absent-class", "energy", "max-logit"):
        raise ValueError(f"{where}: score must be absent-class, energy or max-logit, got {score!r}")
    return score


def _check_mode(where: str, mode: Mode) -> Mode:
    if mode not in ("default", "official"):
        raise ValueError(f"{where}: mode must be default or official, got {mode!r}")
    return mode


def _in_distribution(where: str, z: Tensor, score: Score) -> Tensor:
    """How in-distribution candidates look, (N,), higher = more."""
    if score == "absent-class":
        if z.shape[1] < 2:
            raise ValueError(
                f"{where}: logits must have C + 1 >= 2 columns, the absent class last, got "
                f"{z.shape[1]}"
            )
        # The log-odds against the absent class: neither p near 0 nor p near 1 saturates.
        scores = logit_scores(z[:, :-1]).energy - z[:, -1]
    elif score == "energy":
        scores = logit_scores(z).energy
    else:
        scores = logit_scores(z).max_logit
    _check_finite(where, "logits", scores)
    return scores


def _order(scores: Tensor) -> Tensor:
    """Indices in ascending order of finite scores, ties by index.

    Sorts integers of the same order, for which torch has a radix sort.
    """
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    bits = (scores + 0.0).view(integer)  # -0.0 is 0.0
    key = torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits)
    return key.sort(stable=True).indices
