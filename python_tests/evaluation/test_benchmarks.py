"""Benchmarks on a made-up copy of OpenOOD's layout, from lists of images to tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from PIL import Image
from processes import as_torchrun, forked
from typer.testing import CliRunner, Result

from oodk import main
from oodk.app import app
from oodkernels import ood_metrics
from oodkernels._files import locked
from oodkernels.data import Preprocess, open_samples
from oodkernels.detectors import DETECTORS as DETECTORS_BY_NAME
from oodkernels.detectors import Tuning
from oodkernels.evaluation.benchmarks import (
    BENCHMARKS,
    BenchmarkResult,
    FailingSamples,
    open_sets,
    read_benchmark,
)
from oodkernels.metrics import paired_test
from oodkernels.nn import Head

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    '''Classes are shades of grey: the nearest is a linear function of the mean.'''
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(3 * 16, 8), nn.Linear(8, 10)
        shade = (25 * torch.arange(10) / 255 - 0.47) / 0.25 + 3
        with torch.no_grad():
            self.body.weight[0], self.body.bias[0] = 1 / 48, 3
            self.fc.weight[:, 0], self.fc.bias[:] = 40 * shade, -20 * shade**2
    def forward(self, x):
        return self.fc(self.body(nn.functional.avg_pool2d(x, 8).flatten(1)).relu())

def make():
    return Net()
"""
COUNTS = {"train": 60, "val": 20, "test": 40, "shifted": 20}
CLASSES = ("airplane", "auto mobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "x y")
DETECTORS = ("msp", "energy", "knn:k=5", "mahalanobis")


def oodk(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])


def make_copy(data: Path) -> None:
    """OpenOOD's CIFAR-10 benchmark in a few hundred images, in every form that its lists have."""
    rng = np.random.default_rng(0)
    for each in read_benchmark("openood-cifar10").sets:
        count = COUNTS.get(each.name if each.kind == "id" else each.kind, 12)
        lines = []
        for i in range(count):
            label = i % 10 if each.kind in ("id", "shifted") else -1
            name = f"{each.name} {each.kind}/{CLASSES[label]}/{i:04d}.png"
            path = data / "images_classic" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            base = np.full((32, 32, 3), 128) if label < 0 else np.full((32, 32, 3), 25 * label)
            noise = rng.integers(-40, 40, base.shape)
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(path)
            lines.append(f'{name} {{"label": {label}}}' if i % 3 == 0 else f"{name} {label}")
        ends = "\r\n" if each.name in ("tin", "test") else "\n"
        path = data / each.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ends.join(lines) + ends).encode())


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("openood")
    make_copy(made / "data")
    (made / "bench_models.py").write_text(MODULE)
    return made


@pytest.fixture(autouse=True)
def here(copy_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(copy_of))
    monkeypatch.delitem(sys.modules, "bench_models", raising=False)
    # The pictures take the longest: those of the whole run are enough.
    monkeypatch.setattr(BenchmarkResult, "to_html", lambda self: "")
    monkeypatch.setattr(FailingSamples, "to_html", lambda self, picture: "")
    os.symlink(copy_of / "data", "data")
    return tmp_path


def given(out: str, *more: object, detectors: tuple[str, ...] = DETECTORS) -> tuple[object, ...]:
    options = [part for name in detectors for part in ("-d", name)]
    return (
        *("benchmark", "openood-cifar10", "--data", "data", "--model", "bench_models:make"),
        *("--other-counts", "--out", out, "--quiet", "--batch-size", 8, "--part-size", 24),
        *(*options, *more),
    )


def run(out: str, *more: object, detectors: tuple[str, ...] = DETECTORS) -> Result:
    found = oodk(*given(out, *more, detectors=detectors))
    assert found.exit_code == 0, found.output
    return found


def content(out: str) -> dict[str, bytes]:
    """All files of a run, but for its own name in its settings, and pictures."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.name not in ("config.toml", "report.html", "samples.html")
    }


def own_copy() -> None:
    """A copy of the data that a test may damage."""
    target = Path("data").resolve()
    Path("data").unlink()
    shutil.copytree(target, "data")


@pytest.fixture(scope="module")
def whole(copy_of: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(copy_of))
        os.symlink(copy_of / "data", "data")
        run("run")
    return folder / "run"


# --- definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmarks_of_the_package_are_whole(name: str) -> None:
    found = read_benchmark(name)
    assert found.name == name
    assert found.preprocess is not None
    keys = {each.key for each in found.sets}
    assert {"id/train", "id/val", "id/test", "ood/val"} <= keys
    assert {each.kind for each in found.sets} >= {"near", "far"}
    assert all(each.root in ("images_classic", "images_largescale") for each in found.sets)
    short = name.removeprefix("openood-")
    assert all(each.path.startswith(f"benchmark_imglist/{short}/") for each in found.sets)
    assert len({each.path for each in found.sets}) == len(found.sets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[id]\ntest = 3\n[near]\na = 'x'", "id.test must be a path, or a table with one, got 3"),
        ("[id]\ntest = 'x'", r"must have id.test and a set in \[near\] or \[far\]"),
        ("[id]\ntest = 'x'\n[near]\nall = 'x'", "a set cannot be called 'all'"),
        ("[id]\ntest = 'x'\n[near]\na = 'x'\n[far]\na = 'y'", "more than one set 'a'"),
        ("[id]\ntests = 'x'\n[near]\na = 'x'", "id.tests: there is only train, val, test"),
        ("[ood]\nnear = 'x'", "ood.near: there is only val"),
        ("nears = 3", "has 'nears', there is only"),
        ("classes = 0\n[id]\ntest = 'x'\n[near]\na = 'x'", "classes must be their number"),
        ("[near]\na = {path = 'x', count = 'y'}", "count must be int, got 'y'"),
        ("[near]\na = {path = 'x', images = 'y'}", "has 'images', there is only path, root"),
        ("[preprocess]\nsize = 8\nmean = [0, 0]\nstd = [1, 1, 1]", "mean must be three numbers"),
        ("[preprocess]\nsize = 8", "preprocess: .*missing"),
        ("[id", "must be TOML"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(here: Path, text: str, message: str) -> None:
    (here / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\b.*{message}"):
        read_benchmark("mine.toml")


def test_there_is_no_such_benchmark() -> None:
    with pytest.raises(ValueError, match="no benchmark 'openood', only openood-cifar10"):
        read_benchmark("openood")


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (31, 64), (32, 32), (33, 47)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_preprocessing_is_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose(
        [
            transforms.Resize(29, mode),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    ours = Preprocess(24, mean, std, 29, interpolation)
    assert torch.equal(ours(image), theirs(image))


def test_an_image_that_is_too_small_is_refused() -> None:
    ours = Preprocess(24, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="at least 24 wide and high"):
        ours(Image.new("L", (23, 30)))
    assert ours(Image.new("L", (24, 30), 255)).eq(1).all()
    with pytest.raises(ValueError, match="resize must be at least size, got 8"):
        Preprocess(24, (0, 0, 0), (1, 1, 1), 8)


# --- the whole way ----------------------------------------------------------------------------


def test_a_run_has_the_figures_of_its_scores(whole: Path) -> None:
    record = json.loads((whole / "results.json").read_text())
    rows = record["results"]
    sets = ("near/cifar100", "near/tin", "far/mnist", "far/svhn", "far/texture", "far/places365")
    names = [key.partition("/")[2] for key in sets]
    one = [row["ood_set"] for row in rows if row["score"] == "msp"]
    assert one == [*names, "near", "far", "all"] * 2

    def scores(key: str, label: str) -> np.ndarray[Any, Any]:
        (path,) = (whole / "scores" / key.replace("/", "-")).glob(f"{label}-*.npy")
        return np.load(path)

    logits = open_samples(whole / "sets/id-test").read("logits")
    torch.testing.assert_close(
        torch.from_numpy(scores("id/test", "msp")), logits.softmax(1).amax(1)
    )
    inside = scores("id/test", "energy")
    full = np.concatenate([inside, scores("shifted/cifar10c", "energy")])
    labels = open_samples(whole / "sets/id-test").read("labels")
    right = float((logits.argmax(1) == labels).double().mean())
    for spectrum, ids in (("standard", inside), ("full-spectrum", full)):
        own = [r for r in rows if (r["score"], r["spectrum"]) == ("energy", spectrum)]
        aurocs = {}
        for key, row in zip(sets, own, strict=False):
            outside = scores(key, "energy")
            found = ood_metrics(ids, outside)
            assert row["fpr95"] == found.as_dict()["fpr95"]
            assert (row["auroc"], row["n_id"], row["n_ood"]) == (found.auroc, len(ids), 12)
            theirs = ood_metrics(ids, outside, convention="openood").as_dict()
            assert row["fpr95_ood"] == theirs["fpr95"]
            aurocs[key] = found.auroc
        near, far, every = own[6:]
        assert near["auroc"] == pytest.approx(np.mean([aurocs[key] for key in sets[:2]]))
        assert far["auroc"] == pytest.approx(np.mean([aurocs[key] for key in sets[2:]]))
        assert every["auroc"] == pytest.approx(np.mean(list(aurocs.values())))
        if spectrum == "standard":
            assert own[0]["id_accuracy"] == right > 0.8
    identity = record["identity"]
    assert identity["data"]["near/tin"]["count"] == 12
    assert identity["preprocessing"].startswith("Preprocess(size=32")
    assert set(identity["software"]) >= {"oodkernels", "torch"}
    header = (whole / "results.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["ood_set", "kind", "spectrum", "model", "score"]
    for name in ("results.md", "results.tex", "report.html"):
        text = (whole / name).read_text()
        assert "full-spectrum" in text
        assert "FPR95-OOD" in text


def test_the_samples_that_fail_are_shown(whole: Path) -> None:
    record = json.loads((whole / "samples.json").read_text())

    def scores(key: str, label: str) -> np.ndarray[Any, Any]:
        (path,) = (whole / "scores" / key.replace("/", "-")).glob(f"{label}-*.npy")
        return np.load(path)

    shares = []
    for label in ("msp", "energy", "knn_k_5", "mahalanobis"):
        ids, oods = scores("id/test", label), scores("near/tin", label)
        lower = (ids < oods[:, None]).mean(1) + (ids == oods[:, None]).mean(1) / 2
        shares.append(lower)
    mean = np.mean(shares, 0)
    found = record["most_id"]["near/tin"]
    order = np.argsort(-mean, kind="stable")
    assert [each["index"] for each in found] == order[:12].tolist()
    assert [each["mean"] for each in found] == pytest.approx(mean[order[:12]].tolist())
    first = found[0]
    assert first["shares"]["msp"] == pytest.approx(shares[0][order[0]])
    assert first["spread"] == pytest.approx(np.std(shares, 0)[order[0]])
    assert first["name"] == f"data/images_classic/tin near/x y/{order[0]:04d}.png"
    logits = open_samples(whole / "sets/near-tin").read("logits")
    assert first["predicted"] == f"class {int(logits[order[0]].argmax())}"
    kept = 0
    for label in ("msp", "energy", "knn_k_5", "mahalanobis"):
        threshold = np.sort(scores("id/test", label))[2]  # 38 of 40 are 95 %
        kept += int(scores("near/tin", label)[order[0]] >= threshold)
    assert first["kept"] == kept
    lost = record["lost"]
    assert [each["mean"] for each in lost] == sorted(each["mean"] for each in lost)
    assert lost[0]["label"] == f"class {lost[0]['index'] % 10}"
    assert set(record["apart"]) == {"id/test", *record["most_id"]}
    page = (whole / "samples.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 12 * 7 + 6 * 7
    assert "ID samples that are lost" in page


def test_a_second_run_computes_nothing_and_more_detectors_only_theirs(
    whole: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, "run")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*.npy")}
    monkeypatch.setattr("oodkernels.data.extract._outputs", None)  # no model is run
    run("run")
    assert content("run") == content(str(whole))
    run("run", detectors=(*DETECTORS, "max-logit"))
    assert {p: p.stat().st_mtime_ns for p in before if "predictions" not in p.name} == {
        p: t for p, t in before.items() if "predictions" not in p.name
    }
    new = {p.name.partition("-")[0] for p in Path("run").rglob("*.npy") if p not in before}
    assert new == {"max"}


def test_all_detectors_and_those_left_out(here: Path, whole: Path) -> None:
    shutil.copytree(whole, "run")
    found = run("run", "-d", "all", "--exclude", "corp", "--json", detectors=())
    record = json.loads(found.stdout)
    names = {row["score"] for row in record["results"]}
    assert len(names) > 25
    (note,) = [note for note in record["notes"] if "temperature" in note]
    assert note.startswith("temperature-scaling is left out: TemperatureScaling.save: labels must")
    assert "temperature-scaling" not in names
    (note,) = [note for note in record["notes"] if note.startswith("Settings of")]
    assert "ash" in note
    assert note.endswith("are chosen by auroc on id.val and ood.val.")
    (tuned,) = (here / "run/tuned").iterdir()
    chosen = Tuning.load(tuned).settings["scale"]
    assert record["identity"]["detectors"]["scale"] == repr(DETECTORS_BY_NAME["scale"](**chosen))
    refused = oodk(*given("run", detectors=("temperature-scaling",)))
    assert refused.exit_code == 1
    assert "labels must fit one temperature" in refused.stderr
    assert "corp" not in names
    assert "odin" not in names
    refused = oodk(*given("run", detectors=("odin",)))
    assert refused.exit_code == 1
    assert "odin reads x, which is not among what is extracted" in refused.stderr


def test_killed_after_any_file_it_goes_on_to_the_same_bytes(whole: Path, here: Path) -> None:
    """A child is killed as the n-th file gets its name, before or after; then goes on."""
    wanted = content(str(whole))
    replace = Path.replace
    killed, n = 0, 1
    while True:
        pid = os.fork()
        if not pid:
            count = 0

            def counted(self: Path, target: Path, n: int = n) -> Path:
                nonlocal count
                count += 1
                if count == n and n % 2:
                    os._exit(9)
                found = replace(self, target)
                if count == n:
                    os._exit(9)
                return found

            Path.replace = counted  # type: ignore[method-assign]
            found = oodk(*given("run"))
            os._exit(found.exit_code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        assert code == 9
        killed, n = killed + 1, n + 7
    assert killed > 5
    assert content("run") == wanted


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_ranks_write_the_bytes_of_one(whole: Path, here: Path) -> None:
    """A rank that dies takes the run down; started again, it goes on to the same bytes."""
    replace = Path.replace

    def work(out: str, last: int | None) -> None:
        def dying(self: Path, target: Path) -> Path:
            nonlocal last
            if last is not None and torch.distributed.get_rank() == 1:
                last -= 1
                if last < 0:
                    os._exit(9)
            return replace(self, target)

        Path.replace = dying  # type: ignore[method-assign]
        code = oodk(*given(out)).exit_code
        if code:
            os._exit(code)

    for world, last in ((2, 2), (4, None)):
        out = f"of {world}"
        if last is not None:
            assert 9 in forked(world, here, partial(work, out, last))
            assert not (here / out / "results.json").exists()
        assert forked(world, here, partial(work, out, None)) == [0] * world
        assert content(out) == content(str(whole))


# --- what is refused --------------------------------------------------------------------------


def test_all_that_is_missing_is_named_before_anything_is_run(here: Path) -> None:
    own_copy()
    (here / "data/benchmark_imglist/cifar10/test_tin.txt").unlink()
    (here / "data/benchmark_imglist/cifar10/test_mnist.txt").unlink()
    found = oodk(*given("run"))
    assert found.exit_code == 1
    assert "near/tin lacks data/benchmark_imglist/cifar10/test_tin.txt; far/mnist" in found.stderr
    assert not (here / "run/sets").exists()
    own_copy_back = read_benchmark("openood-cifar10").without(("near/tin", "far/mnist"))
    path = next((here / "data/images_classic/svhn far").rglob("*.png"))
    path.unlink()
    found = oodk(*given("run", "--without", "near/tin", "--without", "far/mnist"))
    assert found.exit_code == 1
    shown = path.relative_to(here)
    assert f"far/svhn lacks {shown}" in found.stderr
    assert (here / "run/missing.txt").read_text() == f"far/svhn\t{shown}\n"
    opened = open_sets(own_copy_back, "data", other_counts=True, skip_bad=True)
    assert opened["far/svhn"].missing == (str(shown),)
    assert opened["far/svhn"].identity.count == 11


def test_images_that_are_bad_or_missing_are_left_out_named_and_counted(here: Path) -> None:
    own_copy()
    svhn = sorted((here / "data/images_classic/svhn far").rglob("*.png"))
    svhn[0].unlink()
    svhn[3].write_bytes(svhn[3].read_bytes()[:70])
    found = oodk(*given("run", detectors=("msp",)))
    assert found.exit_code == 1
    found = run("run", "--skip-bad", detectors=("msp",))
    assert "far/svhn: 1 images are missing and 1 cannot be read." in found.stderr
    record = json.loads((here / "run/results.json").read_text())
    assert record["identity"]["data"]["far/svhn"]["missing"] == 1
    name = svhn[3].relative_to(here / "data/images_classic")
    assert record["identity"]["skipped"] == {"far/svhn": [name.as_posix()]}
    assert record["identity"]["data"]["far/svhn"]["count"] == 10
    assert next(r for r in record["results"] if r["ood_set"] == "svhn")["n_ood"] == 10
    names = (here / "run/sets/far-svhn/samples.txt").read_text().splitlines()
    assert len(names) == 10


def test_a_list_of_another_benchmark_is_refused(here: Path) -> None:
    own_copy()
    benchmark = read_benchmark("openood-cifar10")
    with pytest.raises(ValueError, match=r"id/train must have 50000 images, got 60.*other-counts"):
        open_sets(benchmark, "data")
    path = here / "data/benchmark_imglist/cifar10/test_cifar10.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].rpartition(" ")[0] + " 57}", *lines[1:]]))
    with pytest.raises(
        ValueError, match=r"labels must be class ids 0\.\.9, got 57: the list is of"
    ):
        open_sets(benchmark, "data", other_counts=True)


def test_a_model_of_other_classes_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_models

    def other() -> torch.nn.Module:
        model = bench_models.Net()
        model.fc = torch.nn.Linear(8, 7)
        return model

    monkeypatch.setattr(bench_models, "make", other)
    found = oodk(*given("run"))
    assert found.exit_code == 1
    assert "openood-cifar10 has 10 classes, and the model gives logits of 7" in found.stderr


# --- sources of one's own ---------------------------------------------------------------------


def toml(text: str, **more: str) -> None:
    sections = {"id": "", "near": "", "far": ""} | more
    parts = [f"[{name}]\n{lines}\n" for name, lines in sections.items()]
    Path("mine.toml").write_text("\n".join([text, *parts]))


def test_folders_lists_shards_and_files_beside_each_other(here: Path) -> None:
    """What was extracted gives the same figures as the images it was extracted from."""
    pytest.importorskip("webdataset")
    source = here / "data/images_classic"
    base = ("--model", "bench_models:make", "--size", 32, "-q")
    for name in ("tin near", "test id", "svhn far"):
        Path(name.split()[0]).symlink_to(source / name)
    listed = [f"{p.parent.name}/{p.name}" for p in sorted((source / "test id").rglob("*.png"))]
    labels = [CLASSES.index(name.partition("/")[0]) for name in listed]
    Path("test.txt").write_text("".join(f"{n} {y}\n" for n, y in zip(listed, labels, strict=True)))
    files = sorted((source / "svhn far").rglob("*.png"))
    for shard in range(2):
        with tarfile.open(f"svhn-{shard}.tar", "w") as tar:
            for i, path in enumerate(files[6 * shard : 6 * shard + 6]):
                tar.add(path, f"{6 * shard + i:04d}.png")
    assert (
        oodk("extract", *base, "--data", "tin", "--dtype", "float32", "--out", "x").exit_code == 0
    )
    first = {"id": 'test = "test"', "near": 'tin = "tin"', "far": 'svhn = "svhn"'}
    second = {
        "id": 'test = { path = "test.txt", root = "test" }',
        "near": 'tin = "x"',
        "far": 'svhn = "svhn-{0..1}.tar"',
    }
    records = []
    for out, sets, classes in (("a", first, '"folders"'), ("b", second, "10")):
        names = json.dumps(sorted(CLASSES)) if classes == '"folders"' else classes
        toml(f"classes = {names}", **sets)
        found = oodk(
            "benchmark", "mine.toml", "--out", out, *base, "-d", "msp", "-d", "energy", "--json"
        )
        assert found.exit_code == 0, found.output
        records.append(json.loads(found.stdout))
    a, b = records
    assert a["results"] == b["results"]
    assert a["results"][0]["id_accuracy"] is not None
    sources = {key: one["source"] for key, one in b["identity"]["data"].items()}
    assert sources == {"id/test": "images", "near/tin": "arrays", "far/svhn": "shards"}
    assert b["identity"]["data"]["far/svhn"]["count"] == 12
    refused = oodk("compare", "a", "b")
    assert "a and b were measured on different data: data.id/test.source: folder" in refused.stderr


def test_folders_of_classes_need_their_columns(here: Path) -> None:
    Path("test").symlink_to(here / "data/images_classic/test id")
    Path("tin").symlink_to(here / "data/images_classic/tin near")
    toml("", id='test = "test"', near='tin = "tin"')
    given = ("benchmark", "mine.toml", "--model", "bench_models:make", "--out", "run", "-q")
    found = oodk(*given)
    assert found.exit_code == 1
    assert "id/test has a folder for each class, and which columns of the model" in found.stderr
    toml('classes = "folders"', id='test = "test"', near='tin = "tin"')
    assert 'classes must not be "folders" where id.train is no folder' in oodk(*given).stderr


def test_files_of_features_and_a_head(here: Path) -> None:
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(4, 6))
    for name, n in (("train", 120), ("test", 40)):
        labels = np.arange(n) % 4
        features = np.abs(centres[labels] + rng.normal(size=(n, 6))).astype(np.float32)
        np.savez(f"{name}.npz", features=features, labels=labels)
    np.savez("far.npz", features=np.abs(4 * rng.normal(size=(30, 6))).astype(np.float32))
    torch.manual_seed(0)
    Head(6, 4).save("head.safetensors")
    toml("", id='train = "train.npz"\ntest = "test.npz"', far='noise = "far.npz"')
    given = ("benchmark", "mine.toml", "--out", "run", "--json", "-q", "-d", "knn:k=3", "-d")
    found = oodk(*given, "energy", "--head", "head.safetensors")
    assert found.exit_code == 0, found.output
    rows = [r for r in json.loads(found.stdout)["results"] if r["ood_set"] == "noise"]
    expected = json.loads(
        oodk(
            *("eval", "--id", "test.npz", "--ood", "far.npz", "--train", "train.npz", "--json"),
            *("--head", "head.safetensors", "-d", "knn:k=3", "-d", "energy", "-q"),
        ).stdout
    )["results"]
    for label in ("knn:k=3", "energy"):
        mine = next(r for r in rows if (r["score"], r["kind"]) == (label, "far"))
        theirs = next(r for r in expected if (r["score"], r["ood_set"]) == (label, "far"))
        assert mine["auroc"] == theirs["auroc"]
        assert mine["id_accuracy"] == theirs["id_accuracy"]
    found = oodk("benchmark", "mine.toml", "--out", "other", "-q", "-d", "energy")
    assert found.exit_code == 1
    assert "energy reads logits, which is not among what is extracted, features" in found.stderr


def test_a_folder_of_another_run_is_refused(whole: Path, here: Path) -> None:
    shutil.copytree(whole, "run")
    before = content("run")
    found = oodk(*given("run", "--without", "near/tin"))
    assert found.exit_code == 1
    assert "run holds a run that measures something else: data.near/tin: something" in found.stderr
    assert content("run") == before


def test_a_second_process_is_refused(here: Path) -> None:
    (here / "run").mkdir()
    with locked(here / "run", "another"):
        found = oodk(*given("run"))
    assert found.exit_code == 1
    assert "is being written by process" in found.stderr


# --- side by side -----------------------------------------------------------------------------


@pytest.fixture
def two(whole: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Beside the whole run, as ``a``, one of another model, ``b``."""
    shutil.copytree(whole, "a")
    import bench_models

    def other() -> torch.nn.Module:
        model = bench_models.Net()
        torch.nn.init.normal_(model.body.weight)
        return model

    monkeypatch.setattr(bench_models, "make", other)
    run("b", detectors=("msp", "energy"))
    return here


def test_runs_side_by_side(two: Path) -> None:
    Path("ood.csv").write_text(
        "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\nnearood,50,80,70,60,95\nfarood,40,90,80,70,95\n"
    )
    found = oodk("compare", "a", "b", "--published", "paper=ood.csv", "--out", "c.json")
    assert found.exit_code == 0, found.output
    assert "differs: model.weights: " in found.stdout
    assert "= not told from the best" in found.stdout
    (line,) = [line for line in found.stdout.splitlines() if "published: paper" in line]
    assert line.split()[2:] == ["80.00", "-", "50.00", "90.00", "-", "40.00", "-", "-", "-"]
    record = json.loads(Path("c.json").read_text())
    assert {(row["run"], row["score"]) for row in record["results"]} == {
        (run, score) for run in "ab" for score in ("msp", "energy")
    }
    pair = record["pairs"][0]
    assert (pair["a"], pair["b"]) == ("a: msp", "a: energy")
    scores = {}
    for label in ("msp", "energy"):
        for key in ("id-test", "near-cifar100"):
            (path,) = Path("a/scores", key).glob(f"{label}-*.npy")
            scores[label, key] = np.load(path)
    tested = paired_test(
        (scores["msp", "id-test"], scores["energy", "id-test"]),
        (scores["msp", "near-cifar100"], scores["energy", "near-cifar100"]),
    )
    assert pair["auroc_difference"] == tested.auroc_difference
    assert pair["auroc_p_holm"] >= tested.auroc_p


def test_means_are_of_replicates_on_the_same_data(two: Path) -> None:
    found = oodk("compare", "a", "b", "--mean", "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    rows = [
        row["auroc"]
        for row in record["results"]
        if (row["score"], row["ood_set"], row["spectrum"]) == ("msp", "far", "standard")
    ]
    assert record["mean"]["far"]["auroc"]["msp"] == [np.mean(rows), np.std(rows, ddof=1)]
    results = Path("b/results.json")
    content = json.loads(results.read_text())
    content["identity"]["preprocessing"] = "another"
    results.write_text(json.dumps(content))
    found = oodk("compare", "a", "b", "--mean")
    assert found.exit_code == 1
    assert "no replicates of each other: preprocessing: Preprocess(" in found.stderr


def test_runs_on_different_data_are_refused(two: Path) -> None:
    results = Path("b/results.json")
    whole = json.loads(results.read_text())
    for change, message in (
        ({"digest": "0"}, "different data: data.near/tin.digest: "),
        ({"count": 11}, "different data: data.near/tin.count: 12 and 11"),
    ):
        content = json.loads(json.dumps(whole))
        content["identity"]["data"]["near/tin"] |= change
        results.write_text(json.dumps(content))
        found = oodk("compare", "a", "b")
        assert found.exit_code == 1
        assert message in found.stderr
    content = json.loads(json.dumps(whole))
    content["identity"]["skipped"] = {"near/tin": ["x.png"]}
    results.write_text(json.dumps(content))
    assert "data.near/tin.skipped" in oodk("compare", "a", "b").stderr
    found = oodk("compare", "a", "a")
    assert "each name once" in found.stderr
    found = oodk("compare", "a", "data")
    assert "data has no results of oodk benchmark" in found.stderr
    found = oodk("compare", "a", "x=a", "-d", "odin")
    assert "no run has the detector 'odin'" in found.stderr


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_model_of_timm_with_its_own_transform(here: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10)
    torch.save(network.state_dict(), "w.pt")
    given = ("benchmark", "openood-cifar10", "--data", "data", "--other-counts", "--out", "run")
    given = (*given, "--model", name, "--weights", "w.pt", "--preprocess", "model", "--json", "-q")
    found = oodk(*given, "-d", "energy", "-d", "knn:k=5", "-d", "vim:dim=8")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert "Normalize" in record["identity"]["preprocessing"]
    samples = open_samples("run/sets/id-test")
    assert samples["logits"].shape == (40, 10)
    features = samples.read("features")
    torch.testing.assert_close(
        network.eval().get_classifier()(features), samples.read("logits"), atol=1e-4, rtol=1e-4
    )


def as_program(command: tuple[object, ...]) -> None:
    sys.argv = ["oodk", *map(str, command)]
    try:
        code = main()
    finally:
        sys.stdout.flush()
    sys.exit(code)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_torchrun(
    whole: Path, here: Path, copy_of: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every command that takes several processes: one by torchrun itself, and in its environment.

    What torchrun adds is the environment, the same for all.
    """
    sets = whole / "sets"
    (knn,) = (whole / "detectors").glob("knn*")
    images = ("--model", "bench_models:make", "--size", 32, "-d", "odin")
    commands: dict[str, tuple[object, ...]] = {
        "eval": ("eval", "--id", sets / "id-test", "--ood", sets / "far-svhn", "-d", knn, "--json"),
        "score": ("score", "--data", "data/images_classic/svhn far", *images, "-q"),
        "benchmark": given("run", "--json"),
    }
    path = os.pathsep.join([str(copy_of), os.environ.get("PYTHONPATH", "")])
    for name, command in commands.items():
        alone = oodk(*command)
        assert alone.exit_code == 0, alone.output
        if name != "benchmark":
            capfd.readouterr()
            assert as_torchrun(2, partial(as_program, command)) == [0, 0]
            assert capfd.readouterr().out == alone.stdout
            continue
        shutil.rmtree("run", ignore_errors=True)
        start = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "oodkernels")
        done = subprocess.run(
            [sys.executable, *start, *map(str, command)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.stdout
    assert content("run") == content(str(whole))
