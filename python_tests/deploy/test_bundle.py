"""A bundle decides as its parts do, from threads, files and other processes; what is wrong is said.

What a bundle is held against is the detector's own ``predict`` and :class:`ConformalPValues`.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import GROUPS, KINDS, SHAPE, data, make, network, with_names
from processes import run_code
from torch import Tensor, nn
from transforms import evaluation

from oodkernels import Threshold
from oodkernels._files import file_digest
from oodkernels.data import OnRGB, Preprocess, ToTensor
from oodkernels.deploy import Bundle, ConformalPValues, Decision
from oodkernels.deploy.program import Program
from oodkernels.detectors import KNN, MOS, MSP, ODIN, Energy, NotFittedError

X = data().new
kinds = pytest.mark.parametrize("kind", KINDS)


def equal(a: Decision, b: Decision) -> bool:
    return all(
        (x is None and y is None) or torch.equal(x.nan_to_num(nan=9), y.nan_to_num(nan=9))
        for x, y in zip(a, b, strict=True)
    )


@kinds
def test_it_decides_as_the_detector(kind: str) -> None:
    bundle = make(kind)
    (detector,) = bundle.detectors.values()
    found = bundle(X)
    detector.threshold = bundle.threshold
    wanted = detector.predict(X)
    assert torch.equal(found.label, wanted.label)
    assert torch.equal(found.score, wanted.score)
    assert torch.equal(found.is_ood, wanted.is_ood)
    assert (found.group is None) == (kind != "mos")
    if found.group is not None:
        assert torch.equal(found.group, wanted.group)
        assert torch.equal(found.group, GROUPS.class_to_group[found.label])
    held_out = detector.score(data().held_out)
    p = ConformalPValues(held_out.double().numpy())(found.score.double().numpy())
    assert found.p_value.tolist() == p.tolist()
    assert bundle.threshold == Threshold.calibrate(held_out, 0.9, source=detector.source())


def test_several_detectors_share_a_pass() -> None:
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    energy, msp = Energy(model=model), MSP(model=model)
    bundle = Bundle(model, {"first": energy, "msp": msp}, input_shape=SHAPE)
    calls.clear()
    scores = bundle.score(X)
    assert len(calls) == 1
    assert torch.equal(scores["first"], energy.score(X))
    assert torch.equal(scores["msp"], msp.score(X))
    bundle.calibrate(data().held_out)
    assert torch.equal(bundle(X).score, scores["first"])


@pytest.mark.parametrize("by", ["class", "group"])
def test_p_values_within_classes_and_groups(by: Any) -> None:
    bundle = make("mos", calibrated=False)
    held_out = data().held_out
    bundle.calibrate(held_out, by=by, delta=0.1)
    place = 0 if by == "class" else 4
    calibration, found = bundle(held_out), bundle(X)
    names = [calibration[place].tolist(), found[place].tolist()]
    held = ConformalPValues(calibration.score.double().numpy(), names[0], delta=0.1)
    for score, name, p in zip(found.score.tolist(), names[1], found.p_value.tolist(), strict=True):
        assert p == (held([score], [name])[0] if name in held.counts else 1)
    assert bundle.p_value_info["counts"] == {str(k): n for k, n in held.counts.items()}
    other = Bundle(
        bundle.model, MOS(GROUPS), bundle.threshold, p_values=held, by=by, input_shape=SHAPE
    )
    assert equal(other(X), found)


# --- inputs ---------------------------------------------------------------------------------------


@kinds
def test_an_input_with_nan_is_a_flagged_row(kind: str) -> None:
    bundle = make(kind)
    clean = bundle(X)
    x = X.clone()
    x[3, 0, 2, 2] = torch.nan
    found = bundle(x)
    assert found.is_ood[3]
    assert found.score[3].isnan()
    assert found.label[3] == -1
    assert found.p_value[3] == 1 / 121
    others = torch.arange(len(x)) != 3
    for a, b in zip(found, clean, strict=True):
        assert a is None or torch.equal(a[others], b[others])


@kinds
def test_no_inputs_and_one(kind: str) -> None:
    bundle = make(kind)
    none, one, all_ = bundle(X[:0]), bundle(X[:1]), bundle(X)
    for a, b, c in zip(none, one, all_, strict=True):
        if c is not None:
            assert a.shape == (0,)
            assert b.shape == (1,)
            assert a.dtype == b.dtype == c.dtype
    torch.testing.assert_close(one.score, all_.score[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(2, 1, 9, 8), ValueError, r"x must be \(N, 1, 8, 8\), got \(2, 1, 9, 8\)"),
        (torch.rand(1, 8, 8), ValueError, r"x must be \(N, 1, 8, 8\), got \(1, 8, 8\)"),
        (torch.tensor(1.0), ValueError, r"x must be \(N, 1, 8, 8\), got \(\)"),
        (torch.rand(2, 1, 8, 8).double(), TypeError, "x must be torch.float32, got torch.float64"),
        (np.zeros((2, 1, 8, 8), np.uint8), TypeError, "x must be torch.float32, got torch.uint8"),
    ],
)
def test_wrong_inputs_are_one_error(x: Any, error: type[Exception], message: str) -> None:
    bundle = make()
    with pytest.raises(error, match=f"^Bundle: {message}"):
        bundle(x)
    assert len(bundle(X)) == 5  # and it goes on


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: list(x.split(16)),
        lambda x: [(part, torch.zeros(len(part))) for part in x.split(16)],
        lambda x: [{"pixel_values": part, "labels": None} for part in x.split(16)],
        lambda x: [{"x": part.numpy()} for part in x.split(16)],
    ],
)
def test_data_sets_in_every_form(form: Callable[[Tensor], Any]) -> None:
    bundle = make()
    torch.testing.assert_close(bundle.predict(form(X)).score, bundle(X).score)
    torch.testing.assert_close(bundle.score(form(X))["energy"], bundle(X).score)


def test_ood_samples_take_no_part_in_calibration() -> None:
    bundle, held_out = make(calibrated=False), data().held_out
    alone = bundle.calibrate(held_out)
    both = torch.cat([held_out, 5 * torch.ones(9, *SHAPE)])
    labels = torch.cat([torch.zeros(len(held_out), dtype=torch.int64), torch.full((9,), -1)])
    assert bundle.calibrate([(both, labels)]).n_id == alone.n_id == 120


@kinds
def test_eight_threads_give_the_bits_of_one(kind: str) -> None:
    bundle = make(kind)
    batches = [X[i : i + 5] for i in range(0, 40, 5)] * 3
    fresh = copy.deepcopy(bundle)  # nothing of it has been computed yet
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fresh, batches))
    assert all(equal(a, bundle(x)) for a, x in zip(found, batches, strict=True))


# --- as a module ----------------------------------------------------------------------------------


@kinds
def test_copies_and_state_dicts(kind: str) -> None:
    bundle = make(kind)
    wanted = bundle(X)
    twin = copy.deepcopy(bundle)
    assert all(d.model is twin.model for d in twin.detectors.values())
    for tensor in twin.model.parameters():
        tensor.data.zero_()
    assert equal(bundle(X), wanted)
    assert not equal(twin(X), wanted)
    twin.load_state_dict(bundle.state_dict())
    assert equal(twin(X), wanted)
    assert equal(bundle.train().to("cpu")(X), wanted)
    assert not any(module.training for module in bundle.modules())


def test_a_state_dict_has_what_was_fitted() -> None:
    bundle = make("knn")
    state = bundle.state_dict()
    assert torch.equal(state["fitted.0.bank"], bundle.detectors["knn"].bank)
    del state["fitted.0.bank"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fitted\.0\.bank"):
        bundle.load_state_dict(state)
    state["fitted.0.bank"] = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"bank must be \(n, d\)"):
        bundle.load_state_dict(state)


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_another_type_is_refused(change: str) -> None:
    bundle = make()
    with pytest.raises(TypeError, match="would change scores behind the threshold"):
        getattr(bundle, change)()
    assert bundle.cut.dtype == torch.float64


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda m: Bundle(len, Energy(), input_shape=SHAPE), TypeError, "model must be an nn.Mod"),
        (lambda m: Bundle(m, Energy()), ValueError, "input_shape must be given"),
        (lambda m: Bundle(m, {}, input_shape=SHAPE), TypeError, "detectors must be a detector"),
        (lambda m: Bundle(m, {"a": m}, input_shape=SHAPE), TypeError, r"detectors\['a'\] must be"),
        (lambda m: Bundle(m, KNN(3), input_shape=SHAPE), NotFittedError, "fit must come first"),
        (
            lambda m: Bundle(m, Energy(model=network()), input_shape=SHAPE),
            ValueError,
            "the model of energy must be the bundle's",
        ),
        (lambda m: Bundle(m, ODIN(), input_shape=SHAPE), ValueError, "odin runs the model itself"),
        (
            lambda m: Bundle(m, Energy(), groups=GROUPS, input_shape=SHAPE),
            ValueError,
            "groups must be of the model's 10 columns, got 7 classes in 3 groups",
        ),
        (
            lambda m: Bundle(m, Energy(), class_names=["a"], input_shape=SHAPE),
            ValueError,
            "class_names must be 10, one a class, got 1",
        ),
        (
            lambda m: Bundle(m, Energy(), MSP(2.0).calibrate(torch.rand(9)), input_shape=SHAPE),
            ValueError,
            "threshold is of other scores: its detector = 'msp', got 'energy'",
        ),
        (
            lambda m: Bundle(
                m, Energy(), p_values=ConformalPValues([1.0, 2], [0, 1]), input_shape=SHAPE
            ),
            ValueError,
            "by must be 'class' or 'group' for p-values of groups, got None",
        ),
        (
            lambda m: Bundle(
                m,
                Energy(),
                p_values=ConformalPValues([1.0, 2], ["a", "b"]),
                by="class",
                input_shape=SHAPE,
            ),
            ValueError,
            "groups of p_values must be integers 0..9",
        ),
        (
            lambda m: Bundle(nn.Flatten(0), Energy(), input_shape=SHAPE),
            ValueError,
            r"model must give logits \(N, C\)",
        ),
        (lambda m: make(calibrated=False)(X), ValueError, "threshold must be given, or calibrate"),
        (lambda m: make().predict([]), ValueError, "data must give a batch, got none"),
        (lambda m: make().predict(["a"]), TypeError, "a batch must be a tensor"),
    ],
)
def test_refused(make_it: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_it(network())


# --- files ----------------------------------------------------------------------------------------

SCORE = """
import sys, torch
from oodkernels.deploy import Bundle
bundle = Bundle.load(sys.argv[1])
found = bundle(torch.load(sys.argv[2]))
torch.save({k: v for k, v in found._asdict().items() if v is not None}, sys.argv[3])
print(bundle.class_names, bundle.transform)
assert not any("demo" in name for name in sys.modules if name.startswith("oodkernels"))
"""


@pytest.mark.parametrize("as_given", [False, True])
def test_a_transform_of_torchvision_is_kept(as_given: bool, tmp_path: Path) -> None:
    kept = Preprocess(8, (0.5, 0.4, 0.3), (0.25, 0.5, 0.5), 10, "bicubic")
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    bundle = Bundle(model, Energy(), transform=kept if as_given else OnRGB(evaluation(kept)))
    assert bundle.input_shape == (3, 8, 8)
    bundle.save(tmp_path, program=False)
    assert Bundle.load(tmp_path, model).transform == kept


def test_weights_keep_their_layout_which_decides_the_last_digits(tmp_path: Path) -> None:
    model = network().to(memory_format=torch.channels_last)
    bundle = Bundle(model, Energy(), input_shape=SHAPE)
    bundle.calibrate(data().held_out)
    bundle.save(tmp_path)
    loaded = Bundle.load(tmp_path)
    assert equal(loaded(X), bundle(X))
    found, wanted = loaded.model.state_dict(), model.state_dict()
    assert {k: v.stride() for k, v in found.items()} == {k: v.stride() for k, v in wanted.items()}
    assert any(not v.is_contiguous() for v in wanted.values())


def test_a_fresh_process_decides_the_same(tmp_path: Path) -> None:
    bundle = with_names()
    bundle.save(tmp_path / "bundle")
    torch.save(X, tmp_path / "x.pt")
    done = run_code(SCORE, *(str(tmp_path / name) for name in ("bundle", "x.pt", "out.pt")))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    assert found.keys() == set(Decision._fields)
    assert all(torch.equal(found[k], v) for k, v in bundle(X)._asdict().items())
    assert done.stdout.startswith("('A', 'B', 'C', 'D', 'E', 'F', 'G') ToTensor(size=8")


@pytest.mark.parametrize("kind", ["confidence", "layers"])
def test_programs_give_all_that_detectors_read(kind: str, tmp_path: Path) -> None:
    bundle = make(kind)
    bundle.save(tmp_path)
    loaded = Bundle.load(tmp_path)
    assert isinstance(loaded.model, Program)
    assert equal(loaded(X), bundle(X))
    assert loaded.fingerprints() == bundle.fingerprints()
    x = X.clone()
    x[1] = torch.nan
    assert equal(loaded(x), bundle(x))
    assert equal(loaded(X[:1]), bundle(X[:1]))
    loaded.save(tmp_path / "again")
    assert equal(Bundle.load(tmp_path / "again")(X), bundle(X))
    loaded.calibrate(data().held_out, 0.5)
    assert loaded.threshold.value > bundle.threshold.value


def test_a_folder_without_program_takes_a_model(tmp_path: Path) -> None:
    bundle = make("mos", transform=lambda image: image)
    bundle.save(tmp_path, program=False)
    with pytest.raises(ValueError, match="saved with program=False: model must be given"):
        Bundle.load(tmp_path)
    with pytest.raises(ValueError, match=r"Error\(s\) in loading state_dict"):
        Bundle.load(tmp_path, network(3))
    model = network(GROUPS.width)
    for tensor in model.parameters():
        tensor.data.zero_()
    loaded = Bundle.load(tmp_path, model)
    assert loaded.model is model
    assert equal(loaded(X), bundle(X))
    with pytest.raises(ValueError, match="transform could not be kept in a file"):
        loaded.transform(None)
    assert Bundle.load(tmp_path, model, transform=ToTensor(8)).transform == ToTensor(8)


def test_a_model_that_cannot_be_exported_is_said(tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * (1 if float(x.sum()) > 0 else 2)

    model = Stubborn()
    bundle = Bundle(model, Energy(model=model), input_shape=SHAPE)
    with pytest.raises(ValueError, match=r"Bundle.save: torch.export cannot.*program=False"):
        bundle.save(tmp_path)
    assert not any(tmp_path.iterdir())
    bundle.save(tmp_path, program=False)
    assert "energy" in Bundle.load(tmp_path, model).detectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make("knn").save(folder)
    return folder


def test_who_may_read_one_file_may_read_all(folder: Path) -> None:
    assert {file.stat().st_mode for file in folder.iterdir()} == {
        (folder / "bundle.json").stat().st_mode
    }


FILES = ["weights.safetensors", "calibration.safetensors", "detector-0.safetensors", "program.pt2"]


@pytest.mark.parametrize("name", [*FILES, "threshold.json"])
def test_changed_and_missing_files_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must have the digest .*it was changed"):
        Bundle.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "print_"),
    [(FILES[0], "weights"), (FILES[1], "calibration"), (FILES[2], "fit")],
)
def test_content_of_another_bundle_is_refused(
    name: str, print_: str, folder: Path, tmp_path: Path
) -> None:
    other = make("knn", calibrated=False)
    other.model.head.bias.data += 1
    other.detectors["knn"].bank = other.detectors["knn"].bank.flip(0)
    other.calibrate(data().held_out[:100])
    other.save(tmp_path / "other", program=False)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in folder.iterdir():
        source = tmp_path / "other" if file.name == name else folder
        (mixed / file.name).write_bytes((source / file.name).read_bytes())
    manifest = json.loads((mixed / "bundle.json").read_text())
    manifest["files"][name] = file_digest(mixed / name)
    (mixed / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"fingerprints of {print_} must be those of the files"):
        Bundle.load(mixed)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("data/constants/custom_obj_0", b"evil", "must hold tensors and a graph alone"),
        ("data/sample_inputs/model.pt", b"evil", "must hold nothing pickled"),
        (
            "data/weights/model_weights_config.json",
            b'{"config": {"a": {"use_pickle": true}}}',
            "must hold nothing pickled",
        ),
    ],
)
def test_a_program_with_pickles_is_refused(
    member: str, content: bytes, message: str, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (
        zipfile.ZipFile(folder / "program.pt2") as source,
        zipfile.ZipFile(tmp_path / "program.pt2", "w") as target,
    ):
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            if name != f"{root}/{member}":
                target.writestr(name, source.read(name))
        target.writestr(f"{root}/{member}", content)
    manifest = json.loads((tmp_path / "bundle.json").read_text())
    manifest["files"]["program.pt2"] = file_digest(tmp_path / "program.pt2")
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"Bundle.load: .*program.pt2: {message}"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{}", "format must be 'oodkernels.bundle'"),
        ("[1", "text must be JSON"),
        ('{"format": "oodkernels.bundle", "version": 1}', "must list the files"),
        (
            '{"format": "oodkernels.bundle", "version": 1, "files": {"../x": "", '
            '"weights.safetensors": "", "calibration.safetensors": ""}}',
            r"\.\./x is missing",
        ),
    ],
)
def test_other_manifests_are_refused(manifest: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder with bundle\.json"):
        Bundle.load(tmp_path)
    (tmp_path / "bundle.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        Bundle.load(tmp_path)
