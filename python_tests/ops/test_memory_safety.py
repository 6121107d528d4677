"""Contents and memory limits that must end in an exception, each in a process of its own."""

from __future__ import annotations

import pytest
from processes import run_code

WRAPPING = [
    [0, 2**63 - 1, -2, 6],
    [0, -(2**63), 6],
    [0, 2**62, -(2**62), 6],
    [0, 2**63 - 1, -(2**63), 6],
    [0, 3, 2**63 - 1, 6],
    [0, 8, 6],
]


def test_offsets_whose_differences_wrap() -> None:
    """A difference of two offsets may not fit in 64 bits, and none is trusted before its check."""
    code = f"""
import torch
from oodkernels.ops import mos_log_others, mos_loss, mos_predict, mos_score
for offsets in {WRAPPING}:
    z, groups, target = torch.randn(4, 6), torch.tensor(offsets), torch.zeros(4, dtype=torch.int64)
    stats = torch.zeros(4, len(groups) - 1, 2)
    ops = torch.ops.oodk
    for call in (
        lambda: mos_score(z, groups),
        lambda: mos_predict(z, groups),
        lambda: mos_log_others(z, groups),
        lambda: mos_loss(z, target, groups),
        lambda: ops._mos_log_others_backward(stats[..., 0], z, groups, stats),
        lambda: ops._mos_loss_backward(torch.ones(4), z, target, groups, stats, -100),
    ):
        try:
            call()
        except ValueError as error:
            assert "every group must be at least 2 columns wide" in str(error), error
        else:
            raise AssertionError("accepted")
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("setup", "call", "megabytes"),
    [
        ("z, g = torch.zeros(1, 4 * K), torch.arange(0, 4 * K + 1, 4)", "mos_score(z, g)", 150),
        ("z, g = torch.zeros(1, 4 * K), torch.arange(0, 4 * K + 1, 4)", "mos_loss(z, t, g)", 180),
        ("z, g = torch.zeros(1, 80 * K), None", "torch.ops.oodk._outlier_loss(z, t, *MEAN)", 500),
    ],
    ids=["mos_score", "mos_loss", "_outlier_loss"],
)
def test_memory_that_is_not_there(setup: str, call: str, megabytes: int) -> None:
    """Scratch memory of the kernels that cannot be had is an exception, as everywhere else."""
    code = f"""
import resource, torch
from oodkernels.ops import mos_loss, mos_score
torch.set_num_threads(1)
K, MEAN = 10**6, (0.5, False, True)
{setup}
t = torch.zeros(1, dtype=torch.int64)
kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line[:6] == "VmSize")
limit = kib * 1024 + {megabytes} * 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    {call}
except (MemoryError, RuntimeError) as error:
    assert "bad_alloc" in str(error) or "can't allocate" in str(error), error
    print("refused")
"""
    done = run_code(code, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_keys_in_any_order_stay_in_bounds() -> None:
    """Keys that are not sorted give sums without meaning, from memory that is the op's own."""
    code = """
import oodkernels, torch
for seed in range(150):
    g = torch.Generator().manual_seed(seed)
    n, m = torch.randint(9000, 60000, (2,), generator=g).tolist()
    low = -(2 ** (1 + seed % 62))
    x = torch.randint(low, -low, (n,), generator=g)
    y = torch.randint(low, -low, (m,), generator=g)
    for pair in ((x, y), (x.sort().values, y), (x, y.sort(descending=True).values)):
        torch.ops.oodk._roc_counts(*pair)
        torch.ops.oodk._roc_counts(*(keys.int() for keys in pair))
"""
    done = run_code(code)
    assert done.returncode == 0, (done.returncode, done.stderr)
