from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from processes import run_code

pytest.importorskip("jinja2")
pytest.importorskip("lightning_fabric")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import matplotlib

from oodkernels.data import glyphs, open_samples
from oodkernels.demo import METHODS, Settings, StudyResult, heads, run
from oodkernels.demo import report as demo_report
from oodkernels.demo.methods import FLAT
from oodkernels.demo.models import GlyphNet
from oodkernels.deploy import Bundle
from oodkernels.detectors import DETECTORS, MOS, Energy, applicable
from oodkernels.evaluation.methods import OTHER, OWN
from oodkernels.evaluation.results import FIGURES_IN_WORDS
from oodkernels.evaluation.tables import METRICS
from oodkernels.metrics.ood import ood_metrics
from oodkernels.nn import Head
from oodkernels.training import load_weights, reproducible

SMALL = {"size": 16, "train": 8, "test": 4, "ood": 60, "outliers": 200, "batch": 64}
SETTINGS = Settings(seed=1, classes=40, epochs=8, steps=20, curve=(20, 30), **SMALL)
WITH_OUTLIERS = ["OE", "energy-bounded", "MOS outliers", "absent class", "NTOM", "POEM", "DOS"]
GROUPED = ["MOS taxonomy", "MOS features", "MOS random"]
ALL_GROUPED = [*GROUPED, "MOS outliers"]


@pytest.fixture(scope="module", autouse=True)
def few_characters() -> Iterator[None]:
    """A sixth of the characters, to be drawn in a second."""
    whole = glyphs.block_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "block_of", lambda c: whole(c) if ord(c) % 6 == 0 else "")
        glyphs._classes.cache_clear()
        yield
    glyphs._classes.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, told: list[tuple[str, int, int]]) -> StudyResult:
    return run(SETTINGS, folder, lambda *step: told.append(step))


@pytest.fixture(scope="module")
def html(result: StudyResult) -> str:
    return demo_report.to_html(result)


def test_every_method_is_on_every_set(result: StudyResult) -> None:
    both = {"logits", "features"}
    flat = applicable(both, trained_on={*both, "labels"}, head=True)
    names = [method.name for method in result.evaluation.methods]
    refused = [note.split()[0] for note in result.evaluation.notes[FLAT]]
    assert [n for n in names if n.startswith(FLAT)] == [
        f"{FLAT}: {score}" for score in flat if score not in refused
    ]
    assert set(refused) <= {"she", "openmax", "temperature-scaling"}  # of heads that know little
    for model in GROUPED:
        scores = {n.split(": ")[1] for n in names if n.startswith(f"{model}:")}
        assert scores == {n for n in DETECTORS if n.startswith("mos")}
    assert list(result.choices) == list(METHODS)
    for method in result.evaluation.methods:
        assert len(method.id_scores) == len(result.data.test.labels)
        assert {n: len(s) for n, s in method.ood_scores.items()} == {
            n: len(s.labels) for n, s in result.data.ood.items()
        }
    assert all(
        0 <= getattr(row, metric) <= 1 for row in result.evaluation.rows for metric in METRICS
    )


def test_models_learn(result: StudyResult) -> None:
    assert min(method.id_accuracy for method in result.evaluation.methods) > 3 / 40


def test_every_method_tries_as_many_settings_and_validation_chooses(result: StudyResult) -> None:
    for name, choice in result.choices.items():
        assert len(choice.tried) == 4, name
        best = max(choice.tried, key=lambda tried: tried["auroc"])
        assert choice.setting.items() <= best.items()


def test_validation_and_outliers_are_no_test_set(result: StudyResult) -> None:
    record = result.data.record
    assert not {"validation_ood", "outliers"} & set(result.evaluation.methods[0].sizes[1])
    names = {name for blocks in glyphs.OOD_BLOCKS.values() for name in blocks}
    assert not names & {*glyphs.VALIDATION_BLOCKS, *glyphs.OUTLIER_BLOCKS}
    assert record["classes"] == 40


def test_features_are_in_files(result: StudyResult, folder: Path) -> None:
    (features,) = folder.glob("glyphs-40x8-16px-8epochs-seed1/features")
    head = result.choices[FLAT].head
    found = open_samples(features / "test.safetensors")
    logits = head(found.read("features"))
    accuracy = float((logits.argmax(1) == found.read("labels")).double().mean())
    flat = next(m for m in result.evaluation.methods if m.model == FLAT)
    assert accuracy == flat.id_accuracy


def test_curve_ends_where_the_table_is(result: StudyResult) -> None:
    averages = {
        (row.model, row.score): row.fpr95
        for row in result.evaluation.rows
        if row.ood_set == "average"
    }
    series = result.curve["FPR95"].series
    assert set(series) == {"flat: msp", "flat: energy", *GROUPED}
    for name, points in series.items():
        assert [x for x, _ in points] == [20, 30, 40]
        model, _, score = name.partition(": ")
        assert points[-1][1] == averages[model, score or "mos-log-odds"]


def test_others_are_those_of_the_score(result: StudyResult) -> None:
    by_name = {method.name: method for method in result.evaluation.methods}
    assert [model.name for model in result.evaluation.others] == ALL_GROUPED
    for model in result.evaluation.others:
        assert sorted(c for group in model.groups for c in group) == list(range(40))
        assert len(model.groups) == 10
        mos = by_name[f"{model.name}: mos"]
        for name, scores in {"ID": mos.id_scores, **mos.ood_scores}.items():
            assert model.min_others[name] == pytest.approx(-scores.mean(), abs=1e-5)
        assert np.mean(model.others[OWN]) < np.mean(model.others[OTHER])


def test_claims_are_of_what_is_kept(result: StudyResult) -> None:
    by_name = {method.name: method for method in result.evaluation.methods}
    for model in GROUPED:
        odds = by_name[f"{model}: mos-log-odds"]
        found = demo_report.claims(result, model)
        for name, scores in odds.ood_scores.items():
            kept = (scores >= odds.threshold).mean()
            assert sum(found["sets"][name]) == pytest.approx(kept)
        assert sum(found["sets"]["test"]) >= 0.95 - 1e-6
    assert len(result.siblings) == len(result.data.ood["nearest"].labels)


def test_same_table_on_any_number_of_threads(tmp_path: Path) -> None:
    settings = Settings(
        classes=20, epochs=2, steps=5, curve=(), methods=["MOS taxonomy", "DOS"], **SMALL
    )
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            again = run(settings, tmp_path / str(n))
            found.append((again.evaluation.to_csv(), demo_report.to_json(again)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_second_run_uses_the_backbone(
    result: StudyResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = next(folder.glob("*/backbone/log.csv"))
    before = log.read_bytes()
    told = []
    settings = dataclasses.replace(SETTINGS, methods=["POEM"], curve=())
    state = global_state()
    again = run(settings, folder, lambda *step: told.append(step))
    demo_report.to_html(again)
    assert global_state() == state
    assert log.read_bytes() == before
    assert ("train the backbone", 1, 8) not in told
    assert list(again.choices) == [FLAT, "POEM"]
    first = {m.name: m for m in result.evaluation.methods}
    for method in again.evaluation.methods:
        np.testing.assert_array_equal(method.id_scores, first[method.name].id_scores)


PRODUCTION = """
import sys
from pathlib import Path

import onnxruntime
import torch

from oodkernels.deploy import Bundle

folder = Path(sys.argv[1])
bundle, batches = Bundle.load(folder / "bundle"), torch.load(folder / "x.pt")
found = {"loaded": [bundle(x)._asdict() for x in batches]}
torch.export.save(bundle.export(), folder / "program.pt2")
program = torch.export.load(folder / "program.pt2").module(check_guards=False)
found["program"] = [program(x) for x in batches]
with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
    path = bundle.compile_to(folder / "compiled.pt2")
compiled = torch._inductor.aoti_load_package(str(path))
found["compiled"] = [compiled(x) for x in batches]
session = onnxruntime.InferenceSession(bundle.to_onnx(folder / "model.onnx"))
names = [output.name for output in session.get_outputs()]
found["onnx"] = [
    dict(zip(names, map(torch.from_numpy, session.run(None, {"x": x.numpy()})))) for x in batches
]
torch.save(found, folder / "found.pt")
"""


@pytest.mark.slow
def test_its_model_goes_into_production(result: StudyResult, folder: Path, tmp_path: Path) -> None:
    """As a bundle in a folder, into a fresh process, exported there in three ways."""
    for package in ("safetensors", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    head = result.choices["MOS taxonomy"].head
    model = GlyphNet(partial(Head, columns=40), SETTINGS.size)
    load_weights(model, next(folder.glob("*/backbone/last.pt")))
    model.head = head
    detectors = {"mos": MOS(head.groups, model=model.eval()), "energy": Energy(model=model)}
    shape = (1, SETTINGS.size, SETTINGS.size)
    bundle = Bundle(model, detectors, input_shape=shape)
    bundle.calibrate(result.data.validation.images.float(), by="group")
    x = torch.cat([images.images[:40] for images in (result.data.test, *result.data.ood.values())])
    x = x.float()
    nan = x[:3].clone()
    nan[1, 0, 0, 0] = torch.nan
    bundle.save(tmp_path / "bundle")
    torch.save([x, x[:1], nan], tmp_path / "x.pt")
    done = run_code(PRODUCTION, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert list(found) == ["loaded", "program", "compiled", "onnx"]
    expected = [bundle(x)._asdict() for x in (x, x[:1], nan)]
    assert 0 < expected[0]["is_ood"].sum() < len(x)
    for way, batches in found.items():
        for here, there in zip(expected, batches, strict=True):
            assert here.keys() == there.keys()
            limit = 0 if way in ("loaded", "program") else 1e-4
            torch.testing.assert_close(
                there["score"], here["score"], rtol=limit, atol=limit, equal_nan=True
            )
            apart = (here["score"].double() - bundle.cut).abs() > limit
            for name in ("label", "group", "is_ood"):
                assert torch.equal(there[name][apart], here[name][apart]), (way, name)
            assert (there["p_value"] - here["p_value"]).abs().max() <= 100 * limit


def test_progress_is_told(result: StudyResult, told: list[tuple[str, int, int]]) -> None:
    parts = list(dict.fromkeys(what for what, _, _ in told))
    assert parts == [
        *("draw characters", "train the backbone", "extract features", "train heads"),
        *("evaluate", "fewer classes"),
    ]
    for part in parts:
        steps = [(done, total) for what, done, total in told if what == part]
        assert steps == sorted(steps)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]


@pytest.mark.slow
def test_processes_make_no_difference(folder: Path, result: StudyResult) -> None:
    study = next(folder.glob("*/features"))
    everything = torch.arange(40)
    tasks = [heads.Task(name, everything, None, METHODS[name].tried) for name in (FLAT, "DOS")]
    settings = dataclasses.replace(SETTINGS, jobs=2)
    for choice, task in zip(
        heads.choose_each(study, settings, tasks, lambda done: None), tasks, strict=True
    ):
        assert choice.tried == result.choices[task.method].tried


def global_state() -> tuple[object, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_num_threads(),
        dict(matplotlib.rcParams),
    )


def test_reproducible_restores_after_an_error() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(TypeError), reproducible(5):
        torch.rand("three")  # type: ignore[call-overload]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_csv_holds_the_metrics_in_full(result: StudyResult) -> None:
    table = list(csv.DictReader(result.evaluation.to_csv().splitlines()))
    assert len(table) == len(result.evaluation.rows)
    for line in table:
        if line["ood_set"] == "average":
            continue
        method = next(
            m
            for m in result.evaluation.methods
            if (m.model, m.score) == (line["model"], line["score"])
        )
        expected = ood_metrics(method.id_scores, method.ood_scores[line["ood_set"]])
        assert {m: float(line[m]) for m in METRICS} == {m: getattr(expected, m) for m in METRICS}
        assert float(line["id_accuracy"]) == method.id_accuracy


def test_json_says_what_was_done(result: StudyResult) -> None:
    record = json.loads(demo_report.to_json(result))
    assert record["convention"] == FIGURES_IN_WORDS
    settings = dataclasses.asdict(SETTINGS)
    del settings["jobs"]
    assert record["settings"] == json.loads(json.dumps(settings))
    assert set(record["methods"]) == set(METHODS)
    for name, method in record["methods"].items():
        assert method["setting"] == result.choices[name].setting
        assert method["chosen score"] in method["validation AUROC"]
    assert record["methods"]["DOS"]["trained on"] == "characters and outliers"
    assert record["data"]["classes"] == 40
    assert len(record["data"]["fonts"]) == 12
    assert record["data"]["test"]["test"] == 160
    assert [row["fpr95"] for row in record["results"]] == [
        row.fpr95 for row in result.evaluation.rows
    ]
    assert record["software"]["torch"] == torch.__version__
    assert [model["name"] for model in record["grouped_models"]] == ALL_GROUPED
    assert set(record["claims"]) == set(ALL_GROUPED)


class _Page(HTMLParser):
    void = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.images_without_alt = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.images_without_alt += tag == "img" and not dict(attrs).get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_self_contained(html: str) -> None:
    page = _Page(html)
    assert page.open == []
    assert page.tags.count("details") == page.tags.count("summary") == 2
    assert page.images_without_alt == 0
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_html_shows_the_table(result: StudyResult, html: str) -> None:
    for row in result.evaluation.rows:
        assert f">{100 * row.fpr95:.2f}</td>" in html
    assert html.count('scope="row"') == 2 * 2 * len(result.evaluation.methods)
    assert html.index("Heads trained on characters alone") < html.index("characters and outliers")
    for name in result.choices:
        score = demo_report.best_score(result, name)
        assert f"{score} •" in html


def test_pictures_show_what_is_confused(result: StudyResult) -> None:
    found = demo_report.confusions(result, FLAT)
    for name, rows in found.items():
        label, kept = result.taken[FLAT][name]
        assert rows
        assert rows[0].taken == int(torch.bincount(label[kept]).max())
        assert all(a.taken >= b.taken > 0 for a, b in pairwise(rows))


def test_kinds_are_by_what_was_trained_on(result: StudyResult) -> None:
    found = demo_report.kinds(result.evaluation)
    assert found == {
        "the flat head": [FLAT],
        "characters alone": GROUPED,
        "characters and outliers": WITH_OUTLIERS,
    }
    rows = demo_report.averages(result.evaluation, "characters and outliers")
    assert [row.model for row in rows[:4]] == ["OE", "OE", "OE", "energy-bounded"]
    assert {row.ood_set for row in rows} == {"average"}


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"methods must be of flat, MOS taxonomy, .*, got ods"):
        Settings(methods=["DOS", "ods"])


def test_write_report_replaces_files_whole(
    result: StudyResult, html: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_report, "to_html", lambda result: html)
    out = tmp_path / "new" / "folder"
    paths = demo_report.write_report(result, out)
    assert [path.name for path in paths] == ["results.csv", "results.json", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    before = [path.read_bytes() for path in paths]

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_report.write_report(result, out)
    assert [path.read_bytes() for path in paths] == before
    assert len(list(out.iterdir())) == 3


def test_report_does_without_pyplot() -> None:
    code = "import sys, oodkernels.demo.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert run_code(code).returncode == 0


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "demo_table.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("demo_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_over_seeds(table: ModuleType) -> None:
    def record(*fpr95: float) -> dict[str, object]:
        others = {"id_accuracy": 0.9, "auroc": 0.5, "aupr_in": 0.5, "aupr_out": 0.5}
        names = (("flat", "MSP"), ("flat", "energy"), ("OE", "MSP"))
        rows = [
            {"ood_set": "average", "model": model, "score": score, "fpr95": value, **others}
            for (model, score), value in zip(names, fpr95, strict=True)
        ]
        return {"results": rows}

    records = [record(0.3, 0.2, 0.1), record(0.5, 0.2, 0.2)]
    found = table.summary(records)
    assert [row["fpr95"]["mean"] for row in found] == pytest.approx([0.4, 0.2, 0.15])
    assert found[0]["fpr95"]["std"] == pytest.approx(0.141421, abs=1e-6)
    assert [row["seed"] for row in table.per_seed([3, 5], records)] == [3, 3, 3, 5, 5, 5]
    lines = table.demo_table(found, {"digits": ["flat"], "more": ["OE"]}).splitlines()
    assert len(lines) == 2 + 3
    assert "| 40.00 ± 14.14 |" in lines[2]
    assert "| **20.00 ± 0.00** |" in lines[3]
    assert lines[4].startswith("| more | OE | MSP | **90.00 ± 0.00** | **15.00 ± 7.07** |")


def test_table_over_seeds_is_written(
    table: ModuleType,
    result: StudyResult,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Here:
        def __init__(self, *args: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *args: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(table, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(table, "COUNTS", (5,))
    monkeypatch.setattr(table.Study, "run", lambda study: result)
    monkeypatch.setattr(table, "Settings", lambda seed: dataclasses.replace(SETTINGS, seed=1))
    out = tmp_path / "new" / "table.json"
    argv = ["demo_table.py", "--out", str(out), "--folder", str(folder), "--seeds"]
    monkeypatch.setattr(sys, "argv", [*argv, "1", "2"])
    table.main()
    record = json.loads(out.read_text())
    assert record["seeds"] == [1, 2]
    methods = len(result.evaluation.methods)
    assert len(record["summary"]) == methods * 7
    assert len(record["results"]) == 2 * methods
    assert all(row["fpr95"]["std"] == 0 for row in record["summary"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + methods
    for seed in record["by seed"]:
        assert {row["groups"] for row in seed["group counts"]} == {5}
        for model in GROUPED:
            tried = seed["scores"][model]["the paper's: maximum of log-odds"]
            odds = result.validation[model]["mos-log-odds"]
            assert tried["validation"]["auroc"] == pytest.approx(odds, abs=1e-4)
    monkeypatch.setattr(sys, "argv", [*argv, "1"])
    with pytest.raises(SystemExit):
        table.main()
