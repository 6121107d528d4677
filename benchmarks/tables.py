"""Writes docs/benchmarks.md from benchmarks/results/*.json; --check fails where it is another.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
FIGURES = {
    "id_accuracy": "accuracy",
    "fpr95": "FPR95",
    "auroc": "AUROC",
    "aupr_in": "AUPR-in",
    "aupr_out": "AUPR-out",
}

INTRODUCTION = """\
# Benchmarks

<!-- Written by benchmarks/tables.py. -->

Medians of CPU runs, peers in the same run; every figure is in `benchmarks/results/`. The fastest
of a row is bold; in brackets, how many times as long a peer takes. The machine is virtual, and its
memory bandwidth varies by a third from minute to minute. Nothing is said of the CUDA kernels'
speed. `pytest benchmarks --benchmark-only` measures yours; `benchmarks/tables.py` writes this page.
"""


@dataclass(frozen=True)
class Timings:
    """A table of the results of one benchmark: a row for each shape, a column for each peer."""

    title: str
    text: str
    file: str
    name: str
    """Pattern of the benchmark's parameters, with the groups ``row`` and ``peer``."""
    rows: str
    """What a row says of its shape."""
    columns: dict[str, str]
    """Peer in the table: pattern of the peers in the file, of which the best counts."""
    figure: str = "median_ms"
    extra: str | None = None
    """Another figure, in brackets instead of the ratio."""
    names: dict[str, str] = field(default_factory=dict)
    """Rows that are called otherwise."""

    def markdown(self) -> str:
        record = json.loads((RESULTS / f"{self.file}.json").read_text())
        found: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        for result in record["results"]:
            if match := re.fullmatch(self.name, result["name"]):
                found[match["row"]].append((match["peer"], result))
        lines = []
        for row, results in sorted(found.items(), key=lambda item: _numbers(item[0])):
            cells = [self.best(results, pattern) for pattern in self.columns.values()]
            first = cells[0][self.figure]
            lines.append([self.names.get(row, row.replace("x", " x ").replace("-", ", "))])
            for cell in cells:
                if cell is None:
                    lines[-1].append("-")
                    continue
                value = cell[self.figure]
                text = _shown(value)
                if value == min(c[self.figure] for c in cells if c is not None):
                    text = f"**{text}**"
                if self.extra is not None:
                    text += f" ({cell[self.extra]:,.1f})"
                elif cell is not cells[0]:
                    text += f" ({value / first:.1f}x)"
                lines[-1].append(text)
        machine = record["machine"]
        built = machine["oodkernels"]
        where = (
            f"{machine['processor']}, {machine['cores']} cores, {built['cpu_capability']}, torch "
            f"{built['torch']}, {record['date']}; `{self.file}.json`"
        )
        table = _table([self.rows, *self.columns], lines)
        return f"## {self.title}\n\n{self.text}\n\n{table}\n\n{where}.\n"

    def best(self, results: Iterable[tuple[str, dict[str, Any]]], pattern: str) -> Any:
        fitting = [result for peer, result in results if re.fullmatch(pattern, peer)]
        return min(fitting, key=lambda result: result[self.figure]) if fitting else None


MOS = {
    "oodkernels": "oodk",
    "official loop": "official",
    "torch, eager or compiled": "(eager|compiled)-.*",
}
KMEANS = "points x features x clusters"
TIMINGS = [
    Timings(
        "MOS: score",
        "`mos_score` in milliseconds, float32.",
        "mos-cpu-epyc-4-run2",
        r"test_score\[(?P<peer>.+)-f32-(?P<row>[\dx]+)\]",
        "rows x classes x groups",
        MOS,
    ),
    Timings(
        "MOS: loss and its gradient",
        "`mos_loss` with backward in milliseconds, float32.",
        "mos-cpu-epyc-4-run2",
        r"test_loss\[(?P<peer>.+)-f32-(?P<row>[\dx]+)\]",
        "rows x classes x groups",
        MOS,
    ),
    Timings(
        "DOS: selection",
        "`dos_select` with five restarts, in milliseconds; the official step is scikit-learn's "
        "K-means at its best number of threads.",
        "dos-cpu-epyc-4",
        r"test_selection\[(?P<row>[\dx]+)-(?P<peer>.+)\]",
        "candidates x features x clusters",
        {"oodkernels": "oodkernels", "official step": "official.*"},
    ),
    Timings(
        "K-means: an iteration",
        "Milliseconds of a Lloyd iteration, the same start and number of iterations for all, all "
        'overheads included; "sgemm" is the product of points and centroids alone, written out.',
        "kmeans-iteration-cpu-epyc-4",
        r"test_iteration\[(?P<row>[\dx]+)-(?P<peer>.+)\]",
        KMEANS,
        {"oodkernels": "oodkernels.*", "sgemm": "sgemm", "scikit-learn": "scikit-learn.*"}
        | {"faiss": "faiss", "torch": "torch"},
        figure="ms an iteration",
    ),
    Timings(
        "K-means: the whole call",
        "Milliseconds with five restarts, each with its own seeding, and in brackets the inertia "
        "that is reached (lower is better). faiss: one start at random points.",
        "kmeans-call-cpu-epyc-4",
        r"test_call\[(?P<row>[\dx]+)-(?P<peer>.+)\]",
        KMEANS,
        {"oodkernels": "oodkernels", "scikit-learn": "scikit-learn.*"}
        | {"torch, greedy k-means++": "torch", "faiss, 10 iterations": "faiss, 10 iterations"},
        extra="inertia",
    ),
    Timings(
        "Outlier Exposure: loss and its gradient",
        "Milliseconds, two thirds of the rows outliers; of several ways to write it in torch the "
        "best.",
        "losses-cpu-epyc-4",
        r"test_outlier_exposure\[(?P<peer>.+?)-(?P<row>(?:f32|bf16)-[\dx]+)\]",
        "type, rows x classes",
        {"oodkernels": "oodk", "torch, compiled": "compiled-.*", "torch, eager": "eager-.*"}
        | {"pytorch-ood": "pytorch-ood"},
    ),
    Timings(
        "MSP, max logit, energy and entropy together",
        "Milliseconds of all four scores of the same logits.",
        "detectors-cpu-epyc-4",
        r"test_softmax_detectors\[(?P<peer>.+?)-(?P<row>(?:f32|bf16)-[\dx]+)\]",
        "type, rows x classes",
        {"oodkernels": "oodk", "torch, compiled": "compiled", "torch, eager": "eager"}
        | {"pytorch-ood": "pytorch-ood"},
    ),
    Timings(
        "Exact metrics",
        "AUROC, both AUPRs and FPR95 of float32 scores, in milliseconds on all cores.",
        "roc-cpu-epyc-4",
        r"test_(?:roc_metrics|peers)\[all-(?P<row>1e\+0\d)-(?P<peer>f32|[a-z].+)\]",
        "scores",
        {"oodkernels": "f32", "torch": "torch", "pytorch-ood": "pytorch-ood"}
        | {"torchmetrics": "torchmetrics", "scikit-learn": "sklearn"},
        names={"1e+06": "1,000,000", "1e+07": "10,000,000"},
    ),
]


def demo() -> str:
    record = json.loads((RESULTS / "demo-five-seeds.json").read_text())
    table = demo_table(record["summary"], record["kinds"])
    return f"""## What the demo finds

`oodk demo` trains eleven methods on 1,198 handwritten digits, with one backbone and one budget, and
compares their scores on faces, textures and photographs. Mean and standard deviation of
{len(record["seeds"])} seeds in per cent, averaged over the three OOD sets; the outliers trained on
are from other photographs and noise. Methods that were shown outliers know more: compare within a
kind. The margins of the energy losses (-10 and -3) were chosen for this network, with its OOD
figures in sight. Ten classes are no place for MOS, which is made for thousands, and here it does
not win. The figures are from before Outlier Exposure and energy read two outliers for each image
and NTOM and POEM followed their authors' code. `demo-five-seeds.json`, by
`benchmarks/demo_table.py`.

{table}
"""


def demo_table(rows: list[dict[str, Any]], kinds: dict[str, list[str]]) -> str:
    """Averages over the OOD sets in per cent; the best mean of a column in bold, by kind."""
    lines = []
    for kind, models in kinds.items():
        part = [row for row in rows if row["ood_set"] == "average" and row["model"] in models]
        best = {
            figure: (min if figure == "fpr95" else max)(row[figure]["mean"] for row in part)
            for figure in FIGURES
        }
        for row in part:
            cells = []
            for figure in FIGURES:
                value, spread = row[figure]["mean"], row[figure]["std"]
                text = f"{100 * value:.2f} ± {100 * spread:.2f}"
                cells.append(f"**{text}**" if value == best[figure] else text)
            lines.append([kind, row["model"], row["score"], *cells])
    return _table(["trained on", "model", "score", *FIGURES.values()], lines)


def many_classes() -> str:
    record = json.loads((RESULTS / "scale-mos.json").read_text())
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in record["results"]:
        key = result["set"], result["classes"]
        found[key][result["method"]].append(100 * result["fpr95"])
    methods = list(dict.fromkeys(result["method"] for result in record["results"]))
    lines = []
    for (kind, classes), by_method in sorted(found.items()):
        values = [mean(by_method[method]) for method in methods]
        cells = [f"**{v:.1f}**" if v == min(values) else f"{v:.1f}" for v in values]
        lines.append([kind, f"{classes:,}", *cells])
    return f"""## Many classes

FPR95 in per cent of linear heads of one budget on synthetic hierarchical features
(`oodkernels.data.synthetic`; not images). Far are unseen super-classes, near unseen classes. On far
OOD it is as in the MOS paper, taxonomy best where classes are many; on near OOD random groups win
here, which the paper did not look at. `scale-mos.json`, by `benchmarks/scale.py`, which also
studies the selection of outliers (`scale-dos.json`): DOS, greedy and uniform end level, NTOM is
behind.

{_table(["OOD", "classes", *methods], lines)}
"""


def monitor() -> str:
    record = json.loads((RESULTS / "monitor.json").read_text())
    quiet = record["false_alarms"]
    runs, samples = (sum(row[key] for row in quiet) for key in ("runs", "samples"))
    false = sum(row["runs_with_a_false_alarm"] for row in quiet)
    lines = [
        [
            f"{row['shift_in_sigma']:+g} sigma",
            *(f"{row[key]:,.0f}" for key in ("median", "least", "most")),
            ", ".join(f"{kind} {n}" for kind, n in row["first_alarm_by"].items()),
            f"{row['runs']}",
        ]
        for row in record["delays"]
    ]
    held_out = record["calibration_samples"]
    length = f"{record['delays'][0]['quiet_samples']:,}"
    return f"""## What the monitor finds

`Monitor` with {held_out:,} calibration samples at level {record["level"]:g}, the most that the
probability of any false alarm in a stream can be. Of {runs} streams with {samples:,} ID samples in
all, the longest of a million, {false} had one. After {length} quiet samples of a normal score, a
shift of its mean is found within so many samples:

{_table(["shift", "median", "least", "most", "found first by", "streams"], lines)}

`monitor.json`, by `benchmarks/monitor.py`.
"""


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])


def _numbers(row: str) -> tuple[Any, ...]:
    """Rows by type, then by their numbers."""
    kind = row.partition("-")[0] if row[0] in "bf" else ""
    return kind, [float(n) for n in re.findall(r"\d+(?:e\+\d+)?", row.removeprefix(kind))]


def _shown(value: float) -> str:
    """Three digits, all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def page() -> str:
    sections: list[Callable[[], str]] = [
        *(t.markdown for t in TIMINGS),
        demo,
        many_classes,
        monitor,
    ]
    return "\n".join([INTRODUCTION, *(section() for section in sections)])


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    text = page()
    if not sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/benchmarks.md is not what benchmarks/results holds: run this script")


if __name__ == "__main__":
    main()
