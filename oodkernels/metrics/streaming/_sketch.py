"""A histogram of scores in bounded memory, whose bins go where the scores are.

An axis of float32 keys (:func:`~oodkernels.ops.keys.order_key`) is cut into 65536 prefixes, a
prefix into blocks of 1, 4, 16 ... or 65536 equal bins. At first each prefix has one block, which
resolves every bfloat16 and, where memory allows, every float16 number. Before scores are counted, a
sample of them tells which bins hold, or are about to hold, too large a share of one side's scores.
Their prefixes get a finer block, which counts from then on; what the coarser block holds stays
there, known to a wider interval only. Keys that many scores share get a counter of their own, an
atom. When the bins run out, blocks that turned out finer than their share merits are made coarser.

On CPU an op of C++ does so; what is written here in torch is its reference, and for accelerators.

All of this only steers where resolution is spent. Whatever is counted is counted in an interval
that holds the score, and :func:`Sketch.intervals` says in which, so bounds drawn from it are
certain for every stream. Nothing here waits for an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oodkernels.metrics.streaming._bounds import Floats, Intervals, Ints
from oodkernels.ops.histogram import N_FACTS, N_PREFIXES, roc_histogram_, steer_histogram_
from oodkernels.ops.keys import order_key

LEVELS = 9
"""A block of level l has 4^l bins."""
MOST_BINS = 1 << 27
"""A table's entry has 27 bits for where bins start, and 24 for atoms, which are a 16th of them."""
MAX_ATOMS = 127
"""Most atoms in one prefix."""
NO_ATOM = 0x7FFFFFFF
"""The key of a NaN."""
LEAST_KEY, LARGEST_KEY = -0x7F800001, 0x7F800000
"""The infinities."""
_FIRST_SAMPLE = 1 << 17
_SAMPLE = 1 << 12
_FEW = 1 << 10
_TAIL = 1 / 1000
"""A bin may hold this share of the scores beyond it, on the side where fewer are."""
_COUNTED, _REFUSED, _ROUNDED, _LOW_BITS = range(4)


@dataclass(frozen=True)
class Layout:
    """How a number of bytes is divided.

    Attributes:
        bins: Bins a row.
        atoms: Atoms a row.
        half: Whether the first blocks resolve float16, beside bfloat16.
        share: The share of a side's scores that a bin may hold.
    """

    bins: int
    atoms: int
    half: bool
    share: float

    @classmethod
    def of(cls, n_bytes: int, rows: int, where: str = "Layout", aside: int = 0) -> Layout:
        """Divide ``n_bytes`` with counts of ``rows`` rows, ``aside`` bytes being for others.

        Raises:
            ValueError: That is too little for one bin a prefix and as many to spare; errors name
                ``where``.
        """
        tables = N_PREFIXES * (4 * LEVELS + 8)
        # Beside eight bytes a counter: four for an atom's key, of which there is one to 16 bins.
        each = (8 + 0.5) * rows + 0.25
        bins = min(int((n_bytes - aside - tables - 64 * rows) / each), MOST_BINS)
        if bins < 2 * N_PREFIXES:
            least = aside + tables + 64 * rows + 2 * N_PREFIXES * each
            raise ValueError(
                f"{where}: memory must be at least {least / 2**20:.1f} MiB for {rows} sets of "
                f"scores, got {n_bytes / 2**20:.3g} MiB"
            )
        with_half = cls(bins, bins // 16, True, 12 / bins)
        fits = with_half.base_bins <= bins // 3
        return with_half if fits else cls(bins, bins // 16, False, 12 / bins)

    @property
    def base_bins(self) -> int:
        """Bins of all first blocks."""
        return N_PREFIXES + (15 * 2 * 40 * 128 if self.half else 0)

    def base(self, device: torch.device) -> Tensor:
        """(65536,) int64, the level of each prefix's first block."""
        prefix = torch.arange(N_PREFIXES, device=device) - N_PREFIXES // 2
        exponent = torch.where(prefix < 0, ~prefix, prefix) >> 7
        # Those of float16, subnormals included: 2^-24 to 2^15.
        return ((exponent >= 127 - 24) & (exponent <= 127 + 15) & self.half) * 2


@dataclass
class Sketch:
    """The state: tensors only, on one device.

    Attributes:
        counts: (R, bins + atoms + 4) int64, see :func:`~oodkernels.ops.histogram.roc_histogram_`.
        blocks: (9, 65536) int32, where the block of each level and prefix starts, -1 for none.
        table: (65536,) int64, the finest block and the atoms of each prefix.
        atoms: (atoms,) int32 keys, ascending, then :data:`NO_ATOM`.
        used: () int64, bins that belong to a block.
        scale: () float64, by how much bins may exceed their share for want of memory.
        adapted: () int64, how many scores had been counted when the blocks were last looked at.
    """

    counts: Tensor
    blocks: Tensor
    table: Tensor
    atoms: Tensor
    used: Tensor
    scale: Tensor
    adapted: Tensor

    @classmethod
    def empty(cls, layout: Layout, rows: int, device: torch.device) -> Sketch:
        """Make one with the first blocks only."""
        level = layout.base(device)
        size = 1 << 2 * level
        start = size.cumsum(0) - size
        blocks = torch.full((LEVELS, N_PREFIXES), -1, dtype=torch.int32, device=device)
        blocks.scatter_(0, level[None], start.int()[None])
        width = layout.bins + layout.atoms + N_FACTS
        return cls(
            # NumPy's memory may have huge pages, with which counting at random places is faster.
            torch.from_numpy(np.zeros((rows, width), np.int64)).to(device),
            blocks,
            (16 - 2 * level) | start << 5,
            torch.full((layout.atoms,), NO_ATOM, dtype=torch.int32, device=device),
            size.sum(),
            torch.ones((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def facts(self) -> Tensor:
        """(R, 4): the last columns of ``counts``."""
        return self.counts[:, -N_FACTS:]

    @property
    def bins(self) -> int:
        """Bins a row."""
        return self.counts.shape[1] - self.atoms.shape[0] - N_FACTS

    def same_table(self, other: Sketch) -> bool:
        """Whether equal counters stand for equal intervals."""
        return torch.equal(self.blocks, other.blocks) and torch.equal(self.atoms, other.atoms)

    def with_rows(self, rows: int) -> None:
        """Make room for more sets of scores."""
        missing = rows - self.counts.shape[0]
        if missing > 0:
            self.counts = torch.nn.functional.pad(self.counts, (0, 0, 0, missing))

    def count(
        self, scores: Tensor, rows: Tensor | int, layout: Layout, *, first: bool = False
    ) -> None:
        """Count scores.

        Args:
            scores: (n,) of any floating-point type.
            rows: The row of ``counts`` for all, or for each, (n,) uint8.
            layout: What this sketch was made with.
            first: These are the first scores: look closer at them.

        Raises:
            ValueError: On CPU, a score is NaN; nothing is counted then.
        """
        n = scores.shape[0]
        if n == 0:
            return
        if not scores.is_cpu:
            self.steer(scores, rows, layout, first=first)
            self._count(scores, rows)
            return
        side, of_each = (rows, None) if isinstance(rows, int) else (0, rows)
        steer_histogram_(
            self.counts,
            self.blocks,
            self.table,
            self.atoms,
            self.used,
            self.scale,
            self.adapted,
            scores,
            side,
            of_each,
            first,
            layout.half,
            layout.share,
        )
        if not self._only_atoms(scores if first else None):
            self._count(scores, rows)
            return
        # So far the stream has few values. Rare new ones, which no sample shows, become atoms too.
        before = self.counts[:, self.bins :].clone()
        self._count(scores, rows)
        if self._all_in_atoms():
            return
        new = order_key(scores)
        new = new[~self._are_atoms(new)].unique()
        if new.shape[0] <= _FEW:
            self.counts[:, : self.bins] = 0
            self.counts[:, self.bins :] = before
            self._insert(new, torch.ones_like(new, dtype=torch.bool))
            self._count(scores, rows)

    def _count(self, scores: Tensor, rows: Tensor | int) -> None:
        if isinstance(rows, int):
            roc_histogram_(self.counts, self.table, scores, rows, atoms=self.atoms)
        else:
            roc_histogram_(self.counts, self.table, scores, 0, rows, self.atoms)

    # --- steering, which on CPU an op does --------------------------------------------------------

    def steer(
        self, scores: Tensor, rows: Tensor | int, layout: Layout, *, first: bool = False
    ) -> None:
        """Refine what scores that are about to be counted would overfill, see :meth:`count`."""
        keys, sides = _sample(scores, rows, _FIRST_SAMPLE if first else _SAMPLE)
        self._adapt(keys, sides, scores.shape[0], layout)
        fewer, fewer_sides = keys[::4].contiguous(), sides[::4].contiguous()
        for _ in range(3 if first else 0):
            self._adapt(fewer, fewer_sides, scores.shape[0], layout)
        self.adapted = self.facts[:, _COUNTED].sum() + scores.shape[0]

    def _adapt(self, keys: Tensor, sides: Tensor, n: int, layout: Layout) -> None:
        """Refine what n scores, of which this is a sorted sample, would overfill."""
        rows, sampled = self.counts.shape[0], keys.shape[0]
        number = (keys >= LEAST_KEY) & (keys <= LARGEST_KEY)
        side = sides == torch.arange(rows, device=keys.device)[:, None]  # (R, n)
        side &= number
        n_side = side.sum(1, keepdim=True).clamp(min=1).double()
        total = self.facts[:, _COUNTED, None] + n_side * (n / sampled)
        unit = (n / sampled) / total  # (R, 1) the share of its side that a sample stands for

        prefix = (keys >> 16).long() + N_PREFIXES // 2
        entry = self.table[prefix]
        shift = entry & 31
        bits = 16 - self._spare_bits(keys)
        is_atom = self._add_atoms(keys, number & (shift > 16 - bits))
        rest = number & ~is_atom
        side_rest = (side & rest).double()

        counter = (entry >> 5 & 0x7FFFFFF) + ((keys & 0xFFFF) >> shift)
        # One sample less than there are, lest a lone one pass for a crowd.
        in_bin = _per_run(counter, side_rest)[1]
        in_prefix = _per_run(prefix, side_rest)[1]
        load = self.counts[:, counter] / total
        load = load + torch.where(in_bin >= 4, in_bin - 1, 0) * unit
        load = torch.maximum(load, (in_prefix - 1) * unit / (1 << 16 - shift))

        below = side.cumsum(1)
        tail = torch.minimum(below, n_side - below + 1) / n_side
        share = layout.share * self.scale
        allowed = torch.minimum(_TAIL * tail, share).maximum(share / 64).maximum(4 / total)
        excess = (load / allowed).amax(0)
        quarters = (excess > 4 ** torch.arange(LEVELS, device=keys.device)[:, None]).sum(0)
        finer = torch.where(rest & (excess > 2), quarters, 0)

        level = (16 - (self.table & 31)) // 2
        most = (bits + 1) // 2
        wanted = torch.minimum((16 - shift) // 2 + finer, most)
        target = level.scatter_reduce(0, prefix, wanted, "amax")
        if target.is_cpu and bool((target <= level).all()):
            return
        if not self._allocate(target, level):
            if bool(self.facts[:, _COUNTED].any()):
                grows = target > level
                self._compact(layout)
                level = (16 - (self.table & 31)) // 2
                target = torch.where(grows, target, level)
            while not self._allocate(target, level):
                target = torch.where(target > level, target - 1, target)
        self._build_table()

    def _spare_bits(self, keys: Tensor) -> Tensor:
        """How many of the low bits are 0 in every score so far and in the sample."""
        raw = keys ^ ((keys >> 31) & 0x7FFFFFFF)
        place = torch.arange(16, device=keys.device)
        low = ((raw[:, None] >> place) & 1).amax(0)
        low = low | ((self.facts[:, _LOW_BITS, None] >> place) & 1).amax(0)
        return (low.cumsum(0) == 0).sum()

    def _add_atoms(self, keys: Tensor, eligible: Tensor) -> Tensor:
        """Give frequent keys of a sorted sample counters of their own; which keys are atoms."""
        known = self._are_atoms(keys)
        first, length = _per_run(keys, torch.ones_like(keys)[None])
        few_values = first.sum() * 8 <= keys.shape[0]
        new = first & eligible & ~known & (length[0] >= torch.where(few_values, 1, 8))
        if new.is_cpu and not bool(new.any()):
            return known
        self._insert(keys, new)
        return self._are_atoms(keys)

    def _insert(self, keys: Tensor, new: Tensor) -> None:
        """Make atoms of the keys that ``new`` marks, each once, as far as there is room."""
        size = self.atoms.shape[0]
        prefix = (keys >> 16).long() + N_PREFIXES // 2
        upto = new.cumsum(0)
        first, _ = _per_run(prefix, new[None].long())
        rank = upto - torch.where(first, upto - new.long(), 0).cummax(0).values
        new = new & (rank + (self.table[prefix] >> 56) <= MAX_ATOMS)
        new = new & (new.cumsum(0) <= size - (self.atoms != NO_ATOM).sum())
        atoms = torch.cat((self.atoms, torch.where(new, keys, NO_ATOM))).sort().values[:size]
        moved = torch.searchsorted(atoms, self.atoms).clamp(max=size - 1)
        counters = self.counts[:, self.bins : self.bins + size]
        old = counters.clone()
        counters.zero_().scatter_add_(1, moved.expand_as(old), old)
        self.atoms = atoms
        self._build_table()

    def _only_atoms(self, first: Tensor | None) -> bool:
        """Whether, on CPU, every score so far, or of a sample of the first, is an atom."""
        if int(self.atoms[0]) == NO_ATOM:
            return False
        if first is not None:
            return bool(self._are_atoms(_sample(first, 0, _FIRST_SAMPLE)[0]).all())
        return self._all_in_atoms()

    def _all_in_atoms(self) -> bool:
        in_atoms = self.counts[:, self.bins : -N_FACTS].sum()
        return bool(in_atoms == self.facts[:, _COUNTED].sum())

    def _are_atoms(self, keys: Tensor) -> Tensor:
        entry = self.table[(keys >> 16).long() + N_PREFIXES // 2]
        after = (entry >> 32 & 0xFFFFFF) + (entry >> 56)
        place = torch.searchsorted(self.atoms, keys)
        found = self.atoms[place.clamp(max=self.atoms.shape[0] - 1)] == keys
        return found & (place < after)

    def _allocate(self, target: Tensor, level: Tensor) -> bool:
        """Give the prefixes blocks of the target level; False where, on CPU, memory is short."""
        grow = target > level
        size = torch.where(grow, 1 << 2 * target, 0)
        start = self.used + size.cumsum(0) - size
        fits = grow & (start + size <= self.bins)
        if grow.is_cpu and bool((grow & ~fits).any()):
            return False
        place = target[None]
        old = self.blocks.gather(0, place)
        self.blocks.scatter_(0, place, torch.where(fits, start.int(), old))
        self.used = torch.where(fits, start + size, self.used).amax()
        return True

    def _build_table(self) -> None:
        rank = torch.arange(1, LEVELS + 1, device=self.blocks.device)[:, None]
        level = ((self.blocks >= 0) * rank).amax(0) - 1
        start = self.blocks.gather(0, level[None])[0].long()
        prefixes = (self.atoms >> 16).long() + N_PREFIXES // 2
        bounds = torch.arange(N_PREFIXES + 1, device=self.atoms.device)
        first = torch.searchsorted(prefixes, bounds)
        n_atoms = first.diff().clamp(max=MAX_ATOMS)
        n_atoms[(NO_ATOM >> 16) + N_PREFIXES // 2] = 0
        self.table = (16 - 2 * level) | start << 5 | first[:-1] << 32 | n_atoms << 56

    def compact(self, layout: Layout) -> None:
        """Where more than half of the bins are used, make blocks coarser that merit it."""
        if not self.used.is_cpu or int(self.used) > self._half(layout):
            self._compact(layout)

    def _half(self, layout: Layout) -> int:
        """Bins that the first blocks take, and half of the others."""
        return (layout.base_bins + self.bins) // 2

    def _compact(self, layout: Layout) -> None:
        device, bins = self.blocks.device, self.bins
        old = self.counts[:, :bins]
        exists = self.blocks >= 0
        level = (16 - (self.table & 31)) // 2
        start = (self.table >> 5) & 0x7FFFFFF
        total = self.facts[:, _COUNTED, None].clamp(min=1)

        # The share of its side that the average score of a block has for company in its bin.
        def sums(values: Tensor) -> Tensor:
            ends = torch.nn.functional.pad(values.cumsum(1), (1, 0))
            return ends[:, start + (1 << 2 * level)] - ends[:, start]

        share = old.double() / total
        company = (share - 1 / total).clamp(min=0)
        met = (sums(share * company) / sums(share).clamp(min=1e-300)).amax(0)
        base, rank = layout.base(device), torch.arange(LEVELS, device=device)[:, None]
        best = level
        scale = self.scale
        enough = torch.zeros((), dtype=torch.bool, device=device)
        half = self._half(layout)
        slack = (layout.share / met.clamp(min=1e-300)).log2()
        upto = ((1 << 2 * rank) * exists).cumsum(0)  # bins of a prefix's blocks of a level or below
        for exponent in range(-4, 14):
            coarser = ((slack + exponent) / 2).floor().clamp(0, 16).long()
            kept = (level - coarser).maximum(base.minimum(level))
            at = kept[None]
            sizes = upto.gather(0, at) + (1 << 2 * at) * ~exists.gather(0, at)
            fits = sizes.sum() <= half
            best = torch.where(enough, best, kept)
            scale = torch.where(enough, scale, float(2 ** max(0, exponent)))
            enough = enough | fits
        roomy = self.used <= half
        best, scale = torch.where(roomy, level, best), torch.where(roomy, self.scale, scale)

        present = (exists & (rank <= best)) | (rank == best)
        size = torch.where(present, 1 << 2 * rank, 0).reshape(-1)
        begin = size.cumsum(0) - size
        blocks = torch.where(present, begin.reshape(LEVELS, -1), -1).int()

        # From each bin to the block it is in, and on to its place in the new layout.
        place = torch.arange(bins, device=device)
        heads = torch.full((bins + 1,), -1, dtype=torch.int64, device=device)
        names = torch.arange(LEVELS * N_PREFIXES, device=device)
        where = torch.where(exists, self.blocks, bins).reshape(-1).long()
        heads.scatter_(0, where, names)
        head = torch.where(heads[:-1] >= 0, place, 0).cummax(0).values
        block = heads[head]
        of_level, of_prefix = block // N_PREFIXES, block % N_PREFIXES
        to_level = torch.minimum(of_level, best[of_prefix])
        to = blocks[to_level, of_prefix] + ((place - head) >> 2 * (of_level - to_level))
        to = torch.where(place < self.used, to.long(), 0)
        new = torch.zeros_like(old).scatter_add_(1, to.expand_as(old), old)
        old.copy_(new)
        self.blocks, self.used, self.scale = blocks, size.sum(), scale
        self._build_table()

    # --- reading ----------------------------------------------------------------------------------

    def cells(self) -> Cells:
        """Every interval that holds a score, on the host."""
        counts = self.counts.cpu().numpy()
        rows, bins = counts.shape[0], self.bins
        blocks = self.blocks.cpu().numpy().astype(np.int64)
        level, prefix = np.nonzero(blocks >= 0)
        start = blocks[level, prefix]
        order = np.argsort(start)
        level, prefix, start = level[order], prefix[order], start[order]

        held = np.flatnonzero(counts[:, :bins].any(0))
        block = np.searchsorted(start, held, "right") - 1
        shift = 16 - 2 * level[block]
        key = (prefix[block] - N_PREFIXES // 2 << 16) + (held - start[block] << shift)

        atoms = self.atoms.cpu().numpy().astype(np.int64)
        held_atoms = np.flatnonzero(counts[:, bins : bins + atoms.size].any(0))
        return Cells(
            np.concatenate((key, atoms[held_atoms])),
            np.concatenate((shift, np.zeros_like(held_atoms))),
            np.concatenate((counts[:, held], counts[:, bins + held_atoms]), 1).reshape(rows, -1),
        )


@dataclass(frozen=True)
class Cells:
    """Counts of scores by interval of keys, on the host.

    Attributes:
        key: (n,) first key of each interval.
        shift: (n,) an interval has 2^shift keys and starts at a multiple of that.
        counts: (R, n).
    """

    key: Ints
    shift: Ints
    counts: Ints

    @property
    def codes(self) -> Ints:
        """(n,) key and shift in one."""
        return (self.key << 5) | self.shift

    @classmethod
    def of_codes(cls, codes: Tensor, counts: Tensor) -> Cells:
        """Rebuild from :attr:`codes` and counts as tensors."""
        code = codes.cpu().numpy()
        return cls(code >> 5, code & 31, counts.cpu().numpy())

    @classmethod
    def of_scores(cls, scores: Tensor, rows: Tensor, n_rows: int) -> Cells:
        """One interval of one key for each distinct score as float32."""
        codes = order_key(scores).cpu().numpy().astype(np.int64)
        key, place = np.unique(codes, return_inverse=True)
        counts = np.zeros((n_rows, key.size), np.int64)
        np.add.at(counts, (rows.cpu().numpy(), place), 1)
        return cls(key, np.zeros_like(key), counts)

    @classmethod
    def sum(cls, parts: list[Cells]) -> Cells:
        """All parts, equal intervals as one, in an order that only depends on the total."""
        code = np.concatenate([p.codes for p in parts])
        counts = np.concatenate([p.counts for p in parts], 1)
        order = np.argsort(code, kind="stable")
        code = code[order]
        first = np.flatnonzero(np.diff(code, prepend=code[:1] - 1))
        if not first.size:
            return cls(code, code, counts)
        total = np.add.reduceat(counts[:, order], first, axis=1)
        return cls(code[first] >> 5, code[first] & 31, total)

    def intervals(self, row: int, low_bits: int, rounded: bool) -> Intervals:
        """Row 0 against another.

        Args:
            row: Row of the OOD scores.
            low_bits: OR of the low 16 bits of all scores as float32: bits that are 0 in all of them
                do not tell scores apart.
            rounded: Scores were float64 that float32 does not hold: equal keys need not tie.
        """
        spare = (low_bits & -low_bits).bit_length() - 1 if low_bits else 16
        # The bins of the infinities also hold keys of NaN, which no score has.
        first = np.maximum(self.key, LEAST_KEY)
        last = np.minimum(self.key + (1 << self.shift) - 1, LARGEST_KEY)

        def key_floats(keys: Ints) -> Floats:
            bits = keys ^ ((keys >> 63) & 0x7FFFFFFF)
            return bits.astype(np.int32).view(np.float32).astype(np.float64)

        def decode(coordinates: Ints) -> tuple[Floats, Floats]:
            if not rounded:
                filled = np.where(coordinates < 0, (1 << spare) - 1, 0)
                values = key_floats((coordinates << spare) | filled)
                return values, values
            keys = coordinates >> 1
            return key_floats(np.maximum(keys - 1, LEAST_KEY)), key_floats(
                np.minimum(keys + 1, LARGEST_KEY)
            )

        low, high = (2 * first, 2 * last + 1) if rounded else (first >> spare, last >> spare)
        return Intervals(low, high, self.counts[0], self.counts[row], decode)


def _jitter(index: Tensor) -> Tensor:
    return (index * 2654435761) >> 11 & 0xFFFFF


def _sample(scores: Tensor, rows: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """Keys, ascending, and rows of scores picked evenly, with jitter against periods."""
    n = scores.shape[0]
    step = -(-n // most)
    index = torch.arange(0, n, step, device=scores.device)
    index = (index + _jitter(index) % step).clamp(max=n - 1)
    keys, order = order_key(scores[index]).sort(stable=True)
    if isinstance(rows, int):
        return keys, torch.full_like(keys, rows)
    return keys, rows[index][order]


def _per_run(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of equal values (n,): where one starts, and per element its run's sum of weights."""
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    run = (first.cumsum(0) - 1).expand_as(weights)
    return first, torch.zeros_like(weights).scatter_add_(1, run, weights).gather(1, run)
