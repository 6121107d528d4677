from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("typer")

from PIL import Image
from processes import forked
from typer.testing import CliRunner, Result

from oodk.app import app
from oodkernels import Groups
from oodkernels._files import LOCK, locked
from oodkernels.data import (
    EXTRACT_FORMATS,
    ExtractionPlan,
    ImageFiles,
    Shards,
    ToTensor,
    extract_images,
    load_model,
    open_images,
    open_samples,
)
from oodkernels.data.formats import safetensors
from oodkernels.nn import save_weights

MODULE = """
import time
from pathlib import Path
import torch
from torch import nn
from oodkernels.data import ToTensor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3 * 8 * 8, 6)
        self.fc = nn.Linear(6, 4)
    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).relu())

class Slow(Net):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)

def make():
    return Net(), ToTensor(8)

def make_slow():
    return Slow(), ToTensor(8)

def make_convs():
    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), ToTensor(8)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.act, self.fc = nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4)
    def forward(self, x):
        return self.fc(self.act(self.embed(x.flatten(2))).mean(1))

def make_tokens():
    return Tokens(), ToTensor(8)

nothing = 3

def make_nothing():
    return nothing

class Loud(Net):
    def forward(self, x):
        return 1e6 * super().forward(x)

def make_loud():
    return Loud(), ToTensor(8)

class Unsure(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits[:, :1] / 2

def make_unsure():
    return Unsure(), ToTensor(8)
"""


def oodk(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of three classes, and a module with models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for label, name in enumerate(("b", "a", "c")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(7 + label):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path


def expected(images: ImageFiles) -> dict[str, torch.Tensor]:
    """Straight from the model, one image at a time."""
    model, _ = load_model("my_models:make")
    x = torch.stack([images[i].image for i in range(len(images))])
    features = model.body(x.flatten(1)).relu()
    return {"features": features.detach(), "logits": model.fc(features).detach()}


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_image_folder(here: Path, file_format: str, dtype: str) -> None:
    given = ("--model", "my_models:make", "--data", "images", "--out", "run")
    given = (*given, "--format", file_format, "--dtype", dtype)
    found = oodk("extract", *given, "--batch-size", 4, "--part-size", 9)
    assert found.exit_code == 0, found.output
    written = found.stdout.split()
    assert all(Path(path).exists() for path in written)
    names = {path.name for path in (here / "run").iterdir()}
    data = {"safetensors": {"samples.safetensors"}}.get(
        file_format, {"features.npy", "labels.npy", "logits.npy"}
    )
    assert names == data | {"samples.txt", "classes.txt", "config.toml", "extract.json"}
    samples = open_samples("run")
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    for role, values in expected(images).items():
        read = samples.read(role)
        assert read.dtype == getattr(torch, dtype)
        tolerance = 1e-6 if dtype == "float32" else 2e-3
        torch.testing.assert_close(read.float(), values, atol=tolerance, rtol=tolerance)
    assert samples.read("labels").tolist() == [0] * 8 + [1] * 7 + [2] * 9
    assert (here / "run/classes.txt").read_text().split() == ["a", "b", "c"]
    assert (here / "run/samples.txt").read_text().splitlines() == [str(p) for p in images.paths]


def test_bfloat16_and_a_layer(here: Path) -> None:
    given = ("--model", "my_models:make", "--data", "images", "--layer", "body")
    assert oodk("extract", *given, "--out", "run", "--dtype", "bfloat16").exit_code == 0
    features = open_samples("run").read("features")
    assert features.dtype == torch.bfloat16
    assert (features < 0).any()  # before the ReLU
    found = oodk("extract", *given, "--out", "x", "--dtype", "bfloat16", "--format", "npy")
    assert found.exit_code == 2


def test_the_axis_of_a_layer_is_said_where_it_does_not_tell(here: Path) -> None:
    given = ("extract", "--model", "my_models:make_tokens", "--data", "images")
    given = (*given, "--layer", "act", "--dtype", "float32")
    found = oodk(*given, "--out", "run")
    assert found.exit_code != 0
    assert "say axis=1 if it is the second, axis=-1 if the last" in " ".join(found.output.split())
    assert oodk(*given, "--out", "run2", "--axis", -1).exit_code == 0
    x = torch.stack([s.image for s in open_images("images", ToTensor(8))])
    expected = load_model("my_models:make_tokens")[0].embed(x.flatten(2)).relu().mean(1)
    torch.testing.assert_close(open_samples("run2").read("features"), expected.detach())


def test_file_lists(here: Path) -> None:
    (here / "list.txt").write_text("images/a/00.png 5\n\nimages/c/01.png 0\n")
    (here / "unlabelled.txt").write_text("a/00.png\nc/01.png\n")
    images = open_images("list.txt", ToTensor(8))
    assert isinstance(images, ImageFiles)
    assert images.labels == [5, 0]
    given = ("extract", "--model", "my_models:make", "--dtype", "float32")
    assert oodk(*given, "--data", "list.txt", "--out", "one").exit_code == 0
    found = oodk(*given, "--data", "unlabelled.txt", "--root", "images", "--out", "two")
    assert found.exit_code == 0, found.output
    one, two = open_samples("one"), open_samples("two")
    assert torch.equal(one.read("logits"), two.read("logits"))
    assert one.read("labels").tolist() == [5, 0]
    assert "labels" not in two.arrays


def shards(count: int) -> None:
    """The images in so many tar files."""
    pytest.importorskip("webdataset")
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    for shard in range(count):
        with tarfile.open(f"s-{shard:03d}.tar", "w") as tar:
            for i in range(24 * shard // count, 24 * (shard + 1) // count):
                content = {"png": images.paths[i].read_bytes(), "cls": str(images.labels[i])}
                for suffix, data in content.items():
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    raw = data.encode() if isinstance(data, str) else data
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))


def test_shards(here: Path) -> None:
    pytest.importorskip("webdataset")
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    shards(2)
    given = ("--model", "my_models:make", "--data", "s-{000..001}.tar", "--dtype", "float32")
    found = oodk("extract", *given, "--out", "run", "--part-size", 5)
    assert found.exit_code == 0, found.output
    samples = open_samples("run")
    torch.testing.assert_close(samples.read("logits"), expected(images)["logits"])
    assert samples.read("labels").tolist() == images.labels
    later = open_images("s-{000..001}.tar", ToTensor(8))
    assert isinstance(later, Shards)
    later.start = 20
    assert [sample.name for sample in later] == ["00020", "00021", "00022", "00023"]


def test_killed_and_started_again(here: Path) -> None:
    command = [sys.executable, "-m", "oodkernels", "extract", "--model", "my_models:make_slow"]
    command += ["--data", "images", "--out", "run", "--batch-size", "2", "--part-size", "4"]
    command += ["--dtype", "float32", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen(command, cwd=here, env=environment)
    parts = here / "run" / ".parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.safetensors"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert {path.name for path in (here / "run").iterdir()} == {".parts", "config.toml", LOCK}
    done = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.safetensors")}
    assert 2 <= len(done) < 6

    calls: list[int] = []
    model, transform = load_model("my_models:make_slow")
    images = open_images("images", transform)
    assert isinstance(images, ImageFiles)
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    plan = ExtractionPlan(
        **{k: v for k, v in json.loads((parts / "plan.json").read_text()).items() if k != "format"}
    )
    extract_images(model, images, "run", plan, batch_size=2, part_size=4)
    assert sum(calls) == 24 - 4 * len(done)
    torch.testing.assert_close(open_samples("run").read("logits"), expected(images)["logits"])
    assert not parts.exists()
    found = oodk(*command[3:])  # done: nothing is computed again
    assert found.exit_code == 0
    assert str(Path("run/samples.safetensors")) in found.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("source", ["images", "s-{000..004}.tar"])
def test_ranks_share_the_work_and_write_the_bytes_of_one(here: Path, source: str) -> None:
    """A rank that is killed leaves its parts; who goes on makes those that are missing."""
    shards(5)
    plan = ExtractionPlan("x", None, None, "y", "z", "float32")
    model, transform = load_model("my_models:make")

    def extract(out: str, kill_at: int | None = None) -> None:
        images = open_images(source, transform)

        def told(done: int) -> None:
            if kill_at is not None and done >= kill_at and torch.distributed.get_rank() == 1:
                os._exit(9)

        extract_images(model, images, out, plan, batch_size=2, part_size=3, on_batch=told)

    def content(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(out).iterdir()}

    extract("one")
    assert open_samples("one").num_samples == 24
    for world in (2, 4):
        assert forked(world, here, partial(extract, f"of {world}")) == [0] * world
        assert content(f"of {world}") == content("one")
    assert forked(2, here, lambda: extract("killed", 10))[1] == 9
    assert not (here / "killed/extract.json").exists()
    assert list((here / "killed/.parts").glob("part-*"))
    assert forked(3, here, lambda: extract("killed")) == [0, 0, 0]
    assert content("killed") == content("one")


def test_parts_of_another_size_do_not_mix(here: Path) -> None:
    (here / "images/c/08.png").write_bytes(b"")
    assert oodk(*GIVEN, "--out", "run", "--batch-size", 2, "--part-size", 4).exit_code == 1
    found = oodk(*GIVEN, "--out", "run", "--batch-size", 2, "--part-size", 6)
    assert found.exit_code == 1
    assert "holds parts of 4 images: give --part-size 4" in found.stderr


@pytest.mark.parametrize("source", ["images", "s-{000..001}.tar"])
def test_images_that_cannot_be_read_are_left_out_where_that_is_allowed(
    here: Path, source: str
) -> None:
    bad = [here / "images" / name for name in ("a/00.png", "a/01.png", "c/05.png")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    shards(2)
    given = ("extract", "--model", "my_models:make", "--data", source, "--batch-size", 2)
    given = (*given, "--part-size", 2, "--dtype", "float32", "--skip-bad")
    found = oodk(*given, "--out", "run")
    assert found.exit_code == 0, found.output
    assert "left out 3 images that cannot be read: run/skipped.txt" in found.stderr
    skipped = (here / "run/skipped.txt").read_text().splitlines()
    images = open_images("images", ToTensor(8))
    assert isinstance(images, ImageFiles)
    places = [images.paths.index(path.relative_to(here)) for path in bad]
    names = list(map(str, images.paths)) if source == "images" else [f"{i:05d}" for i in range(24)]
    assert skipped == [names[i] for i in places]
    assert (here / "run/samples.txt").read_text().splitlines() == [
        name for name in names if name not in skipped
    ]
    good = [i for i in range(24) if i not in places]
    samples = open_samples("run")
    assert samples.read("labels").tolist() == [images.labels[i] for i in good]
    model, _ = load_model("my_models:make")
    x = torch.stack([images[i].image for i in good])
    torch.testing.assert_close(samples.read("logits"), model(x).detach())
    assert json.loads((here / "run/extract.json").read_text())["skipped"] == 3


def test_labels_in_lists_may_be_python_dicts(here: Path) -> None:
    text = 'a b/00.png {"label": 2, "group_label": 1}\r\n\r\na b/01.png { "label": -1 }\r\n'
    (here / "list.txt").write_bytes(text.encode())
    images = open_images("list.txt", ToTensor(8), "images")
    assert isinstance(images, ImageFiles)
    assert images.labels == [2, -1]
    assert images.paths[0] == Path("images/a b/00.png")
    for label in ('{"class_label": 2}', "{label}", '{"label": "2"}', "{" * 5000 + "}"):
        (here / "list.txt").write_text(f"a/00.png {label}\n")
        with pytest.raises(ValueError, match="line 1 must have a class id as the `label`"):
            open_images("list.txt")


def test_another_extraction_does_not_mix_with_one_that_is_there(here: Path) -> None:
    given = ("extract", "--model", "my_models:make", "--out", "run")
    assert oodk(*given, "--data", "images").exit_code == 0
    before = (here / "run/samples.safetensors").read_bytes()
    found = oodk(*given, "--data", "images", "--dtype", "float32")
    assert found.exit_code == 1
    assert "holds an extraction under other settings" in found.stderr
    assert (here / "run/samples.safetensors").read_bytes() == before


def test_an_unreadable_image_is_named_and_what_is_done_is_kept(here: Path) -> None:
    bad = here / "images" / "c" / "05.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    given = ("extract", "--model", "my_models:make", "--data", "images", "--out", "run")
    given = (*given, "--batch-size", "2", "--part-size", "4")
    found = oodk(*given)
    assert found.exit_code == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert "cannot read the image images/c/05.png" in line
    assert not (here / "run/samples.safetensors").exists()
    assert len(list((here / "run/.parts").glob("*.safetensors"))) == 5
    bad.write_bytes(good)
    assert oodk(*given).exit_code == 0
    assert open_samples("run").num_samples == 24


def test_a_full_disk_leaves_nothing_half_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("extract", "--model", "my_models:make", "--data", "images", "--out", "run")

    original = safetensors.write_chunks

    def full(*args: Any) -> None:
        if len(args) < 5:  # a part
            return original(*args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("oodkernels.data.formats.safetensors.write_chunks", full)
        found = oodk(*given)
    assert found.exit_code == 1
    (*_, line) = found.stderr.splitlines()
    assert line == "oodk extract: cannot extract to run: No space left on device"
    assert {path.name for path in (here / "run").iterdir()} == {
        ".parts",
        "classes.txt",
        "config.toml",
        "samples.txt",
    }
    assert oodk(*given).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "my_models:nobody"), "my_models has no callable 'nobody'"),
        (("--model", "nowhere.at_all:make"), "there is no module 'nowhere.at_all'"),
        (("--model", "my_models:make_nothing"), "must give an nn.Module, got int"),
        (("--model", "my_models:make_convs"), "has no linear layer"),
        (
            ("--model", "my_models:make", "--layer", "boddy"),
            "no layer 'boddy'; near it are ['body'",
        ),
        (("--model", "my_models:make", "--data", "empty"), "must hold images"),
        (("--model", "my_models:make", "--data", "none.txt"), "none.txt: No such file"),
        (("--model", "my_models:make", "--weights", "w.pt"), "w.pt does not fit the model"),
    ],
)
def test_user_errors(here: Path, arguments: tuple[str, ...], message: str) -> None:
    (here / "empty").mkdir()
    torch.save({"x": torch.zeros(1)}, "w.pt")
    found = oodk("extract", "--data", "images", "--out", "run", *arguments)
    assert found.exit_code == 1, found.output
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert message in line


GIVEN = ("extract", "--model", "my_models:make", "--data", "images", "--dtype", "float32")


def test_numbers_that_the_type_cannot_hold_stop_it(here: Path) -> None:
    given = ("extract", "--model", "my_models:make_loud", "--data", "images", "--out", "run")
    found = oodk(*given)
    assert found.exit_code == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert re.search(r"logits of images/a/00\.png reach \d\S+, which float16 cannot hold", line)
    assert line.endswith("give --dtype bfloat16 or float32")
    assert not (here / "run/samples.safetensors").exists()
    assert oodk(*given[:-1], "other", "--dtype", "bfloat16").exit_code == 0


@pytest.mark.parametrize("file_format", EXTRACT_FORMATS)
def test_the_confidence_of_a_model_is_kept(file_format: str) -> None:
    given = ("extract", "--model", "my_models:make_unsure", "--data", "images", "--out", "run")
    assert oodk(*given, "--dtype", "float32", "--format", file_format).exit_code == 0
    samples = open_samples("run")
    assert set(samples.arrays) == {"logits", "features", "labels", "confidence"}
    assert torch.equal(samples.read("confidence"), samples.read("logits")[:, 0] / 2)


@pytest.mark.parametrize("lost", ["samples.safetensors", "classes.txt", "samples.txt"])
def test_what_was_deleted_is_done_again(here: Path, lost: str) -> None:
    assert oodk(*GIVEN, "--out", "run").exit_code == 0
    before = (here / "run" / lost).read_bytes()
    (here / "run" / lost).unlink()
    assert oodk(*GIVEN, "--out", "run").exit_code == 0
    assert (here / "run" / lost).read_bytes() == before


def test_what_was_cut_short_is_done_again(here: Path) -> None:
    assert oodk(*GIVEN, "--out", "run").exit_code == 0
    os.truncate(here / "run/samples.safetensors", 100)
    assert oodk(*GIVEN, "--out", "run").exit_code == 0
    assert open_samples("run").num_samples == 24


def test_other_files_of_the_folder_are_left_alone(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run/.mine.tmp").touch()
    (here / "run/notes.txt").touch()
    found = oodk(*GIVEN, "--out", "run")
    names = ("classes.txt", "samples.safetensors", "samples.txt")
    assert found.stdout.split() == [f"run/{name}" for name in names]
    assert (here / "run/.mine.tmp").exists()


def test_a_folder_in_use_is_refused(here: Path) -> None:
    (here / "run").mkdir()
    with locked("run", "another"):
        found = oodk(*GIVEN, "--out", "run")
    assert found.exit_code == 1
    assert f"run is being written by process {os.getpid()} on " in found.stderr
    assert oodk(*GIVEN, "--out", "run").exit_code == 0


def test_weights_that_were_replaced_are_other_settings(here: Path) -> None:
    model, _ = load_model("my_models:make")
    torch.save(model.state_dict(), "w.pt")
    assert oodk(*GIVEN, "--out", "run", "--weights", "w.pt").exit_code == 0
    torch.nn.init.ones_(model.fc.bias)
    torch.save(model.state_dict(), "w.pt")
    found = oodk(*GIVEN, "--out", "run", "--weights", "w.pt")
    assert found.exit_code == 1
    assert "under other settings (weights " in found.stderr


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "3", '{"files": 3}'])
def test_a_damaged_record_is_one_line(here: Path, content: str) -> None:
    (here / "run").mkdir()
    (here / "run/extract.json").write_text(content)
    found = oodk(*GIVEN, "--out", "run")
    assert found.exit_code == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oodk extract: ")]
    assert "run/extract.json" in line


def test_a_file_of_settings_cannot_ask_for_a_shell(here: Path) -> None:
    pytest.importorskip("webdataset")
    (here / "config.toml").write_text('data = "pipe:touch made; cat s.tar"\nallow-shell = true\n')
    given = ("extract", "--model", "my_models:make", "--out", "run", "--config", "config.toml")
    found = oodk(*given)
    assert found.exit_code == 2
    assert "must be given on the command line" in found.stderr
    assert oodk(*given, "--allow-shell").exit_code == 1  # there is no s.tar
    assert (here / "made").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "npz"}, "file_format must be safetensors or npy, got 'npz'"),
        ({"file_format": "npy"}, "dtype must be float16, float32, float64 for npy, got 'bfloat16'"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ({"part_size": 0.5}, "part_size must be an int >= 1, got 0.5"),
        ({"workers": -1}, "workers must be an int >= 0, got -1"),
    ],
)
def test_settings_are_refused_before_the_work(options: dict[str, Any], message: str) -> None:
    model, transform = load_model("my_models:make")
    plan = ExtractionPlan("x", None, None, "images", "x", "bfloat16")
    with pytest.raises(ValueError, match=f"extract_images: {message}"):
        extract_images(model, open_images("images", transform), "run", plan, **options)


# --- whose classes the labels are -------------------------------------------------------------


def trained(names: list[str]) -> None:
    """A model that has learnt the classes of these names."""
    model, _ = load_model("my_models:make")
    save_weights(model, "model.pt", 4, class_names=names)


@pytest.mark.parametrize("file_format", EXTRACT_FORMATS)
def test_folders_are_matched_to_the_models_classes(here: Path, file_format: str) -> None:
    trained(["zebra", "c", "b", "a"])
    more = ("--weights", "model.pt", "--out", "run", "--format", file_format)
    found = oodk(*GIVEN, *more)
    assert found.exit_code == 0, found.output
    assert "no accuracy" not in found.stderr
    samples = open_samples("run")
    assert samples.class_names == samples.model_classes == ("zebra", "c", "b", "a")
    assert samples.without_accuracy is None
    assert samples.read("labels").tolist() == [3] * 8 + [2] * 7 + [1] * 9


def test_a_folder_that_the_model_does_not_know_is_refused(here: Path) -> None:
    trained(["a", "b", "x", "y"])
    found = oodk(*GIVEN, "--weights", "model.pt", "--out", "run")
    assert found.exit_code == 1
    reason = "images: its classes must be among those trained on, a, b, x, y; unknown: c"
    assert reason in found.stderr


def test_folders_of_which_nothing_is_known_have_no_accuracy(here: Path) -> None:
    found = oodk(*GIVEN, "--out", "run")
    reason = "run: whether its classes (a, b, c) are the model's is not known"
    assert f"no accuracy later on: {reason} (--classes says which they are)" in found.stderr
    samples = open_samples("run")
    assert samples.without_accuracy == reason
    assert samples.class_names == ("a", "b", "c")
    assert samples.only("logits", "labels").without_accuracy == reason

    trained(["p", "q", "r", "s"])
    assert oodk(*GIVEN, "--weights", "model.pt", "--out", "other").exit_code == 0
    assert open_samples("other").without_accuracy == (
        "other: its classes (a, b, c) are not the model's"
    )


def test_whose_classes_they_are_can_be_said(here: Path) -> None:
    (here / "names.txt").write_text("c\na\nb\nzebra\n")
    assert oodk(*GIVEN, "--out", "run", "--classes", "names.txt").exit_code == 0
    samples = open_samples("run")
    assert samples.read("labels").tolist() == [1] * 8 + [2] * 7 + [0] * 9
    assert samples.without_accuracy is None
    found = oodk(*GIVEN, "--out", "run")
    assert "under other settings (" in found.stderr
    assert "model_classes ['c', 'a', 'b', 'zebra'])" in found.stderr
    assert oodk(*GIVEN, "--out", "two", "--classes", "images").exit_code == 0
    assert open_samples("two").model_classes == ("a", "b", "c")


def test_labels_of_one_extraction_are_matched_to_those_of_another(here: Path) -> None:
    assert oodk(*GIVEN, "--out", "run").exit_code == 0
    samples = open_samples("run").with_classes(["c", "zebra", "a", "b"])
    expected = [2] * 8 + [3] * 7 + [0] * 9
    assert samples.read("labels").tolist() == expected
    assert torch.cat([batch["labels"] for batch in samples.batches(5)]).tolist() == expected
    with pytest.raises(ValueError, match=r"run: its classes must be among .*unknown: a, b"):
        open_samples("run").with_classes(["c", "d"])


def test_what_the_columns_mean_is_kept(here: Path) -> None:
    model, _ = load_model("my_models:make")
    save_weights(model, "model.pt", 4, absent=True, class_names=["a", "b", "c"])
    assert oodk(*GIVEN, "--weights", "model.pt", "--out", "run").exit_code == 0
    assert open_samples("run").absent_column == 3
    groups = Groups([0, 1], class_names=["a", "b"])
    save_weights(model, "model.pt", 4, groups=groups)
    (here / "list.txt").write_text("images/a/00.png 1\n")
    more = ("--data", "list.txt", "--weights", "model.pt", "--out", "mos", "--format", "npy")
    assert oodk(*GIVEN, *more).exit_code == 0
    assert open_samples("mos").groups == groups
    assert open_samples("mos").without_accuracy is None  # labels of a list are ids


def test_weights(here: Path) -> None:
    model, _ = load_model("my_models:make")
    torch.nn.init.ones_(model.fc.bias)
    torch.save({"state_dict": model.state_dict()}, "w.pt")
    loaded, _ = load_model("my_models:make", "w.pt")
    assert torch.equal(loaded.fc.bias, torch.ones(4))
