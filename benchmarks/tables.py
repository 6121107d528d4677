"""Writes docs/benchmarks.md, and the tables of the README and of docs/many-classes.md, from
benchmarks/results/*.json; --check fails where they are others.

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
from statistics import mean, stdev
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
        "mos-cpu-xeon-2",
        r"test_score\[(?P<peer>.+)-f32-(?P<row>[\dx]+)\]",
        "rows x classes x groups",
        MOS,
    ),
    Timings(
        "MOS: loss and its gradient",
        "`mos_loss` with backward in milliseconds, float32.",
        "mos-cpu-xeon-2",
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
        "The k nearest rows of a bank",
        "Milliseconds of `nearest_neighbors`, exact, beside the same product of matrices and no "
        "more.",
        "neighbors-cpu-xeon-2",
        r"test_search\[(?P<row>[\dx]+)-(?P<peer>.+)\]",
        "queries x bank x features x k",
        {"oodkernels": "oodkernels", "oodkernels, bank in bfloat16": "oodkernels, bfloat16"}
        | {"faiss": "faiss", "torch": "torch", "torch.mm alone": r"torch\.mm"},
    ),
    Timings(
        "Post-hoc detectors in one pass",
        "Milliseconds of families A to D, 4,000 rows of 512 features and 100 classes: sharing what "
        "they read, one after the other, and the products of matrices that they cannot do without, "
        "at the rate of `torch.mm`.",
        "posthoc-cpu-xeon-2",
        r"test_(?P<row>all)\[(?P<peer>.+)\]",
        "detectors",
        {"in one pass": "together", "one by one": "separately", "products alone": "products"},
        names={"all": "29, families A to D"},
    ),
    Timings(
        "Post-hoc detectors beside pytorch-ood's",
        "Microseconds a row, of those that both have; pytorch-ood's run one after the "
        "other, on 200 rows.",
        "posthoc-cpu-xeon-2",
        r"test_peers\[(?P<row>\w+)-(?P<peer>.+)\]",
        "detectors",
        {"oodkernels": "oodkernels", "pytorch-ood": "pytorch-ood"},
        figure="us a row",
        names={"all": "17 of families A to D"},
    ),
    Timings(
        "Many settings of a detector",
        "Milliseconds of one percentile and of twenty, 4,000 rows of 512 features and 100 classes.",
        "posthoc-cpu-xeon-2",
        r"test_percentiles\[(?P<row>\w+)-(?P<peer>\d+)\]",
        "what",
        {"one": "1", "twenty": "20"},
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


# --- the page on many classes ----------------------------------------------------------------


def glyphs() -> dict[str, Any]:
    """The record of ``demo_table.py``."""
    record: dict[str, Any] = json.loads((RESULTS / "glyphs.json").read_text())
    return record


def _pm(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def _over(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {"mean": mean(found), "std": stdev(found)}


def _averages(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(Model, score) -> its row of means over the OOD sets."""
    return {(r["model"], r["score"]): r for r in record["summary"] if r["ood_set"] == "average"}


def _favoured(record: dict[str, Any], model: str) -> str:
    """The score of a model that the validation data favour, on average over the seeds."""
    seen = [seed["methods"][model]["validation AUROC"] for seed in record["by seed"]]
    known = set.intersection(*map(set, seen))
    return max(sorted(known), key=lambda score: mean(s[score] for s in seen))


def short() -> str:
    """Three lines for the README."""
    record = glyphs()
    rows = _averages(record)
    lines = []
    for what, model in (
        ("flat softmax, the post-hoc score that validation favours", "flat"),
        ("MOS, groups by block of Unicode, its own score", "MOS taxonomy"),
        ("Outlier Exposure, its own score", "OE"),
    ):
        own = {"MOS taxonomy": "mos-log-odds", "OE": "msp"}
        score = own.get(model) or _favoured(record, model)
        row = rows[model, score]
        cells = [_pm(row[figure]) for figure in ("id_accuracy", "fpr95", "auroc")]
        lines.append([f"{what} (`{score}`)", *cells])
    return _table(["", "accuracy", "FPR95", "AUROC"], lines)


def heads() -> str:
    """Every head by its own score, and by the one that validation favours."""
    record = glyphs()
    rows, by_set, lines = _averages(record), defaultdict(dict), []
    for row in record["summary"]:
        by_set[row["model"], row["score"]][row["ood_set"]] = row["fpr95"]
    sets = [name for name in next(iter(by_set.values())) if name != "average"]
    for model, method in record["by seed"][0]["methods"].items():
        own = OWN.get(model, "msp")
        for score in dict.fromkeys((own, _favoured(record, model))):
            row = rows[model, score]
            shown = [_pm(row[figure]) for figure in ("id_accuracy", "fpr95", "auroc")]
            each = [f"{100 * by_set[model, score][name]['mean']:.0f}" for name in sets]
            mark = "" if score == own else " (validation)"
            seen = "yes" if "outliers" in method["trained on"] else ""
            lines.append([model, f"{score}{mark}", seen, *shown, *each])
    heads = ["head", "score", "outliers", "accuracy", "FPR95", "AUROC", *sets]
    return _table(heads, lines)


OWN = {
    **dict.fromkeys(("MOS taxonomy", "MOS features", "MOS random", "MOS outliers"), "mos-log-odds"),
    **dict.fromkeys(("absent class", "NTOM", "DOS"), "absent-class"),
    **dict.fromkeys(("energy-bounded", "POEM"), "energy"),
}
"""Scores by which settings are chosen, where that is not MSP."""


def post_hoc() -> str:
    """Detectors of the flat head, the best first."""
    rows = [row for (model, _), row in _averages(glyphs()).items() if model == "flat"]
    rows.sort(key=lambda row: row["fpr95"]["mean"])
    lines = [[f"`{row['score']}`", _pm(row["fpr95"]), _pm(row["auroc"])] for row in rows]
    half = -(-len(lines) // 2)
    lines += [[""] * 3] * (2 * half - len(lines))
    both = [a + b for a, b in zip(lines[:half], lines[half:], strict=True)]
    return _table(["detector", "FPR95", "AUROC"] * 2, both)


def rates() -> str:
    """AUROC on validation, and accuracy, against the learning rate."""
    record, lines = glyphs(), []
    tried = [{m: v["tried"] for m, v in seed["methods"].items()} for seed in record["by seed"]]
    for model, settings in tried[0].items():
        if any("m_in" in setting for setting in settings):
            continue
        cells = []
        for i in range(len(settings)):
            auroc = mean(seed[model][i]["auroc"] for seed in tried)
            accuracy = mean(seed[model][i]["accuracy"] for seed in tried)
            cells.append(f"{100 * auroc:.1f} ({100 * accuracy:.1f})")
        lines.append([model, *cells])
    return _table(["head", *(str(s["lr"]) for s in tried[0]["flat"])], lines)


def scores() -> str:
    """FPR95 of every score that was tried on MOS heads, on glyphs and on synthetic features."""
    record = glyphs()
    synthetic = json.loads((RESULTS / "scale-scores.json").read_text())["results"]
    models = list(record["by seed"][0]["scores"])
    kinds = list(dict.fromkeys(row["groups"] for row in synthetic))
    lines = []
    for name in record["by seed"][0]["scores"][models[0]]:
        cells = []
        for model in models:
            found = [seed["scores"][model][name] for seed in record["by seed"]]
            sets = [key for key in found[0] if key != "validation"]
            each = [
                (mean(f[s]["fpr95"] for s in sets), mean(f[s]["auroc"] for s in sets))
                for f in found
            ]
            cells.append(" / ".join(f"{100 * mean(v):.1f}" for v in zip(*each, strict=True)))
        for kind in kinds:
            found = [row["scores"][name] for row in synthetic if row["groups"] == kind]
            each = [
                (mean(v["fpr95"] for v in f.values()), mean(v["auroc"] for v in f.values()))
                for f in found
            ]
            cells.append(" / ".join(f"{100 * mean(v):.1f}" for v in zip(*each, strict=True)))
        lines.append([name, *cells])
    heads = [*(m.removeprefix("MOS ") for m in models), *(f"synthetic, {k}" for k in kinds)]
    return _table(["score", *heads], lines)


def claimed() -> str:
    """Of what is OOD and kept, which group claims the most."""
    record, lines = glyphs(), []
    claims = [seed["claims"] for seed in record["by seed"]]
    for model, first in claims[0].items():
        for name in first["sets"]:
            if name == "test":
                continue
            kept = mean(sum(c[model]["sets"][name]) for c in claims)
            top = [
                max(c[model]["sets"][name]) / max(1e-9, sum(c[model]["sets"][name])) for c in claims
            ]
            groups = [
                c[model]["groups"][max(range(10), key=c[model]["sets"][name].__getitem__)]
                for c in claims
            ]
            which = ", ".join(dict.fromkeys(groups)) if model == "MOS taxonomy" else ""
            lines.append([model, name, f"{100 * kept:.0f}", f"{100 * mean(top):.0f}", which])
    return _table(["head", "OOD set", "kept, %", "of these in one group, %", "which"], lines)


def counts() -> str:
    """MOS against the number of groups."""
    record = glyphs()
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for seed in record["by seed"]:
        for row in seed["group counts"]:
            found[row["model"], row["groups"]].append(row)
    averages = _averages(record)
    lines = []
    for model in ("MOS features", "MOS random"):
        cells = {k: found[m, k] for m, k in found if m == model}
        texts = {k: f"{100 * mean(r['fpr95'] for r in rows):.1f}" for k, rows in cells.items()}
        texts[10] = f"{100 * averages[model, 'mos-log-odds']['fpr95']['mean']:.1f}"
        lines.append([model, *(texts[k] for k in sorted(texts))])
    return _table(["head", *(f"K = {k}" for k in sorted(texts))], lines)


def synthetic_scores() -> str:
    """FPR95 and AUROC of the scores of MOS heads on synthetic features alone."""
    rows = json.loads((RESULTS / "scale-scores.json").read_text())["results"]
    kinds = list(dict.fromkeys(row["groups"] for row in rows))
    lines = []
    for name in rows[0]["scores"]:
        lines.append([name])
        for kind in kinds:
            found = [row["scores"][name].values() for row in rows if row["groups"] == kind]
            means = [mean(v[f] for sets in found for v in sets) for f in ("fpr95", "auroc")]
            lines[-1].append(" / ".join(f"{100 * value:.1f}" for value in means))
    return _table(["score", *kinds], lines)


def many_classes() -> str:
    """FPR95 on synthetic features."""
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
    return _table(["OOD", "classes", *methods], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        short,
        heads,
        post_hoc,
        rates,
        scores,
        claimed,
        counts,
        synthetic_scores,
        many_classes,
    )
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "many-classes.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}", text)


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
    sections: list[Callable[[], str]] = [*(t.markdown for t in TIMINGS), monitor]
    return "\n".join([INTRODUCTION, *(section() for section in sections)])


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    pages = {PAGE: page(), **{path: filled(path.read_text(encoding="utf-8")) for path in PAGES}}
    for path, text in pages.items():
        if not sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            name = path.relative_to(ROOT)
            sys.exit(f"{name} is not what benchmarks/results holds: run this script")


if __name__ == "__main__":
    main()
