from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import python, run_code

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner, Result

import oodkernels
from oodk.app import app
from oodkernels.detectors import DETECTORS, KNN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def oodk(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(arg) for arg in args])


def plain(found: Result) -> str:
    """What was printed, without the colours, line breaks and borders of rich."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", found.output).replace("│", " ").split())


def test_version() -> None:
    found = oodk("--version")
    assert found.exit_code == 0
    assert found.output == f"oodkernels {oodkernels.build_info()['version']}\n"


def test_python_m() -> None:
    found = python("-m", "oodkernels", "info")
    assert torch.__version__ in found.stdout


def test_info_as_json_is_build_info() -> None:
    facts = json.loads(oodk("info", "--json").output)
    assert facts.items() >= oodkernels.build_info().items()
    assert "python" in facts


def test_help_names_the_commands() -> None:
    found = oodk("--help")
    assert found.exit_code == 0
    assert "demo" in plain(found)
    assert "info" in plain(found)


def test_demo_prints_the_table_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    from oodkernels.data import glyphs
    from oodkernels.demo import Settings

    whole = glyphs.block_of
    monkeypatch.setattr(glyphs, "block_of", lambda c: whole(c) if ord(c) % 12 == 0 else "")
    small = {"classes": 15, "size": 16, "train": 8, "ood": 30, "outliers": 60, "steps": 4}
    small |= {"epochs": 1, "curve": ()}
    monkeypatch.setattr(Settings, "quick", lambda **given: Settings(**small, **given))
    out = tmp_path / "made" / "here"
    more = ("--seed", 4, "--method", "MOS features", "--jobs", 1)
    glyphs._classes.cache_clear()
    try:
        found = oodk("demo", "--out", out, "--quick", *more)
    finally:
        glyphs._classes.cache_clear()
    assert found.exit_code == 0, found.output
    for word in ("FPR95", "AUPR-out", "MOS features", "mos-log-odds", "average"):
        assert word in plain(found)
    for name in ("results.csv", "results.json", "report.html"):
        assert (out / name).stat().st_size > 1000
        assert str(out / name) in found.output
    record = json.loads((out / "results.json").read_text())
    assert record["settings"]["seed"] == 4
    assert record["settings"]["classes"] == 15
    assert list(record["methods"]) == ["flat", "MOS features"]


def test_demo_quiet_prints_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodkernels.demo.run", lambda *args: None)
    written = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr("oodkernels.demo.report.write_report", lambda *args: written)
    found = oodk("demo", "--out", tmp_path, "--quiet")
    assert found.output.splitlines() == list(map(str, written))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--jobs", 0),
        ("--jobs", "many"),
        ("--method", "dos"),
        ("--seed", -1),
        ("--unknown", 1),
    ],
)
def test_demo_refuses_bad_values(tmp_path: Path, option: str, value: object) -> None:
    found = oodk("demo", "--out", tmp_path / "out", option, value)
    assert found.exit_code == 2
    assert option in plain(found)
    assert not (tmp_path / "out").exists()


def test_demo_refuses_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        found = oodk("demo", "--out", out)
        assert found.exit_code == 2
        assert "--out" in plain(found)
    assert "Not a directory" in plain(found)


def test_demo_says_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oodkernels.demo.report.write_report", fail)
    monkeypatch.setattr("oodkernels.demo.run", lambda *args: None)
    found = oodk("demo", "--out", tmp_path)
    assert found.exit_code == 1
    assert f"oodk demo: cannot write to {tmp_path}: No space left on device" in found.output


def test_interrupt_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oodkernels.demo.run", interrupt)
    found = oodk("demo", "--out", tmp_path)
    assert found.exit_code == 130
    assert "oodk: interrupted" in found.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "extra", "command", "said"),
    [
        ("typer", "cli", "--version", "oodk: the command line needs typer"),
        ("skimage", "demo", "demo", "oodk demo: oodk demo needs skimage"),
        ("jinja2", "demo", "demo", "oodk demo: oodk demo needs jinja2"),
    ],
)
def test_missing_extra_is_named_in_one_line(
    missing: str, extra: str, command: str, said: str
) -> None:
    found = run_code(
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['oodk', {command!r}]\n"
        "from oodk import main; sys.exit(main())",
    )
    assert found.returncode == 1
    expected = f"{said}, which is not installed: pip install 'oodkernels[{extra}]'\n"
    assert found.stderr == expected


@pytest.mark.parametrize("command", ["--help", "--version", "group --help", "info --help"])
def test_help_does_without_torch(command: str) -> None:
    found = python(
        "-c",
        f"import sys; sys.argv = ['oodk', *{command!r}.split()]\n"
        "from oodk import main\n"
        "try: main()\n"
        "finally: print(*sorted({'oodkernels', 'torch', 'numpy'} & sys.modules.keys()))",
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == ""


def test_info_needs_neither_plotting_nor_data() -> None:
    found = run_code(
        "import sys\n"
        "for name in ('matplotlib', 'sklearn', 'skimage', 'jinja2'): sys.modules[name] = None\n"
        "sys.argv = ['oodk', 'info']\n"
        "from oodk import main; sys.exit(main())",
    )
    assert found.returncode == 0, found.stderr


def test_other_missing_modules_are_not_hidden() -> None:
    found = run_code(
        "import sys; sys.modules['oodk.app'] = None\nfrom oodk import main; sys.exit(main())",
    )
    assert found.returncode == 1
    assert "Traceback" in found.stderr


# --- eval, score, threshold -------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Logits, labels, features and scores in files."""
    rng = np.random.default_rng(0)
    files = {
        "id": 3 * rng.normal(size=(200, 10)),
        "far": rng.normal(size=(80, 10)),
        "near": 2 * rng.normal(size=(90, 10)),
        "labels": rng.integers(0, 10, 200),
    }
    for name, array in files.items():
        float32 = array.astype(np.float32) if array.dtype.kind == "f" else array
        np.save(tmp_path / f"{name}.npy", float32)
    np.savez(
        tmp_path / "train.npz",
        features=rng.normal(size=(150, 4)).astype(np.float32),
        labels=np.arange(150) % 5,
    )
    np.savez(tmp_path / "ood_features.npz", features=rng.normal(2, 1, (60, 4)).astype(np.float32))
    return {path.stem: path for path in tmp_path.iterdir()}


def test_eval_prints_the_table_and_writes_everything(data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    sets = ("--ood", data["far"], "--ood", f"close={data['near']}")
    found = oodk("eval", "--id", data["id"], "--labels", data["labels"], *sets, "--out", out)
    assert found.exit_code == 0, found.output
    for word in ("FPR95", "msp", "max-logit", "energy", "far", "close", "average"):
        assert word in plain(found)
    names = ["config.toml", "report.html", *(f"results.{s}" for s in ("csv", "json", "md", "tex"))]
    assert sorted(path.name for path in out.iterdir()) == names
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    z = torch.from_numpy(np.load(data["id"])), torch.from_numpy(np.load(data["far"]))
    energy = [oodkernels.logit_scores(x).energy for x in z]
    expected = oodkernels.ood_metrics(*energy)
    (row,) = (r for r in rows if (r["ood_set"], r["score"]) == ("far", "energy"))
    assert float(row["fpr95"]) == expected.fpr95
    assert float(row["auroc"]) == expected.auroc
    labels = torch.from_numpy(np.load(data["labels"]))
    assert float(row["id_accuracy"]) == (z[0].argmax(1) == labels).double().mean()


def test_results_on_stdout_progress_on_stderr(data: dict[str, Path]) -> None:
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--json")
    assert found.exit_code == 0
    record = json.loads(found.stdout)
    assert {row["score"] for row in record["results"]} == {"msp", "max-logit", "energy"}
    assert "100%" in found.stderr or "200/200" in found.stderr
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--json", "--quiet")
    assert found.stderr == ""
    assert json.loads(found.stdout)["results"] == record["results"]


def test_config_repeats_a_run_and_the_command_line_wins(
    data: dict[str, Path], tmp_path: Path
) -> None:
    out, again = tmp_path / "a", tmp_path / "b"
    given = ("--id", data["id"], "--ood", f"x={data['far']}", "-d", "energy", "-d", "msp")
    assert oodk("eval", *given, "--name", 'my "model"', "--out", out).exit_code == 0
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["detector"] == ["energy", "msp"]
    assert config["name"] == 'my "model"'
    assert config["convention"] == "default"
    found = oodk("eval", "--config", out / "config.toml", "--out", again)
    assert found.exit_code == 0, found.output
    assert (again / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
    found = oodk(
        "eval", "--config", out / "config.toml", "--name", "other", "-d", "energy", "--json"
    )
    assert {(r["model"], r["score"]) for r in json.loads(found.stdout)["results"]} == {
        ("other", "energy")
    }


def test_config_by_hand(data: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[eval]\nid = "{data["id"]}"\n[eval.ood]\n"far away" = "{data["far"]}"\n')
    found = oodk("eval", "--config", path, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["results"][0]["ood_set"] == "far away"
    for text, message in (
        ("idd = 'x'", "'idd' is no option of oodk eval"),
        ("id = ", "run.toml"),
        (f"id = '{data['id']}'\nood = 'x'", "'ood' must be a list"),
        ("name = ['x']", "'name' must be one value"),
        (f"convention = 'mine'\nid = '{data['id']}'\nood = ['x']", "mine"),
    ):
        path.write_text(text)
        found = oodk("eval", "--config", path)
        assert found.exit_code == 2, found.output
        assert message in plain(found)


def test_eval_of_a_mos_head(data: dict[str, Path], tmp_path: Path) -> None:
    groups = tmp_path / "groups.json"
    assert oodk("group", "random", 8, "-k", 2, "--out", groups).exit_code == 0
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--groups", groups, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert {row["score"] for row in record["results"]} == {"mos", "mos-log-odds"}
    assert len(record["grouped_models"][0]["groups"]) == 2


def test_eval_fits_detectors_of_features(data: dict[str, Path], tmp_path: Path) -> None:
    given = ("--id", data["train"], "--ood", data["ood_features"])
    found = oodk("eval", *given, "--train", data["train"], "-d", "knn", "-d", "mahalanobis")
    assert found.exit_code == 0, found.output
    assert "mahalanobis" in plain(found)
    found = oodk("eval", *given, "-d", "knn")
    assert found.exit_code == 2
    assert "--train" in plain(found)
    assert "is needed for knn" in plain(found)
    features = torch.from_numpy(np.load(data["train"])["features"])
    KNN(k=3).fit(features=features).save(tmp_path / "mine.safetensors")
    found = oodk("eval", *given, "-d", tmp_path / "mine.safetensors", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["results"][0]["score"] == "mine"


def test_eval_of_scores_in_columns_streamed(tmp_path: Path) -> None:
    for name, low in (("id", 1), ("ood", 0)):
        text = "file,energy\n" + "".join(f"{i}.jpg,{low + i / 50}\n" for i in range(100))
        (tmp_path / f"{name}.csv").write_text(text)
    given = ("--id", tmp_path / "id.csv", "--ood", tmp_path / "ood.csv")
    found = oodk("eval", *given, "--column", "scores=energy", "--memory", "16MiB", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["results"][0]["auroc"] == pytest.approx(0.875)
    found = oodk("eval", *given, "--column", "scores=msp")
    assert found.exit_code == 1
    assert "has no column 'msp', only energy" in plain(found)


def test_scores_of_one_command_are_evaluated_by_another(
    data: dict[str, Path], tmp_path: Path
) -> None:
    detectors = ("-d", "msp", "-d", "energy")
    for name in ("id", "far"):
        out = tmp_path / f"{name}.csv"
        assert oodk("score", "--data", data[name], *detectors, "--out", out).exit_code == 0
    found = oodk("eval", "--id", tmp_path / "id.csv", "--ood", tmp_path / "far.csv", "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["results"]
    given = ("eval", "--id", data["id"], "--ood", data["far"], *detectors, "--json")
    assert rows == json.loads(oodk(*given).stdout)["results"]


def test_eval_draws_a_sweep(data: dict[str, Path], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.csv"
    sweep.write_text("x,method,value\n100,msp,0.4\n1000,msp,0.6\n")
    given = ("--id", data["id"], "--ood", data["far"], "--sweep", sweep, "--out", tmp_path / "run")
    assert oodk("eval", *given).exit_code == 0
    assert "FPR95 by number of classes" in (tmp_path / "run" / "report.html").read_text()
    sweep.write_text("x,method\n100,msp\n")
    found = oodk("eval", *given)
    assert found.exit_code == 1
    assert "columns x and value" in plain(found)


def test_user_errors_are_one_line_and_exit_codes_are_as_expected(
    data: dict[str, Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.npy"
    cut.write_bytes(data["id"].read_bytes()[:-100])
    nan = np.load(data["id"])
    nan[7, 3] = np.nan
    np.save(tmp_path / "nan.npy", nan)
    np.save(tmp_path / "ints.npy", np.zeros((3, 4), int))
    far = ("--ood", data["far"])
    for arguments, code, message in (
        (("--id", cut, *far), 1, "cut.npy is cut off"),
        (("--id", tmp_path / "nan.npy", *far), 1, "sample 7: logits must not be NaN"),
        (("--id", tmp_path / "ints.npy", *far), 1, "logits must be floating-point"),
        (("--id", data["id"], *far, "-d", "best"), 1, "there is no detector 'best'"),
        (("--id", data["id"], *far, "--memory", "lots"), 1, "memory must be a size"),
        (("--id", data["id"], *far, "--groups", data["labels"]), 1, "must be >= 1"),
        (("--id", tmp_path / "no.npy", *far), 2, "there is no"),
        (("--id", data["id"], "--ood", tmp_path / "no.npy"), 2, "there is no"),
        (("--id", data["id"], *far, *far), 2, "each name once"),
        (("--id", data["id"]), 2, "--ood"),
        (("--id", data["id"], *far, "--column", "scores"), 2, "must be NAME=VALUE"),
        (("--id", data["id"], *far, "--convention", "mine"), 2, "mine"),
        (("--id", data["id"], *far, "--out", cut / "x"), 2, "cannot write to"),
    ):
        found = oodk("eval", *arguments)
        assert found.exit_code == code, found.output
        assert message in plain(found), found.output
        assert "Traceback" not in found.output
        if code == 1:
            lines = [line for line in found.stderr.splitlines() if line.startswith("oodk eval: ")]
            assert len(lines) == 1
            assert found.stdout == ""


def test_a_bug_keeps_its_traceback_and_any_error_on_demand(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OODK_TRACEBACK", "1")
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "-d", "best")
    assert isinstance(found.exception, ValueError)
    monkeypatch.delenv("OODK_TRACEBACK")

    def bug(*args: object, **kwargs: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr("oodkernels.evaluation.evaluate", bug)
    found = oodk("eval", "--id", data["id"], "--ood", data["far"])
    assert isinstance(found.exception, AttributeError)


def test_score_and_threshold(data: dict[str, Path], tmp_path: Path) -> None:
    limit = tmp_path / "threshold.json"
    given = ("--detector", "energy")
    found = oodk("threshold", "--id", data["id"], *given, "--tpr", 0.9, "--out", limit, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["achieved_tpr"] == 0.9
    assert record["detector"] == "energy"
    threshold = oodkernels.Threshold.load(limit)
    assert threshold.value == record["value"]

    out = tmp_path / "scores.csv"
    found = oodk("score", "--data", data["far"], *given, "--threshold", limit, "--out", out)
    assert found.exit_code == 0, found.output
    assert found.stdout.split() == [str(out)]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    energy = oodkernels.logit_scores(torch.from_numpy(np.load(data["far"]))).energy
    assert [np.float32(row["energy"]) for row in rows] == energy.numpy().tolist()
    assert [int(row["is_ood"]) for row in rows] == threshold.predict(energy).int().tolist()

    printed = oodk("score", "--data", data["far"], *given, "--threshold", limit, "--quiet")
    assert printed.stdout == out.read_text()
    found = oodk("score", "--data", data["far"], "--threshold", limit)
    assert found.exit_code == 1
    assert "a threshold is for one detector" in plain(found)
    found = oodk("threshold", "--id", data["id"], *given)
    assert "keeps 95.00 % of 200 ID samples" in plain(found)
    for bad in (0, 1.5):
        assert oodk("threshold", "--id", data["id"], *given, "--tpr", bad).exit_code == 2
    assert oodk("score", "--data", data["far"], "--out", tmp_path / "x.doc").exit_code == 2


# --- group, convert ---------------------------------------------------------------------------


def test_groups_by_features(data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "groups.json"
    found = oodk("group", "features", data["train"], "-k", 2, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["num_classes"] == 5
    file = np.load(data["train"])
    means = np.stack([file["features"][file["labels"] == c].mean(0) for c in range(5)])
    assert oodkernels.Groups.load(out) == oodkernels.Groups.from_features(means, 2)
    found = oodk("group", "features", data["ood_features"], "--out", out)
    assert found.exit_code == 1
    assert "has no labels, only features" in plain(found)


def test_groups_by_table_and_wordnet(tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "groups.json"
    table.write_text("name,group\na,x\nb,y\nc,x\n")
    found = oodk("group", "taxonomy", table, "--out", out)
    assert found.exit_code == 0, found.output
    assert oodkernels.Groups.load(out).names == ("x", "y")
    wnids = tmp_path / "wnids.txt"
    wnids.write_text("n01440764\n")
    found = oodk("group", "taxonomy", wnids, "--wordnet", tmp_path, "--out", out)
    assert found.exit_code == 1
    assert "no data.noun in" in plain(found)


def test_official_groups_there_and_back(tmp_path: Path) -> None:
    sizes, slices = np.array([3, 2]), np.array([[0, 4], [4, 7]])
    np.save(tmp_path / "taxonomy_level0.npy", sizes)
    np.save(tmp_path / "group_slices.npy", slices)
    for name in ("taxonomy_level0", "group_slices"):
        out = tmp_path / f"{name}.json"
        source = tmp_path / f"{name}.npy"
        found = oodk("convert", "groups", source, out, "--names", "animal, plant")
        assert found.exit_code == 0, found.output
        assert oodkernels.Groups.load(out) == oodkernels.Groups.from_sizes(
            sizes, ["animal", "plant"]
        )
    for form, expected in (("sizes", sizes), ("slices", slices)):
        back = tmp_path / "back.npy"
        source = tmp_path / "group_slices.json"
        assert oodk("convert", "groups", source, back, "--form", form).exit_code == 0
        np.testing.assert_array_equal(np.load(back), expected)
    oodkernels.Groups([0, 1, 0]).save(tmp_path / "mixed.json")
    found = oodk("convert", "groups", tmp_path / "mixed.json", tmp_path / "x.npy")
    assert found.exit_code == 1
    assert "grouped order" in plain(found)
    source = tmp_path / "group_slices.npy"
    found = oodk("convert", "groups", source, tmp_path / "x.json", "--names", "animal")
    assert found.exit_code == 2
    assert "must be 2, got 1" in plain(found)


def test_official_groups_of_imagenet_are_matched_by_name(
    data: dict[str, Path], tmp_path: Path
) -> None:
    """A .npy for 1,000 classes does not say in which order they are, and is refused."""
    source, out = tmp_path / "taxonomy_level0.npy", tmp_path / "groups.json"
    np.save(source, np.array([398, 521, 9, 7, 52, 8, 3, 2]))
    for command in (
        ("convert", "groups", source, out),
        ("eval", "--id", data["id"], "--ood", data["far"], "--groups", source),
    ):
        found = oodk(*command)
        assert found.exit_code == 1
        assert "1000 classes are in the order of the head's columns" in plain(found)
        assert "oodk convert groups imagenet2012_group_softmax_val_list.txt" in plain(found)
    columns = [f"n{i * 7 % 1000:08d}" for i in range(1000)]
    (tmp_path / "columns.txt").write_text("\n".join(columns))
    (tmp_path / "ids.txt").write_text("\n".join(sorted(columns)))
    given = ("--class-names", tmp_path / "columns.txt", "--order", tmp_path / "ids.txt")
    assert oodk("convert", "groups", source, out, *given).exit_code == 0
    by_npy = oodkernels.Groups.load(out)
    assert by_npy.class_names == tuple(sorted(columns))
    assert by_npy.to_column(torch.tensor([0, 7])).tolist() == [1, 2]
    places = [(k, i) for k, size in enumerate(np.load(source)) for i in range(size)]
    lines = [f"val/{c}/x.JPEG {k} {i}" for c, (k, i) in zip(columns, places, strict=True)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert oodk("convert", "groups", tmp_path / "list.txt", out).exit_code == 0
    assert oodkernels.Groups.load(out) == by_npy


def test_openood_scores_and_results(tmp_path: Path) -> None:
    conf, label, pred = np.array([0.9, 0.2]), np.array([3, -1]), np.array([3, 5])
    np.savez(tmp_path / "s.npz", pred=pred, conf=conf, label=label)
    found = oodk("convert", "openood", tmp_path / "s.npz", tmp_path / "s.csv")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "s.csv").read_text() == "score,label,prediction\n0.9,3,3\n0.2,-1,5\n"

    (tmp_path / "ood.csv").write_text(
        "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\nsvhn,20.50,90.00,80.00,70.00,95.10\n"
    )
    out = tmp_path / "results.csv"
    assert oodk("convert", "openood", tmp_path / "ood.csv", out, "--name", "msp").exit_code == 0
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert row["ood_set"] == "svhn"
    assert float(row["fpr95"]) == pytest.approx(0.205)
    assert float(row["id_accuracy"]) == pytest.approx(0.951)
    (tmp_path / "ood.csv").write_text("dataset,AUROC\nsvhn,1\n")
    found = oodk("convert", "openood", tmp_path / "ood.csv", out)
    assert found.exit_code == 1
    assert "must have numbers in the columns FPR@95" in plain(found)


def test_every_command_teaches_with_examples() -> None:
    commands = ["extract", "train", "eval", "score", "threshold"]
    commands += ["group taxonomy", "group features", "group random"]
    commands += ["convert groups", "convert openood"]
    for command in commands:
        found = oodk(*command.split(), "--help")
        assert found.exit_code == 0
        _, example, text = plain(found).partition("Example")
        assert example, command
        assert f"oodk {command} " in text, command


def test_info_lists_the_detectors() -> None:
    listed = json.loads(oodk("info", "--detectors", "--json").stdout)
    assert listed.keys() == DETECTORS.keys()
    assert len(listed) > 40
    assert listed["knn"]["trained_on"] == ["features"]
    assert listed["vim"]["family"] == "D"
    assert listed["vim"]["paper"] == "Wang et al., CVPR 2022"
    assert listed["rmds++"]["what"] == "RMDS of normalised features."
