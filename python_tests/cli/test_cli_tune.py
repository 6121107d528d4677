"""Settings chosen by ``oodk tune`` and taken up by other commands, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
pytest.importorskip("typer")

from test_cli import oodk, plain

from oodkernels.detectors import DETECTORS, Tuning
from oodkernels.nn import Head


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tune")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    for i, (name, n) in enumerate((("train", 90), ("val", 40), ("test", 40))):
        labels = np.arange(n) % 3
        x = np.maximum(centres[labels] + np.random.default_rng(i).normal(size=(n, 8)), 0) + 0.01
        np.savez(folder / f"{name}.npz", features=x.astype(np.float32), labels=labels)
    for i, name in enumerate(("tin", "far")):
        x = np.abs((1.5 + i) * rng.normal(size=(30, 8))).astype(np.float32)
        np.savez(folder / f"{name}.npz", features=x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(8, 3)
    nn.init.normal_(next(m for m in head.modules() if isinstance(m, nn.Linear)).weight)
    head.save(folder / "head.safetensors")
    return {path.stem: path for path in folder.iterdir()}


def test_settings_are_chosen_applied_and_shown(files: dict[str, Path], tmp_path: Path) -> None:
    shared = ("--head", files["head"], "--train", files["train"], "--quiet")
    tuned = tmp_path / "tuned.json"
    found = oodk(
        *("tune", "--id", files["val"], "--ood-val", files["tin"], *shared, "--out", tuned),
        *("-d", "scale:percentile=50/70/90", "-d", "knn:k=1/5", "-d", "vim:dim=all"),
    )
    assert found.exit_code == 0, found.output
    kept = Tuning.load(tuned)
    assert [len(d.settings) for d in kept.detectors.values()] == [3, 2, 7]
    test = ("--id", files["test"], "--ood", files["far"], *shared)
    out = tmp_path / "run"
    record = json.loads(oodk("eval", *test, "--tuned", tuned, "--out", out, "--json").stdout)
    by_hand = [
        f"{name}:" + ",".join(f"{k}={v}" for k, v in one.items())
        for name, one in kept.settings.items()
    ]
    options = [part for text in by_hand for part in ("-d", text)]
    expected = json.loads(oodk("eval", *test, *options, "--json").stdout)
    assert [r["auroc"] for r in record["results"]] == [r["auroc"] for r in expected["results"]]
    assert record["tuning"]["chosen_on"] == "validation OOD tin (30)"
    assert "were chosen by auroc on validation OOD tin (30)." in record["notes"][-1]
    page = (out / "report.html").read_text()
    assert "<h2>Settings</h2>" in page
    assert 'alt="auroc on the validation data under every setting"' in page
    both = ("-d", "react:percentile=85+gen:gamma=1", "-d", "gen:gamma=1")
    rows = json.loads(oodk("eval", *test, *both, "--json").stdout)["results"]
    assert [row["score"] for row in rows[::2]] == list(both[1::2])
    assert rows[0]["auroc"] != rows[2]["auroc"]
    one = json.loads(oodk("eval", *test, "--tuned", tuned, "-d", "knn", "--json").stdout)
    assert {row["score"] for row in one["results"]} == {"knn"}
    scored = oodk("score", "--data", files["far"], *shared, "--tuned", tuned, "-d", "knn")
    assert scored.exit_code == 0, scored.output
    for more, message in (
        (("--train", files["val"]), "training data must be those that the settings were chosen"),
        (("--ood", files["tin"]), "tin must be test data, got those that the settings were chosen"),
        (("--id", files["val"]), "ID must be test data, got those that the settings were chosen"),
    ):
        refused = oodk("eval", *test, *more, "--tuned", tuned)
        assert refused.exit_code == 1
        assert message in plain(refused)


def test_all_with_a_grid_on_noise(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DETECTORS, "corp")  # eigenvectors of 4096 features take long
    shared = ("--id", files["val"], "--head", files["head"], "--train", files["train"])
    found = json.loads(oodk("tune", *shared, "--noise", "--quiet", "--json").stdout)
    assert {"scale", "react", "dice", "gen", "cop"} <= found["detectors"].keys()
    assert all(DETECTORS[name].spec.grid for name in found["detectors"])
    assert found["chosen_on"].startswith("noise of the ID samples")
    for more, message in (
        ((), "--ood-val"),
        (("--noise", "--ood-val", files["tin"]), "is of no use with --noise"),
        (("--noise", "--by", "luck"), "must be auroc or fpr95, got 'luck'"),
        (("--noise", "-d", "nn"), "there is no detector 'nn'"),
        (("--noise", "-d", "knn:n=1/2"), "knn has no option 'n', only k"),
        (("--noise", "-d", "knn:k=1/two"), "k must be int, got 'two'"),
    ):
        refused = oodk("tune", *shared, *more, "--quiet")
        assert refused.exit_code in (1, 2)
        assert message in plain(refused)
