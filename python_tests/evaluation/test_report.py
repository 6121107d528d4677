from __future__ import annotations

import base64
import dataclasses
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from processes import run_code

from oodkernels import Groups
from oodkernels.evaluation import (
    Evaluation,
    GroupOthers,
    Levels,
    MethodResult,
    Sweep,
    combine,
    evaluate,
    report,
)
from oodkernels.evaluation.tables import METRICS


def made(groups: int = 3, memory: str | None = None, sets: int = 2, n: int = 200) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    found = Groups.random(30, groups)

    def logits(shift: float) -> torch.Tensor:
        z = 3 * torch.randn(n, found.width, generator=generator)
        z[:, found.offsets[:-1]] += shift
        return z

    labels = torch.randint(30, (n,), generator=generator)
    ood = {f"set <{i}>": logits(2.0 + i) for i in range(sets)}
    return evaluate(
        None,
        [(logits(0), labels)],
        ood,
        ["mos", "msp"],
        groups=found,
        memory=memory,
        model_name="head & co",
    )


SWEEP = Sweep({"msp": [(10, 0.3), (100, 0.5), (100, 0.6)], "mos": [(10, 0.3), (100, 0.4)]})


class Page(HTMLParser):
    void = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_self_contained_and_complete() -> None:
    evaluation = dataclasses.replace(made(), sweep=SWEEP)
    html = evaluation.to_html("A <title>")
    page = Page(html)
    assert page.open == []
    assert all(image.get("alt") for image in page.images)
    assert page.tags.count("img") == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "A &lt;title&gt;" in html
    assert "set &lt;0&gt;" in html
    assert "<title>A <" not in html
    for row in evaluation.rows:
        assert f">{100 * row.fpr95:.2f}</td>" in html
    for link in page.links:
        ElementTree.fromstring(base64.b64decode(link.partition(",")[2]))


def test_sections_are_there_where_there_is_something_to_show() -> None:
    scores = evaluate({"s": (np.arange(9.0), {"x": np.arange(4.0)})})
    html = scores.to_html()
    assert len(Page(html).images) == 2
    assert "Reliability" not in html
    assert "others" not in html
    assert ">-</td>" in html  # no accuracy
    assert set(report.figures(made())) == {"histograms", "roc", "others", "reliability"}


def test_streamed_scores_are_shown_with_their_bounds() -> None:
    html = made(memory="16MiB", n=150_000, sets=1).to_html()
    assert "certainly within" in html
    assert "certainly within" not in made().to_html()


def test_the_same_evaluation_gives_the_same_bytes() -> None:
    assert made().to_html() == made().to_html()


def test_roc_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 400).round(1), rng.normal(0, 1, 300).round(1)
    method = MethodResult("m", "s", 1, inside, {"x": outside})
    fpr, tpr = report._roc(method.levels("x"))
    is_id = np.arange(700) < 400
    expected = roc_curve(is_id, np.concatenate((inside, outside)), drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0])
    np.testing.assert_allclose(tpr, expected[1])


def test_roc_curve_of_many_scores_is_short_and_close() -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(0, 3, (2, 200_000))
    fpr, tpr = report._roc(Levels(np.arange(200_000.0), *n))
    assert len(fpr) < 5000
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    gap = np.maximum(np.diff(fpr), np.diff(tpr))
    assert gap.max() < 1 / 1000


def axes_titles(figure: object) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.axison]  # type: ignore[attr-defined]


def test_histograms_add_up_to_all_samples() -> None:
    evaluation = made()
    figure = report.histograms(evaluation.methods)
    assert axes_titles(figure) == ["head & co: mos", "head & co: msp"]
    for axes in figure.axes:
        for patch in axes.patches:
            assert patch.get_data().values.sum() == pytest.approx(100)  # type: ignore[attr-defined]


@pytest.mark.parametrize("scores", [np.ones(5), np.array([-np.inf, 0, 1, np.inf])])
def test_odd_scores_can_be_drawn(scores: np.ndarray) -> None:
    report.histograms([MethodResult("m", "s", 1, scores, {"x": scores})])
    report.roc_curves([MethodResult("m", "s", 1, scores, {"x": scores})])


@pytest.mark.parametrize("groups", [3, 12, 13, 30])
def test_others_as_bars_or_as_a_map(groups: int) -> None:
    evaluation = made(groups)
    figure = report.others_per_group(evaluation.others)
    (model,) = evaluation.others
    drawn = figure.axes[0]
    if groups <= 12:
        heights = [bar.get_height() for bar in drawn.patches]  # type: ignore[attr-defined]
        assert heights[:groups] == pytest.approx(next(iter(model.others.values())))
    else:
        shown = drawn.images[0].get_array()
        np.testing.assert_allclose(np.asarray(shown), list(model.others.values()))


def test_many_methods_sets_and_models() -> None:
    rng = np.random.default_rng(0)
    sets = {f"set {i}": rng.normal(size=20) for i in range(9)}
    scores = {f"score {i}": (rng.normal(size=30), sets) for i in range(13)}
    evaluation = combine(evaluate(scores), made(sets=9))
    evaluation.methods[:] = evaluation.methods[:13]
    assert len(axes_titles(report.roc_curves(evaluation.methods))) == 9
    assert len(axes_titles(report.histograms(evaluation.methods))) == 13
    Page(evaluation.to_html())


def test_sweep_draws_means_and_deviations() -> None:
    figure = report.sweep(SWEEP)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert lines["msp"] == pytest.approx([30, 55])
    assert lines["mos"] == pytest.approx([30, 40])
    assert axes.get_xscale() == "log"
    band = axes.collections[0].get_paths()[0].vertices
    assert np.asarray(band)[:, 1].max() == pytest.approx(55 + np.std([50, 60], ddof=1))


def test_files_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = made()
    out = tmp_path / "new" / "folder"
    paths = evaluation.save(out)
    names = ["results.csv", "results.json", "results.md", "results.tex", "report.html"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    before = [path.read_bytes() for path in paths]

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluation.save(out)
    assert [path.read_bytes() for path in paths] == before
    assert len(list(out.iterdir())) == len(names)


def test_a_report_that_fails_leaves_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(report, "histograms", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        made().save(tmp_path)
    names = ["results.csv", "results.json", "results.md", "results.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("name", ["$_$", "$\\frac$", "_private", "a\nb", "<script>"])
def test_any_name_can_be_drawn(name: str) -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=30), rng.normal(size=20)
    found = evaluate([MethodResult(name, name, 1, inside, {name: outside})])
    others = GroupOthers(name, [[0], [1]], [name, "b"], {"ID": [0.1, 0.2], name: [0.3, 0.4]}, {})
    others = dataclasses.replace(others, min_others={"ID": 0.1, name: 0.2})
    sweep = Sweep({name: [(1, 0.5)]}, name, name)
    evaluation = dataclasses.replace(found, others=[others], sweep=sweep)
    assert len(Page(evaluation.to_html(name)).images) == 4
    figure = report.roc_curves(evaluation.methods)
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [
        f"{name}: {name}".replace("$", r"\$")
    ]


def test_metrics_have_their_headings() -> None:
    html = re.sub(r"<br>|\s", "", made().to_html())
    for heading in ("FPR95", "AUROC", "AUPRin", "AUPRout"):
        assert html.count(f">{heading}</th>") == 3
    assert len(METRICS) == 4


def test_report_needs_neither_pyplot_nor_the_demos_data() -> None:
    code = (
        "import sys\n"
        "for name in ('skimage', 'sklearn'): sys.modules[name] = None\n"
        "import oodkernels.evaluation.report\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    found = run_code(code)
    assert found.returncode == 0, found.stderr
