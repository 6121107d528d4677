"""benchmarks.gpu without a GPU: its stages, budget, files and table, and every row on the CPU."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_ops  # noqa: E402

GPU = {
    "device": "A GPU",
    "architecture": "90",
    "torch": "2.11.0",
    "oodkernels": {"cuda": "13.0", "version": "0.1.0"},
}
NOT_BUILT = {**GPU, "oodkernels": None}


def names(stages: list[gpu.Stage]) -> list[str]:
    return [stage.name for stage in stages]


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    made = gpu.Run(tmp_path, "cuda", minutes=1)
    made.result["environment"] = dict(GPU)
    return made


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.gpu", "--out", str(tmp_path / "new"), PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("benchmarks.gpu: no CUDA device: ")
    assert "--device cpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--only", "mos", "nothing"], "no stage 'nothing': there are build,"),
        (["--device", "cpu", "--only", "racecheck"], "stage 'racecheck' needs a GPU"),
    ],
)
def test_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.Run, "describe", lambda run: None)
    assert gpu.main(["--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"benchmarks.gpu: {message}")


def test_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--only", "streaming", "streaming peers"]
    arguments += ["--out", str(tmp_path)]
    done = python(str(ROOT / "benchmarks" / "gpu.py"), *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["environment"]["oodkernels"]["version"]
    assert set(result["environment"]["packages"]) >= {"numpy", "triton", "flash-kmeans"}
    stage = result["stages"]["streaming"]
    assert stage["status"] == "ok"
    assert stage["ceilings"]["copy GB/s"] > 0
    assert [row["op"] for row in stage["rows"]] == ["roc_histogram_"] * 2 + ["OODMetrics.update"]
    assert all(row["ms"] > 0 and row["share"] > 0 for row in stage["rows"])
    assert stage["rows"][0]["peers"]["histc"]["ms"] > 0
    table = done.stdout[done.stdout.index("op ") :]
    assert len(table.splitlines()) == 2 + len(stage["rows"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "logs.tar"]
    assert "=== streaming" in done.stdout


# --- stages ---------------------------------------------------------------------------------------


def test_chosen_stages() -> None:
    everything = names(gpu.STAGES)
    assert everything[0] == "build"

    def chosen(only: list[str] | None, device: str, environment: dict, **done: str) -> list[str]:
        records = {name: {"status": status} for name, status in done.items()}
        return names(gpu.chosen_stages(only, device, environment, records))

    assert chosen(None, "cuda", NOT_BUILT) == everything
    assert chosen(None, "cuda", GPU) == everything[1:]
    assert chosen(["roc", "tests"], "cuda", GPU) == ["roc", "tests"]
    assert chosen(["roc"], "cuda", NOT_BUILT) == ["build", "roc"]
    assert chosen(["build"], "cuda", GPU) == ["build"]
    left = chosen(None, "cuda", GPU, mos="ok", roc="failed")
    assert "mos" not in left
    assert "roc" in left
    assert chosen(["mos"], "cuda", GPU, mos="ok") == ["mos"]
    on_cpu = chosen(None, "cpu", NOT_BUILT)
    assert on_cpu == list(gpu_ops.GROUPS) + [f"{group} peers" for group in gpu_ops.GROUPS]


def test_every_stage_is_in_a_part_that_fits_into_a_call() -> None:
    by_name = {stage.name: stage for stage in gpu.STAGES}
    assert sorted(name for part in gpu.PARTS.values() for name in part) == sorted(by_name)
    for part, members in gpu.PARTS.items():
        assert sum(by_name[name].seconds for name in members) <= 60 * gpu.MINUTES, part
    assert all(stage.seconds > 2 * gpu.MARGIN for stage in gpu.STAGES)
    assert gpu.stages_of(["ours"], None, GPU) == list(gpu.GROUPS)
    assert gpu.stages_of(["ours"], ["tests"], NOT_BUILT) == ["build", *gpu.GROUPS, "tests"]


def test_no_part_outruns_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device where every command takes as long as it is let, and every stage fails."""
    now = 0.0

    def slow(run: gpu.Run, name: str, arguments: list[str], seconds: float, *rest: Any, **env: str):
        nonlocal now
        now += seconds + gpu.MARGIN / 2  # and had to be killed
        return None, ""

    monkeypatch.setattr(gpu, "command", slow)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(gpu.Run, "describe", lambda run: run.result["environment"].update(GPU))
    for part in gpu.PARTS:
        start = now
        assert gpu.main(["--out", str(tmp_path), "--part", part]) == 1
        assert now - start <= 60 * gpu.MINUTES
        stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
        assert all(stages[name]["status"] != "ok" for name in gpu.PARTS[part] if name != "build")


def test_limit(run: gpu.Run) -> None:
    stage = gpu.Stage("one", 30, lambda run, seconds: {})
    assert run.limit(stage) == 30
    run.deadline = time.monotonic() + 20
    assert 19 < run.limit(stage) <= 20


def test_a_failed_stage_is_recorded_and_the_next_one_runs(run: gpu.Run) -> None:
    def fails(run: gpu.Run, seconds: float) -> dict[str, Any]:
        raise gpu.StageError("why", rows=[1])

    def breaks(run: gpu.Run, seconds: float) -> dict[str, Any]:
        raise KeyError("what")

    limits = []
    run.execute(gpu.Stage("fails", 30, fails))
    run.execute(gpu.Stage("breaks", 30, breaks))
    saved = json.loads(run.file.read_text())["stages"]
    run.execute(gpu.Stage("works", 30, lambda run, s: limits.append(s) or {"rows": [2]}))
    assert saved["fails"]["status"] == "failed"
    assert saved["fails"]["message"] == "why"
    assert saved["fails"]["rows"] == [1]  # what it had found by then
    assert saved["breaks"]["message"] == "KeyError: 'what'"
    works = json.loads(run.file.read_text())["stages"]["works"]
    assert works["status"] == "ok"
    assert works["rows"] == [2]
    assert works["device"] == "A GPU"
    assert limits == [30]


def test_no_time_left(run: gpu.Run) -> None:
    run.deadline = time.monotonic() + gpu.MARGIN - 1
    called = []
    run.execute(gpu.Stage("late", 30, lambda run, seconds: called.append(1) or {}))
    assert run.result["stages"]["late"]["status"] == "skipped"
    assert not called


def test_results_of_calls_add_up(run: gpu.Run) -> None:
    run.execute(gpu.Stage("first", 30, lambda run, seconds: {"n": 1}))
    later = gpu.Run(run.out, "cuda", 1)
    later.execute(gpu.Stage("second", 30, lambda run, seconds: {"n": 2}))
    stages = json.loads(run.file.read_text())["stages"]
    assert {name: record["n"] for name, record in stages.items()} == {"first": 1, "second": 2}


@pytest.mark.parametrize("ignore", [False, True])
def test_a_command_is_stopped_at_its_limit(
    ignore: bool, run: gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MARGIN", 2.0)
    program = "import signal, sys, time\nprint('started', flush=True)\n"
    if ignore:
        program += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    start = time.monotonic()
    # pytest may have been started with the signal ignored, which a child inherits.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + program
    arguments = [sys.executable, "-c", program + "time.sleep(60)"]
    status, output = gpu.command(run, "slow", arguments, 1.5, run.out)
    assert status is None
    assert time.monotonic() - start < 20
    assert output.startswith("started")
    with pytest.raises(gpu.StageError) as error:
        gpu.finished(status, output, rows=[])
    assert error.value.status == "out of time"
    assert error.value.found == {"rows": []}


def test_output_of_a_command(run: gpu.Run) -> None:
    arguments = [sys.executable, "-c", "import os; print(os.environ['IT']); raise SystemExit(3)"]
    status, output = gpu.command(run, "quick", arguments, 60, run.out, IT="is here")
    assert (status, output.strip()) == (3, "is here")
    with tarfile.open(run.out / "logs.tar") as logs:
        (kept,) = logs.getmembers()
        file = logs.extractfile(kept)
        assert file is not None
        assert file.read().decode() == output
    assert [file.name for file in run.out.iterdir()] == ["logs.tar"]
    with pytest.raises(gpu.StageError, match="is here"):
        gpu.finished(status, output)


def test_counted(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    assert gpu.counted(report) == {}
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure>x</failure>'
        '</testcase><testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    expected = {"passed": 1, "failed": 2, "skipped": 1, "failures": ["b", "d"]}
    assert gpu.counted(report) == expected


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "ok", ""),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 9", "failed", "3 errors"),
        ("echo started", "failed", "memcheck gave no summary"),
        (None, "skipped", "not on PATH"),
    ],
)
def test_sanitizer(
    script: str | None,
    status: str,
    message: str,
    run: gpu.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if script:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f'#!/bin/sh\necho "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING\n{script}\n')
        program.chmod(0o755)
    run.execute(gpu.Stage("memcheck", 60, gpu.sanitizer("memcheck")))
    record = run.result["stages"]["memcheck"]
    assert record["status"] == status
    assert message in record.get("message", "")
    if script:
        with tarfile.open(tmp_path / "logs.tar") as logs:
            file = logs.extractfile("memcheck/memcheck.log")
            assert file is not None
            called = file.read().decode().splitlines()[0]
        assert called.startswith("--tool memcheck --error-exitcode 9")
        assert "--report-api-errors no" in called
        assert "gpu_ops.py samples --seconds 40" in called
        assert called.endswith(" 1")


def test_a_row_that_fails_fails_its_stage(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"op": "f", "shape": "2", "dtype": "float32", "failed": "ValueError: no"}]

    def command(run: gpu.Run, name: str, arguments: list[str], *rest: Any) -> tuple[int, str]:
        Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps({"rows": rows}))
        return 0, ""

    monkeypatch.setattr(gpu, "command", command)
    run.execute(gpu.Stage("mos", 60, gpu.ops("mos")))
    record = run.result["stages"]["mos"]
    assert record["status"] == "failed"
    assert record["message"] == "f 2 float32: ValueError: no"
    assert record["rows"] == rows
    last = gpu.table(run.result).splitlines()[-1]
    assert last.split() == ["f", "2", "float32", "failed:", "ValueError:", "no"]


def test_peers_stand_beside_our_rows(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = gpu.Stage("mos peers", 60, gpu.ops("mos", "peers"))
    run.execute(stage)
    assert run.result["stages"]["mos peers"]["status"] == "skipped"

    ours = {"op": "f", "shape": "2", "dtype": "float32", "ms": 1.0, "peers": {}}
    run.result["stages"]["mos"] = {"status": "ok", "rows": [ours]}
    peers = {"eager": {"ms": 2.0, "differs": True, "difference": 0.5}}

    def command(run: gpu.Run, name: str, arguments: list[str], *rest: Any) -> tuple[int, str]:
        file = Path(arguments[arguments.index("--out") + 1])
        assert json.loads(file.read_text()) == {"rows": [ours]}
        file.write_text(json.dumps({"rows": [{**ours, "peers": peers}]}))
        return 0, ""

    monkeypatch.setattr(gpu, "command", command)
    run.execute(stage)
    saved = json.loads(run.file.read_text())["stages"]
    assert saved["mos"]["rows"][0]["peers"] == peers
    assert saved["mos peers"]["status"] == "failed"
    assert saved["mos peers"]["message"] == "f 2 float32: differs from eager by 0.5"


def test_rows_without_time_end_a_stage(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"op": "f", "shape": "2", "dtype": "float32", "skipped": "no time was left"}]

    def command(run: gpu.Run, name: str, arguments: list[str], *rest: Any) -> tuple[int, str]:
        Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps({"rows": rows}))
        return 0, ""

    monkeypatch.setattr(gpu, "command", command)
    run.execute(gpu.Stage("graphs", 60, gpu.ops("graphs", "graphs")))
    record = run.result["stages"]["graphs"]
    assert record["status"] == "out of time"
    assert record["message"] == "no time was left for f 2 float32"


# --- the table ------------------------------------------------------------------------------------


ROW = {
    "op": "mos_score",
    "shape": "65536 x 1008",
    "dtype": "float32",
    "ms": 2.0,
    "rate": "100 GB/s",
    "share": 0.8,
    "wanted": {"share": 0.85, "compiled": 3.0, "ms": 1.0, "faiss-gpu": 1.0},
    "peers": {
        "compiled-split": {"ms": 5.0, "differs": True},
        "compiled-padded": {"ms": 4.0},
        "official": {"ms": 30.0},
        "official, all threads": {"ms": 20.0},
        "eager-split": {"failed": "RuntimeError"},
        "faiss-gpu": {"skipped": "not installed"},
    },
}


def test_best_peers() -> None:
    found = gpu.best_peers(ROW)
    assert found == {"compiled": 2.0, "official": 15.0, "official, all threads": 10.0}


def test_misses() -> None:
    assert gpu.misses(ROW) == ["wanted 85%", "wanted 3x compiled", "wanted 1 ms"]
    assert gpu.misses({**ROW, "wanted": {"share": 0.8, "compiled": 2.0, "ms": 2.0}}) == []


def test_table(run: gpu.Run) -> None:
    run.result["stages"] = {
        "tests": {"status": "ok", "seconds": 9, "passed": 3, "failed": 0, "skipped": 1},
        "racecheck": {"status": "failed", "seconds": 5, "message": "one\nlast"},
        "mos": {"status": "ok", "seconds": 60, "rows": [ROW], "ceilings": {"copy GB/s": 3000.0}},
    }
    lines = gpu.table(run.result).splitlines()
    lines = [*lines[1:3], *lines[:1], *lines[3:]]  # the tests come after what is measured
    assert lines[0] == "tests           ok               9 s  3 passed, 0 failed, 1 skipped"
    assert lines[1] == "racecheck       failed           5 s  last"
    assert lines[4] == "A GPU, torch 2.11.0; copy GB/s 3000"
    start, notes = lines[-1].split("100 GB/s")
    assert start.split() == ["mos_score", "65536", "x", "1008", "float32", "2"]
    assert re.split(r" {2,}", notes.strip()) == [
        "80%",
        "compiled 2x, official 15x, official, all threads 10x",
        "! wanted 85%, wanted 3x compiled, wanted 1 ms, compiled-split differs",
    ]


# --- rows and their timing ------------------------------------------------------------------------


class FakeClock:
    """Gives each call the seconds that the call itself returns."""

    def graph(self, calls: gpu_ops.Calls) -> Callable[[], Any] | None:
        return None

    def times(self, calls: Iterator[Callable[[], Any]]) -> list[float]:
        return [call() for call in calls]


def test_measure_takes_turns_and_the_median() -> None:
    seen: list[int] = []

    def call(i: int) -> float:
        seen.append(i)
        return 60.0 if len(seen) == 1 else [0.1, 0.2, 0.3][i]  # the first compiles

    found = gpu_ops.measure(FakeClock(), call, [(0,), (1,), (2,)], 0.9)
    assert seen == [0, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert found["rounds"] == 9
    assert found["ms"] == pytest.approx(200)
    assert found["quartiles_ms"] == pytest.approx([100, 300])
    assert found["first_ms"] == pytest.approx(60_000)
    assert gpu_ops.measure(FakeClock(), lambda: 0.5, [()], 0.1, steps=10)["ms"] == pytest.approx(50)
    assert gpu_ops.measure(FakeClock(), lambda: 5.0, [()], 0.1)["rounds"] == 1
    assert gpu_ops.measure(FakeClock(), lambda: 1e-9, [()], 0.1)["rounds"] == 500


def test_measure_replays_a_graph_of_ten_calls_or_more() -> None:
    class Captures(FakeClock):
        def graph(self, calls: gpu_ops.Calls) -> Callable[[], Any]:
            assert len(calls) == 12  # each of the three inputs as often as the others
            return lambda: sum(call() for call in calls)

    found = gpu_ops.measure(Captures(), lambda x: x, [(1.0,), (2.0,), (3.0,)], 60, capture=True)
    assert found["clock"] == "graph"
    assert found["ms"] == pytest.approx(2000)  # of one call

    class Refuses(FakeClock):
        def graph(self, calls: gpu_ops.Calls) -> None:
            raise RuntimeError("not permitted\nmore")

    found = gpu_ops.measure(Refuses(), lambda x: x, [(1.0,)], 60, capture=True)
    assert found["clock"] == "calls: not permitted"
    assert found["ms"] == pytest.approx(1000)


CPU = gpu_ops.Setting("cpu", tiny=True)


def row(call: Callable[..., Any], **options: Any) -> gpu_ops.Row:
    x = torch.ones(1000)
    return gpu_ops.Row("f", "1000", torch.float32, call, [(x,), (x,)], 4000, **options)


def test_bench_reports_what_fails_and_goes_on(tmp_path: Path) -> None:
    def fails(x: torch.Tensor) -> None:
        raise RuntimeError("no")

    report, clock = gpu_ops.Report(tmp_path / "found.json"), gpu_ops.HostClock()
    peers = {"same": lambda x: x + 1, "other": lambda x: x + 2, "fails": fails}
    rows = [
        row(fails, peers={"same": lambda x: x}),
        row(lambda x: x + 1, peers=peers, difference=gpu_ops.far, tolerance=1e-6),
    ]
    gpu_ops.bench(iter(rows), clock, CPU, report, 60)
    report = gpu_ops.Report(tmp_path / "found.json")
    gpu_ops.bench_peers(iter(rows), clock, CPU, report, 60)
    first, second = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert first["failed"] == "RuntimeError: no"
    assert first["peers"]["same"]["ms"] > 0
    assert second["ms"] > 0
    copy = report.found["ceilings"]["copy GB/s"]
    assert second["share"] == pytest.approx(4e-3 / second["ms"] / copy)
    assert second["peers"]["same"]["differs"] is False
    assert second["peers"]["other"]["differs"] is True
    assert second["peers"]["other"]["difference"] == 1
    assert second["peers"]["fails"] == {"failed": "RuntimeError: no"}


def test_peers_of_the_rows_that_a_stopped_run_has(tmp_path: Path) -> None:
    rows = [row(lambda x: x + 1, peers={"same": lambda x: x + 1}) for _ in range(3)]
    report, clock = gpu_ops.Report(tmp_path / "found.json"), gpu_ops.HostClock()
    with pytest.raises(ValueError, match="rows of bench, got none"):
        gpu_ops.bench_peers(iter(rows), clock, CPU, report, 60)
    gpu_ops.bench(iter(rows[:2]), clock, CPU, report, 60)
    gpu_ops.bench_peers(iter(rows), clock, CPU, report, 60)
    assert [found["peers"]["same"]["ms"] > 0 for found in report.found["rows"]] == [True, True]
    report.found["rows"][0]["shape"] = "7"
    with pytest.raises(ValueError, match="must have these rows"):
        gpu_ops.bench_peers(iter(rows), clock, CPU, report, 60)


def test_bench_divides_by_the_iterations_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ops, "ceilings", lambda clock, s: {"float32 TFLOP/s": 2e-9})
    report = gpu_ops.Report(None)
    options = {"flop": 10_000.0, "steps": 10}
    rows = [
        row(lambda x: 1.0, **options),
        row(lambda x: 1.0, figures=lambda result: {"iterations": 4 * result}, **options),
    ]
    gpu_ops.bench(iter(rows), FakeClock(), CPU, report, 60)
    first, second = report.found["rows"]
    assert (first["ms"], first["share"]) == pytest.approx((100, 5))
    assert (second["ms"], second["share"]) == pytest.approx((250, 2))
    assert second["figures"] == {"iterations": 4}


def test_bench_says_what_it_leaves_out_when_time_is_up() -> None:
    report, clock = gpu_ops.Report(None), gpu_ops.HostClock()
    never = [row(lambda x: pytest.fail("called"), peers={"slow": lambda x: pytest.fail("called")})]
    gpu_ops.bench(iter(never), clock, CPU, report, -1)
    gpu_ops.bench_peers(iter(never), clock, CPU, report, -1)
    (found,) = report.found["rows"]
    assert found["skipped"] == "no time was left"
    assert found["peers"] == {"slow": {"skipped": "no time was left"}}


def test_labels_that_are_not_exact_fail_their_row() -> None:
    report = gpu_ops.Report(None)
    rows = [row(lambda x: 1.0, figures=lambda result: {"exact_labels": 0.99})]
    gpu_ops.bench(iter(rows), gpu_ops.HostClock(), CPU, report, 60)
    assert report.found["rows"][0]["failed"].endswith("99.0000% of the labels are those of float64")


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(gpu_ops, "ceilings", lambda clock, s: {"copy GB/s": 1.0})

    def culprit(x: torch.Tensor) -> None:
        raise RuntimeError("the culprit")

    report = gpu_ops.Report(tmp_path / "found.json")
    rows = [row(culprit), row(lambda x: pytest.fail("called"))]
    with pytest.raises(gpu_ops.DeviceLostError, match="the culprit"):
        gpu_ops.bench(iter(rows), gpu_ops.HostClock(), CPU, report, 60)
    (found,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert found["failed"] == "RuntimeError: the culprit"


def test_packages_that_are_missing_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_ops.PACKAGES, "faiss-gpu", "no_such_package")
    report = gpu_ops.Report(None)
    rows = [row(lambda x: x, peers={"faiss-gpu": lambda x: pytest.fail("called")})]
    gpu_ops.bench(iter(rows), gpu_ops.HostClock(), CPU, report, 60)
    gpu_ops.bench_peers(iter(rows), gpu_ops.HostClock(), CPU, report, 60)
    assert report.found["rows"][0]["peers"] == {"faiss-gpu": {"skipped": "not installed"}}


NEEDS_A_GPU = ("compiled", "flash-kmeans", "faiss-gpu")  # or half a minute of compilation


@pytest.mark.parametrize("group", gpu_ops.GROUPS)
def test_every_row_runs(group: str) -> None:
    report = gpu_ops.Report(None)
    clock = gpu_ops.HostClock()
    rows = list(gpu_ops.GROUPS[group](CPU))
    gpu_ops.bench(iter(rows), clock, CPU, report, 60)
    for found in report.found["rows"]:
        assert "failed" not in found, found
        assert found["ms"] > 0
    for each in rows:
        for name, peer in each.peers.items():
            if name.startswith(NEEDS_A_GPU):
                continue
            for inputs in each.inputs:
                theirs = peer(*inputs)
                if each.difference:
                    distance = each.difference(each.call(*inputs), theirs)
                    assert distance <= each.tolerance, (each.op, each.dtype, name)


def test_every_op_has_a_row() -> None:
    measured = {each.op.split()[0] for rows in gpu_ops.GROUPS.values() for each in rows(CPU)}
    schemas = torch._C._dispatch_get_all_op_names()
    every = {name.split("::")[1] for name in schemas if name.startswith("oodk::")}
    assert {name.split(".")[0] for name in every if not name.startswith("_")} <= measured


def test_exact_labels() -> None:
    (each,) = (r for r in gpu_ops.kmeans_rows(CPU) if r.op == "kmeans iteration")
    result = each.call(*each.inputs[0])
    assert each.figures(result)["exact_labels"] == 1
    wrong = result._replace(labels=(result.labels + 1) % 8)
    assert each.figures(wrong)["exact_labels"] == 0


def test_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_ops.samples(CPU, 1.0) == 0
    done, without = capsys.readouterr().out.split()[0], capsys.readouterr().out
    assert int(done) >= 12
    assert without == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_clock() -> None:
    x = torch.randn(1 << 24, device="cuda")
    for capture, clock in ((False, "calls: not captured"), (True, "graph")):
        inputs = [(x,), (x + 1,)]
        found = gpu_ops.measure(gpu_ops.CudaClock(), torch.clone, inputs, 0.05, capture=capture)
        assert found["clock"] == clock
        assert 1e-3 < found["ms"] < 100
