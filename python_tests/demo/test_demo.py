from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import random
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from processes import python

pytest.importorskip("jinja2")
pytest.importorskip("lightning_fabric")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import matplotlib

from oodkernels.demo import protocol as demo
from oodkernels.demo import report as demo_report
from oodkernels.evaluation.methods import OTHER, OWN
from oodkernels.evaluation.results import FIGURES_IN_WORDS
from oodkernels.evaluation.tables import METRICS
from oodkernels.metrics.ood import ood_metrics
from oodkernels.training import OBJECTIVES, TrainConfig, objectives, reproducible

SETTINGS = demo.Settings(seed=1, recipe=TrainConfig(epochs=3, accelerator="cpu"))

WITH_OUTLIERS = ["OE", "energy-bounded", "absent class", "NTOM", "POEM", "DOS"]


@pytest.fixture(scope="module")
def used() -> set[type]:
    """Kinds of the detectors that took part in ``result``."""
    return set()


@pytest.fixture(scope="module")
def result(used: set[type]) -> demo.DemoResult:
    evaluate = demo.evaluate

    def noted(model: Any, digits: Any, ood: Any, detectors: Any, **more: Any) -> Any:
        used.update(map(type, detectors.values()))
        return evaluate(model, digits, ood, detectors, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "evaluate", noted)
        return demo.run(SETTINGS)


@pytest.fixture(scope="module")
def html(result: demo.DemoResult) -> str:
    return demo_report.to_html(result)


def test_every_method_is_on_every_set(result: demo.DemoResult) -> None:
    assert [method.name for method in result.evaluation.methods] == [
        "flat: MSP",
        "flat: max logit",
        "flat: energy",
        "flat: entropy",
        "flat: ODIN",
        "flat: Mahalanobis",
        "flat: k-NN",
        "MOS random: MOS",
        "MOS random: log-odds",
        "MOS features: MOS",
        "MOS features: log-odds",
        "confidence: confidence",
        "abnormality: abnormality",
        "synthetic: MSP",
        "synthetic: energy",
        "OE: MSP",
        "OE: energy",
        "energy-bounded: MSP",
        "energy-bounded: energy",
        "absent class: absent class",
        "NTOM: absent class",
        "POEM: energy",
        "DOS: absent class",
    ]
    assert list(result.images) == ["digits", "faces", "textures", "photos"]
    for method in result.evaluation.methods:
        assert len(method.id_scores) == len(result.images["digits"])
        for name, scores in method.ood_scores.items():
            assert len(scores) == len(result.images[name])
    assert len(result.evaluation.rows) == 23 * 4
    assert all(
        0 <= getattr(row, metric) <= 1 for row in result.evaluation.rows for metric in METRICS
    )


def test_every_objective_and_detector_takes_part(result: demo.DemoResult, used: set[type]) -> None:
    assert set(demo.METHODS) == set(objectives.OBJECTIVES) == set(OBJECTIVES)
    assert {cls.name for cls in used} == {
        *("msp", "max-logit", "energy", "entropy", "odin", "mahalanobis", "knn", "mos"),
        *("mos-log-odds", "absent-class", "confidence", "abnormality"),
    }


def test_models_learn(result: demo.DemoResult) -> None:
    assert min(method.id_accuracy for method in result.evaluation.methods) > 0.7
    means = {(r.model, r.score): r.auroc for r in result.evaluation.rows if r.ood_set == "average"}
    del means["abnormality", "abnormality"]  # whose second phase is one epoch
    assert min(means.values()) > 0.7
    assert min(auroc for (model, _), auroc in means.items() if model in WITH_OUTLIERS) > 0.95


def test_scores_have_the_signs_they_should(result: demo.DemoResult) -> None:
    by_name = {method.name: method for method in result.evaluation.methods}
    msp = by_name["flat: MSP"].id_scores
    assert msp.min() >= 0.1
    assert msp.max() <= 1
    assert np.all(by_name["flat: energy"].id_scores >= by_name["flat: max logit"].id_scores)
    assert by_name["flat: entropy"].id_scores.max() <= 0
    for model in ("MOS random", "MOS features"):
        mos = by_name[f"{model}: MOS"]
        odds = by_name[f"{model}: log-odds"]
        np.testing.assert_allclose(
            mos.id_scores, -1 / (1 + np.exp(odds.id_scores.astype(np.float64))), atol=1e-5
        )


def test_others_are_those_of_the_score(result: demo.DemoResult) -> None:
    by_name = {method.name: method for method in result.evaluation.methods}
    for model in result.evaluation.others:
        assert sorted(digit for group in model.groups for digit in group) == list(range(10))
        assert len(model.groups) == SETTINGS.num_groups
        assert all(len(values) == len(model.groups) for values in model.others.values())
        mos = by_name[f"{model.name}: MOS"]
        for name, scores in {"ID": mos.id_scores, **mos.ood_scores}.items():
            assert model.min_others[name] == pytest.approx(-scores.mean(), abs=1e-5)
        own, foreign = model.others[OWN], model.others[OTHER]
        assert max(own) < min(foreign)


@pytest.mark.slow
def test_same_settings_same_bytes_on_any_number_of_threads(result: demo.DemoResult) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = demo.run(SETTINGS)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(result.evaluation.methods, again.evaluation.methods, strict=True):
        np.testing.assert_array_equal(one.id_scores, two.id_scores)
        for name, scores in one.ood_scores.items():
            np.testing.assert_array_equal(scores, two.ood_scores[name])
    assert again.evaluation.to_csv() == result.evaluation.to_csv()
    assert demo_report.to_json(again) == demo_report.to_json(result)


def test_report_is_the_same_every_time(result: demo.DemoResult, html: str) -> None:
    assert demo_report.to_html(result) == html


def test_seed_and_groups_matter_progress_is_told_and_nothing_else_touched(
    result: demo.DemoResult,
) -> None:
    told = []
    before = global_state()
    settings = demo.Settings(2, 5, TrainConfig(epochs=1, accelerator="cpu"), methods=["dos", "mos"])
    other = demo.run(settings, lambda model, epoch: told.append((model, epoch)))
    demo_report.to_html(other)
    assert global_state() == before
    assert told == [(model, 1) for model in ("flat", "MOS random", "MOS features", "DOS")]
    assert list(dict.fromkeys(m.model for m in other.evaluation.methods)) == settings.models
    assert [len(model.groups) for model in other.evaluation.others] == [5, 5]
    assert not np.array_equal(result.images["digits"], other.images["digits"])
    assert np.array_equal(result.images["photos"], other.images["photos"])


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


def test_csv_holds_the_metrics_in_full(result: demo.DemoResult) -> None:
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


def test_json_says_what_was_done(result: demo.DemoResult) -> None:
    record = json.loads(demo_report.to_json(result))
    assert record["convention"] == FIGURES_IN_WORDS
    assert record["settings"] == dataclasses.asdict(SETTINGS)
    assert set(record["methods"]) == set(demo.METHODS)
    assert record["methods"]["dos"]["outliers_per_image"] == 6
    assert record["data"]["train"] == 1198
    assert record["data"]["outliers"] == 4000
    assert record["data"]["test"] == {"digits": 599, "faces": 600, "textures": 600, "photos": 600}
    assert [row["fpr95"] for row in record["results"]] == [
        row.fpr95 for row in result.evaluation.rows
    ]
    assert record["software"]["torch"] == torch.__version__
    assert [model["name"] for model in record["grouped_models"]] == ["MOS random", "MOS features"]


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
    assert page.tags.count("img") == 5 + 5
    assert page.tags.count("details") == page.tags.count("summary") == 3
    assert page.images_without_alt == 0
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_html_shows_the_table(result: demo.DemoResult, html: str) -> None:
    for row in result.evaluation.rows:
        assert f">{100 * row.fpr95:.2f}</td>" in html
    assert html.count('scope="row"') == 2 * 2 * len(result.evaluation.methods)
    assert html.count('best"') >= len(METRICS) * 6
    assert html.index("Trained on digits alone") < html.index("Trained on digits and outliers")


def test_kinds_are_by_what_was_trained_on(result: demo.DemoResult) -> None:
    found = demo_report.kinds(result.evaluation)
    assert found["digits and outliers"] == WITH_OUTLIERS
    assert [model for models in found.values() for model in models] == SETTINGS.models
    rows = demo_report.averages(result.evaluation, "digits and outliers")
    assert [row.model for row in rows[:3]] == ["OE", "OE", "energy-bounded"]
    assert {row.ood_set for row in rows} == {"average"}


def test_report_without_outliers(result: demo.DemoResult) -> None:
    alone = [m for m in result.evaluation.methods if m.model not in WITH_OUTLIERS]
    evaluation = dataclasses.replace(result.evaluation, methods=alone)
    settings = dataclasses.replace(SETTINGS, methods=["mos"])
    page = demo_report.to_html(
        dataclasses.replace(result, settings=settings, evaluation=evaluation)
    )
    assert _Page(page).tags.count("img") == 4 + 4
    assert "digits and outliers" not in page
    assert "DOS" not in page


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"methods must be of softmax, mos, .*, got ods"):
        demo.Settings(methods=["mos", "ods"])


def test_html_escapes(result: demo.DemoResult) -> None:
    methods = [dataclasses.replace(m, model="<script>") for m in result.evaluation.methods]
    evaluation = dataclasses.replace(result.evaluation, methods=methods)
    page = demo_report.to_html(dataclasses.replace(result, evaluation=evaluation))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_write_report_replaces_files_whole(
    result: demo.DemoResult, html: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert python("-c", code).returncode == 0


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
    result: demo.DemoResult,
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
    monkeypatch.setattr(table, "run", lambda settings: result)
    out = tmp_path / "new" / "table.json"
    monkeypatch.setattr(sys, "argv", ["demo_table.py", "--out", str(out), "--seeds", "1", "2"])
    table.main()
    record = json.loads(out.read_text())
    assert record["seeds"] == [1, 2]
    assert len(record["summary"]) == 23 * 4
    assert len(record["results"]) == 2 * 23 * 4
    assert all(row["fpr95"]["std"] == 0 for row in record["summary"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 23
    monkeypatch.setattr(sys, "argv", ["demo_table.py", "--out", str(out), "--seeds", "1"])
    with pytest.raises(SystemExit):
        table.main()
