"""Everything that wants a GPU, in parts of at most nine minutes, as GPUs are often lent.

    python -m benchmarks.gpu --out DIR [--part PART ...] [--only STAGE ...] [--minutes 9]
                             [--device cpu]

Builds the package if it is not installed with its CUDA ops, runs the tests that use CUDA, the
kernels under compute-sanitizer, every op captured in a graph, and the benchmarks of gpu_ops.py:
our own rows of every group in the part "ours", their peers in a part for each group. Without
``--part`` or ``--only`` it goes on where DIR/gpu.json stands: the stages that are not done yet, in
their order, as far as the time goes. Prints a table last. DIR/gpu.json is up to date after every
row, DIR/logs.tar has what the stages wrote, and there are no other files. A stage that fails or
runs out of its time is reported and the next one follows.

``--device cpu`` runs the benchmarks' rows on tiny shapes: a smoke test, no measurement.

Exit status: 0, or 1 if a stage failed, or 2 if there is no GPU or the arguments make no sense.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARGIN = 10.0
"""Seconds before a stage's limit at which it should stop by itself."""


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # at most
    run: Callable[[Run, float], dict[str, Any]]
    on_cpu: bool = False


class StageError(Exception):
    """A stage failed; `found` is what it has found until then."""

    def __init__(self, message: str, status: str = "failed", **found: Any) -> None:
        super().__init__(message)
        self.status, self.found = status, found


class Run:
    """One call of the command: where it writes, and until when."""

    def __init__(self, out: Path, device: str, minutes: float) -> None:
        self.out, self.device = out, device
        self.file = out / "gpu.json"
        self.deadline = time.monotonic() + 60 * minutes
        self.current = ""  # stage
        self.result: dict[str, Any] = {"environment": {}, "stages": {}}
        if self.file.exists():
            self.result = json.loads(self.file.read_text())

    def limit(self, stage: Stage) -> float:
        """Seconds: the stage's own, or what is left of the whole."""
        return min(stage.seconds, self.deadline - time.monotonic())

    def keep(self, *files: Path) -> None:
        """Move files to DIR/logs.tar, as STAGE/name."""
        with tarfile.open(self.out / "logs.tar", "a") as logs:
            for file in files:
                if file.exists():
                    logs.add(file, f"{self.current}/{file.name}")
                    file.unlink()

    def save(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1))
        os.replace(part, self.file)

    def describe(self) -> None:
        """Find out what there is to run on."""
        done = subprocess.run(
            [sys.executable, str(HERE / "environment.py")], capture_output=True, text=True
        )
        if done.returncode:
            raise StageError(f"the environment could not be read: {last_lines(done.stderr)}")
        self.result["environment"] = json.loads(done.stdout)

    def execute(self, stage: Stage) -> None:
        """Run the stage and record how it went."""
        start, limit = time.monotonic(), self.limit(stage)
        self.current = stage.name
        record: dict[str, Any] = {"status": "ok"}
        try:
            if limit <= MARGIN:
                raise StageError("no time was left", "skipped")
            print(f"=== {stage.name}, at most {limit:.0f} s", flush=True)
            record.update(stage.run(self, limit))
        except StageError as error:
            record.update(error.found, status=error.status, message=str(error))
        except Exception as error:
            record.update(status="failed", message=f"{type(error).__name__}: {error}")
        record["seconds"] = round(time.monotonic() - start, 1)
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["device"] = self.result["environment"].get("device") or self.device
        self.result["stages"][stage.name] = record
        self.save()
        print(f"{record['status']} {record.get('message', '')}".rstrip(), flush=True)


def last_lines(text: str, n: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-n:])


def command(
    run: Run, name: str, arguments: list[str], seconds: float, folder: Path, **environment: str
) -> tuple[int | None, str]:
    """Exit status, None if it was stopped at its limit, and output, which DIR/logs.tar keeps.

    Interrupted first, so that pytest and the like still write what they have; then killed, with
    whatever it has started.
    """
    log = run.out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        for patience, kill in ((seconds, signal.SIGINT), (MARGIN / 2, signal.SIGKILL)):
            try:
                code = process.wait(max(patience, 1))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kill)
            else:
                status = code if kill == signal.SIGINT else None
                break
        process.wait()
    output = log.read_text(errors="replace")
    run.keep(log)
    return status, output


def finished(status: int | None, output: str, **found: Any) -> dict[str, Any]:
    """`found`, if the command succeeded."""
    if status is None:
        raise StageError("stopped at its time limit", "out of time", **found)
    if status:
        raise StageError(last_lines(output), **found)
    return found


# --- stages ---------------------------------------------------------------------------------------


def build(run: Run, seconds: float) -> dict[str, Any]:
    environment = run.result["environment"]
    arguments = ["install", "--no-build-isolation", "--no-deps", "--force-reinstall", "."]
    targets = {"CUDAARCHS": f"{environment['architecture']}-real", "OODK_CUDA": "ON"}
    pip = [sys.executable, "-m", "pip", *arguments]
    status, output = command(run, "build", pip, seconds - MARGIN, ROOT, **targets)
    finished(status, output)
    run.describe()
    info = run.result["environment"]["oodkernels"]
    if not info or not info["cuda"]:
        raise StageError(f"built, but its CUDA ops do not load: {info}")
    return {}


def counted(report: Path) -> dict[str, Any]:
    """Of a JUnit report: how many tests passed, failed and were skipped, and which failed."""
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    kinds = [{child.tag for child in case} for case in cases]
    failed = [
        case.get("name")
        for case, kind in zip(cases, kinds, strict=True)
        if {"failure", "error"} & kind
    ]
    skipped = sum("skipped" in kind for kind in kinds)
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed}


def tests(run: Run, seconds: float) -> dict[str, Any]:
    """Every test with CUDA in its name: whatever runs on each device, and what is for GPUs only."""
    report = run.out / "tests.xml"
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", f"--junitxml={report.resolve()}"]
    pytest += ["--ignore-glob=test_cuda_emulation*", "--ignore=test_cuda_resources.py"]
    status, output = command(run, "tests", pytest, seconds - MARGIN, ROOT / "python_tests")
    found = counted(report)
    run.keep(report)
    if status == 0 and not found.get("passed"):
        raise StageError("no test ran", **found)
    if status and found.get("failed"):
        raise StageError(f"{found['failed']} tests failed, see logs.tar", **found)
    return finished(status, output, **found)


def sanitizer(tool: str) -> Callable[[Run, float], dict[str, Any]]:
    """The ops' samples under compute-sanitizer, with torch's cache of memory off, lest an access
    out of bounds land in another tensor."""

    def stage(run: Run, seconds: float) -> dict[str, Any]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise StageError("compute-sanitizer is not on PATH", "skipped")
        arguments = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=oodk"]
        if tool == "memcheck":  # what torch tries and handles is no fault
            arguments += ["--report-api-errors", "no"]
        arguments += [sys.executable, str(HERE / "gpu_ops.py"), "samples"]
        arguments += ["--seconds", str(round(seconds - 2 * MARGIN))]
        status, output = command(
            run, tool, arguments, seconds - MARGIN, HERE, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        lines = [line for line in output.splitlines() if "SUMMARY" in line or " samples" in line]
        found = {"summary": lines}
        if status == 0 and not any("SUMMARY" in line for line in lines):
            raise StageError(f"{tool} gave no summary, see logs.tar", **found)
        return finished(status, output, **found)

    return stage


def named(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['shape']} {row['dtype']}"


def faults(row: dict[str, Any], mode: str) -> list[str]:
    """What no stage may pass with: a row of ours that failed, or whose result is not its peer's."""
    if mode != "peers":
        return [row["failed"]] if "failed" in row else []
    differ = {name: peer for name, peer in row["peers"].items() if peer.get("differs")}
    return [f"differs from {name} by {peer['difference']:g}" for name, peer in differ.items()]


def ops(group: str, mode: str = "bench") -> Callable[[Run, float], dict[str, Any]]:
    """A group of gpu_ops.py, in a process of its own: an error on the GPU ends only that. The
    peers' stage adds to the rows of the group's own."""

    def stage(run: Run, seconds: float) -> dict[str, Any]:
        file = run.out / f".{group}.json"
        file.unlink(missing_ok=True)
        if mode == "peers":
            ours = run.result["stages"].get(group, {})
            if not ours.get("rows"):
                raise StageError(f"stage {group!r} has no rows to stand beside", "skipped")
            file.write_text(json.dumps({"rows": ours["rows"]}))
        arguments = [sys.executable, str(HERE / "gpu_ops.py"), mode, "--out", str(file.resolve())]
        arguments += ["--device", run.device, "--seconds", str(round(seconds - 2 * MARGIN))]
        if mode != "graphs":
            arguments += ["--group", group]
        status, output = command(run, group, arguments, seconds - MARGIN, HERE)
        found = json.loads(file.read_text()) if file.exists() else {}
        file.unlink(missing_ok=True)
        rows = found.get("rows", [])
        if mode == "peers":
            run.result["stages"][group]["rows"] = rows
            found = {}
        finished(status, output, **found)
        wrong = [f"{named(row)}: {what}" for row in rows for what in faults(row, mode)]
        if wrong:
            raise StageError("; ".join(wrong), **found)
        late = [named(row) for row in rows if "skipped" in row]
        if late and mode != "peers":
            raise StageError(f"no time was left for {', '.join(late)}", "out of time", **found)
        return found

    return stage


GROUPS = ("mos", "mos_loss", "logits", "outlier", "roc", "streaming", "kmeans", "dos", "posthoc")
STAGES = [
    Stage("build", 150, build),
    *(Stage(group, 43, ops(group), on_cpu=True) for group in GROUPS),
    Stage("tests", 200, tests),
    Stage("memcheck", 90, sanitizer("memcheck")),
    Stage("racecheck", 110, sanitizer("racecheck")),
    Stage("initcheck", 90, sanitizer("initcheck")),
    Stage("graphs", 50, ops("graphs", "graphs")),
    *(Stage(f"{group} peers", 240, ops(group, "peers"), on_cpu=True) for group in GROUPS),
]
PARTS = {
    "ours": ["build", *GROUPS],
    "tests": ["tests", "memcheck", "racecheck", "initcheck", "graphs"],
    "mos": ["mos peers", "mos_loss peers"],
    "scores": ["logits peers", "outlier peers"],
    "roc": ["roc peers", "streaming peers"],
    "kmeans": ["kmeans peers"],
    "dos": ["dos peers"],
    "posthoc": ["posthoc peers"],
}
MINUTES = 9.0
"""What a part takes at most."""


# --- the table ------------------------------------------------------------------------------------


def best_peers(row: dict[str, Any]) -> dict[str, float]:
    """How many times as long the fastest of each kind of peer takes: "compiled-split" is one of
    kind "compiled"."""
    times: dict[str, float] = {}
    for name, peer in row.get("peers", {}).items():
        if "ms" in peer:
            kind = name.split("-")[0] if name.startswith(("eager-", "compiled-")) else name
            ratio = peer["ms"] / row["ms"]
            times[kind] = min(times.get(kind, ratio), ratio)
    return times


def misses(row: dict[str, Any]) -> list[str]:
    """What of ``wanted`` the row falls short of."""
    short = []
    for name, wanted in row.get("wanted", {}).items():
        if name == "ms":
            if row["ms"] > wanted:
                short.append(f"wanted {wanted:g} ms")
        elif name == "share":
            if row["share"] < wanted:
                short.append(f"wanted {wanted:.0%}")
        else:
            ratio = best_peers(row).get(name)
            if ratio is not None and ratio < wanted:
                short.append(f"wanted {wanted:g}x {name}")
    return short


def table(result: dict[str, Any]) -> str:
    """What was found, a line a stage and a line an op."""
    lines, ceilings = [], {}
    for stage in STAGES:
        record = result["stages"].get(stage.name)
        if record is None:
            continue
        line = f"{stage.name:<15} {record['status']:<11} {record['seconds']:6.0f} s"
        if "passed" in record:
            line += f"  {record['passed']} passed, {record['failed']} failed, "
            line += f"{record['skipped']} skipped"
        if record["status"] != "ok":
            line += "  " + last_lines(record.get("message", ""), 1)
        lines.append(line)
        ceilings = record.get("ceilings", ceilings)
    environment = result["environment"]
    lines.append("")
    lines.append(
        f"{environment.get('device') or 'CPU, tiny shapes: a smoke test'}, torch "
        f"{environment.get('torch')}; "
        + ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())
    )
    heading = f"{'op':<21} {'shape':<22} {'dtype':<9} {'ms':>9} {'rate':>13} {'share':>6}  peers"
    lines += [heading, "-" * len(heading)]
    for stage in STAGES:
        for row in result["stages"].get(stage.name, {}).get("rows", ()):
            start = f"{row['op']:<21} {row['shape']:<22} {row['dtype']:<9}"
            if "ms" not in row:
                if "failed" in row:
                    lines.append(f"{start} failed: {row['failed'].splitlines()[0]}")
                continue
            share = f"{row['share']:.0%}" if "share" in row else ""
            peers = ", ".join(f"{kind} {x:.3g}x" for kind, x in best_peers(row).items())
            differ = [n for n, p in row.get("peers", {}).items() if p.get("differs")]
            notes = misses(row) + [f"{name} differs" for name in differ]
            line = f"{start} {row['ms']:9.4g} {row.get('rate', ''):>13} {share:>6}  {peers}"
            lines.append(line + ("  ! " + ", ".join(notes) if notes else ""))
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------


def chosen_stages(
    names: list[str] | None, device: str, environment: dict[str, Any], done: dict[str, Any]
) -> list[Stage]:
    """The stages to run, in their order; those named, or all that the device can run and that are
    not yet `done`.

    The package is built if asked for by name, or where its CUDA ops are missing.
    """
    known = {stage.name for stage in STAGES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}: there are {', '.join(s.name for s in STAGES)}")
    if names is None:
        passed = {name for name, record in done.items() if record["status"] == "ok"}
        chosen = [stage for stage in STAGES if stage.name not in passed]
    else:
        chosen = [stage for stage in STAGES if stage.name in names]
    if device == "cpu":
        impossible = [stage.name for stage in chosen if names and not stage.on_cpu]
        if impossible:
            raise ValueError(f"stage {impossible[0]!r} needs a GPU")
        return [stage for stage in chosen if stage.on_cpu]
    built = (environment.get("oodkernels") or {}).get("cuda")
    if built and names is None:
        chosen = [stage for stage in chosen if stage.name != "build"]
    if not built and not any(stage.name == "build" for stage in chosen):
        chosen.insert(0, STAGES[0])
    return chosen


def stages_of(
    parts: list[str] | None, only: list[str] | None, environment: dict[str, Any]
) -> list[str] | None:
    """Names of stages, of parts and one by one; the package is built in a part where it has to."""
    if parts is None and only is None:
        return None
    built = (environment.get("oodkernels") or {}).get("cuda")
    of_parts = [
        name for part in parts or () for name in PARTS[part] if name != "build" or not built
    ]
    return of_parts + (only or [])


def main(arguments: list[str] | None = None) -> int:
    about = "Builds, tests and measures everything that wants a GPU"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help=", ".join(stage.name for stage in STAGES)
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, help="stages that belong together")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    run = Run(options.out, options.device, options.minutes)
    try:
        run.describe()
        environment = run.result["environment"]
        if options.device == "cuda" and not environment["device"]:
            raise ValueError(
                f"no CUDA device: {environment['why']}. --device cpu runs the benchmarks on tiny "
                "shapes without one"
            )
        names = stages_of(options.part, options.only, environment)
        if options.device == "cpu" and options.part:
            names = [stage.name for stage in STAGES if stage.on_cpu and stage.name in (names or ())]
        stages = chosen_stages(names, options.device, environment, run.result["stages"])
    except (ValueError, StageError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    for stage in stages:
        run.execute(stage)
    print(table(run.result))
    bad = [s.name for s in stages if run.result["stages"][s.name]["status"] != "ok"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
