"""What ``pytest benchmarks --benchmark-only`` runs by default."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import selection  # noqa: E402


def item(test: str, **params: Any) -> Any:
    name = f"{test}[{'-'.join(map(str, params.values()))}]" if params else test
    made = SimpleNamespace(name=name, nodeid=f"benchmarks/test_a.py::{name}")
    if params:
        made.callspec = SimpleNamespace(params=params)
    return _Hashable(made)


class _Hashable:
    def __init__(self, of: SimpleNamespace) -> None:
        vars(self).update(vars(of))


def test_ours_all_and_of_each_shape_the_best_peer() -> None:
    peers = ("oodk", "official", "compiled-a", "compiled-b")
    items = [item("test_f", shape=s, peer=p) for s in (1, 2) for p in peers]
    items += [item("test_read", shape=1), item("test_alone"), item("test_f", shape=3, peer="torch")]
    times = {"test_f[1-official]": 9.0, "test_f[1-compiled-b]": 3.0, "test_f[1-compiled-a]": 4.0}
    run, out = selection.chosen(items, times)
    assert [i.name for i in run] == [
        *("test_f[1-oodk]", "test_f[2-oodk]", "test_read[1]", "test_alone"),
        *("test_f[1-compiled-b]", "test_f[2-official]", "test_f[3-torch]"),
    ]
    assert len(run) + len(out) == len(items)
    text = selection.left_out([i.nodeid for i in out], len(items)).splitlines()
    assert text == [
        "4 of 11 benchmarks were left out; --full runs them:",
        "     4 of test_a.py test_f",
    ]
    assert selection.left_out([], 11) == ""
    long, _ = selection.chosen(items, times | {"test_f[1-oodk]": 1500.0})
    assert [i.name for i in long] == [*(i.name for i in run[1:]), "test_f[1-oodk]"]


def test_ceilings_are_no_peers() -> None:
    assert selection.peer_of({"peer": "torch.mm"}) is None
    assert selection.peer_of({"name": "torch.sort"}) is None
    assert selection.peer_of({"peer": "torch"}) == "torch"
    assert selection.peer_of({"peer": "oodkernels"}) is None
    assert selection.peer_of({"shape": (1, 2)}) is None


def test_recorded_times() -> None:
    times = selection.recorded_times()
    assert times["test_score[oodk-f32-65536x1000x8]"] > 0


def test_a_run_ends_in_its_time_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    for name in ("selection.py", "shapes.py"):
        (tmp_path / name).write_text((ROOT / "benchmarks" / name).read_text())
    (tmp_path / "results").mkdir()
    (tmp_path / "test_a.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('peer', ['oodk', 'eager', 'official'])\n"
        "def test_f(measure, peer):\n    measure(lambda: None)\n"
    )
    pytest.importorskip("pytest_benchmark")
    from processes import run_code

    def run(where: Path, *more: str) -> str:
        arguments = [str(where), "--benchmark-only", "-q", "-p", "no:cacheprovider", *more]
        arguments += ["--rootdir", str(tmp_path), "--benchmark-max-time", "0.01"]
        # What a worker of xdist starts is none itself.
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
        done = run_code(code, *arguments, PYTEST_XDIST_WORKER="")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = run(tmp_path)
    assert "2 passed, 1 deselected" in found
    assert "1 of 3 benchmarks were left out" in found
    assert "3 passed" in run(tmp_path, "--full")
    assert "3 passed" in run(tmp_path / "test_a.py")  # named: run as it is
    with open(tmp_path / "selection.py", "a") as file:
        file.write("\nMINUTES = -1.0\n")
    late = run(tmp_path)
    assert "2 skipped" in late
    assert "3 of 3 benchmarks were left out" in late


def timed(name: str, seconds: float, group: str | None = None, **more: Any) -> dict[str, Any]:
    extra = {rate.replace("per", "/"): value for rate, value in more.items() if "per" in rate}
    params = {key: value for key, value in more.items() if key == "peer"} or None
    found = {"name": name, "fullname": f"benchmarks/test_a.py::{name}", "group": group}
    return found | {"params": params, "extra_info": extra, "stats": {"median": seconds}}


def test_shares_of_the_ceiling() -> None:
    found = selection.ceiling_shares(
        [
            timed("test_ceiling_read[f32-10x4]", 1, GBpers=20),
            timed("test_ceiling_read[f32-110x4]", 1, GBpers=1),
            timed("test_ceiling_exp[10x4]", 1, Gexppers=4),
            timed("test_score[oodk-f32-10x4]", 1, peer="oodk", GBpers=10, Gexppers=3),
            timed("test_score[oodk-f32-110x4]", 1, peer="oodk", GBpers=0.5),
            timed("test_score[official-f32-10x4]", 1, peer="official", GBpers=1, Gexppers=1),
            timed("test_all[together]", 8, "all", peer="together"),
            timed("test_all[read]", 1, "all", peer="read"),
            timed("test_all[products]", 2, "all", peer="products"),
            timed("test_all[torch]", 9, "all", peer="torch"),
            timed("test_other[oodk]", 9, "other", peer="oodk"),
        ]
    )
    assert found == {"test_a.py test_score": [0.75, 0.5], "test_a.py test_all": [0.25]}
    lines = selection.share_lines(found)
    assert lines.splitlines()[1:] == [
        "  test_a.py test_all: 25%, from 25% to 25% of 1",
        "  test_a.py test_score: 62%, from 50% to 75% of 2",
    ]
    assert selection.share_lines({}) == ""
