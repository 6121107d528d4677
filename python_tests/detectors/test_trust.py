"""Thresholds of other scores, absent columns, NumPy scalars, files with other tensors, options."""

from __future__ import annotations

import json
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodkernels import Groups, Threshold
from oodkernels.detectors import (
    DETECTORS,
    KNN,
    MOS,
    MSP,
    ODIN,
    AbnormalityModule,
    AbsentClass,
    Energy,
    Entropy,
    Mahalanobis,
    MaxLogit,
    MOSLogOdds,
    OODDetector,
    register,
    score_all,
)

GROUPS = Groups.from_labels(["b", "a", "b", "c", "a", "b", "c"])
OTHER_GROUPS = Groups.from_labels(["a", "a", "b", "c", "a", "b", "c"])


def logits(n: int = 60, columns: int = 10, seed: int = 0) -> Tensor:
    return 5 * torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))


def linear(seed: int = 0) -> nn.Module:
    model = nn.Linear(10, 5, bias=False)
    model.weight.data = logits(5, 10, seed)
    return model.eval()


# --- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibrated", "other", "message"),
    [
        (MOSLogOdds(GROUPS), Energy(), "detector = 'mos-log-odds', got 'energy'"),
        (MSP(2.0), MSP(), "temperature = 2.0, got 1.0"),
        (MSP(absent=9), MSP(), "absent = 9, got None"),
        (MOS(GROUPS), MOS(OTHER_GROUPS), "groups = "),
        (Energy(model=linear()), Energy(model=linear(1)), "model = "),
        (
            KNN(3).fit(features=logits()),
            KNN(3, model=linear()).fit(features=logits(seed=1)),
            "model = ",
        ),
    ],
    ids=lambda x: x.name if isinstance(x, OODDetector) else None,
)
def test_a_threshold_of_other_scores_is_refused(
    calibrated: OODDetector, other: OODDetector, message: str
) -> None:
    threshold = calibrated.calibrate(torch.randn(100))
    other.threshold = threshold
    with pytest.raises(ValueError, match=rf"{type(other).__name__}.predict: threshold .*{message}"):
        other.predict(logits=logits(), features=logits())
    other.threshold = Threshold.calibrate(torch.randn(100))  # of which the user says it is right
    assert len(other.predict(logits=logits(), features=logits()).is_ood) == 60


def test_a_setting_that_changes_leaves_the_threshold_behind() -> None:
    detector = Energy(2.0)
    detector.calibrate(detector.score(logits=logits()))
    detector.predict(logits=logits())
    detector.temperature = 3.0
    with pytest.raises(ValueError, match=r"Energy.predict: .*temperature = 2.0, got 3.0"):
        detector.predict(logits=logits())


def test_a_file_with_a_threshold_knows_its_model(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    detector = Energy(model=linear())
    detector.calibrate(detector.score(logits()))
    detector.save(tmp_path / "file")
    again = Energy.load(tmp_path / "file", linear())
    assert torch.equal(again.predict(logits()).is_ood, detector.predict(logits()).is_ood)
    assert len(Energy.load(tmp_path / "file").predict(logits=logits(60, 5)).is_ood) == 60
    with pytest.raises(ValueError, match=r"Energy.load: .*file: threshold: .* model = "):
        Energy.load(tmp_path / "file", linear(1))


def test_weights_of_layers_leave_the_threshold_behind() -> None:
    pytest.importorskip("sklearn")
    x, y = logits(), torch.arange(60) % 3
    detector = Mahalanobis(["a"], shrinkage=0.5).fit(features={"a": x}, labels=y)
    detector.calibrate(detector.score(features={"a": x}))
    detector.fit_weights(features={"a": x}, labels=y.where(y > 0, -1))
    assert detector.threshold is None


def test_a_threshold_that_rejects_nothing_warns() -> None:
    z = torch.zeros(50, GROUPS.width)
    z[:, GROUPS.offsets[:-1]] = torch.linspace(20, 40, 50)[:, None]
    detector = MOS(GROUPS)
    with pytest.warns(UserWarning, match=r"MOS.calibrate: no score can be below .*mos-log-odds"):
        detector.calibrate(detector.score(logits=z))
    odds = MOSLogOdds(GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odds.calibrate(odds.score(logits=z))
        detector.calibrate(detector.score(logits=logits(columns=GROUPS.width)))


# --- an absent column -----------------------------------------------------------------------------

FLAT: list[Callable[..., OODDetector]] = [MSP, MaxLogit, Energy, Entropy]


class Head(nn.Module):
    """Tells which of its columns is no class."""

    def __init__(self, absent: Any) -> None:
        super().__init__()
        self.absent_column = absent

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("column", [9, 0, 4, -1])
@pytest.mark.parametrize("make", FLAT)
def test_scores_and_labels_leave_the_absent_column_out(
    make: Callable[..., OODDetector], column: int
) -> None:
    z = logits()
    z[:, column] += 20  # or nothing would notice
    rest = torch.cat([z[:, : column % 10], z[:, column % 10 + 1 :]], 1)
    expected = make().score(logits=rest)
    said, known = make(absent=column), make(model=Head(column % 10))
    torch.testing.assert_close(said.score(logits=z), expected)
    torch.testing.assert_close(known.score(z), expected)
    for detector, given in ((said, {"logits": z}), (known, {"x": z})):
        detector.calibrate(expected)
        assert torch.equal(detector.predict(**given).label, rest.argmax(1))
    assert not torch.equal(make(model=Head(True)).score(z), expected)  # tells no column


def test_all_detectors_of_a_head_agree_on_its_absent_column() -> None:
    z = logits()
    head = Head(9)
    detectors = {"msp": MSP(model=head), "absent": AbsentClass(model=head)}
    for names in (["msp"], ["msp", "absent"]):
        scores = score_all({name: detectors[name] for name in names}, x=z)
        assert torch.equal(scores["msp"], MSP().score(logits=z[:, :9]))
    assert torch.equal(scores["absent"], AbsentClass().score(logits=z))
    assert torch.equal(score_all(detectors, logits=z)["msp"], scores["msp"])  # by keyword, too
    flat = {**detectors, "flat": MSP()}
    assert torch.equal(score_all(flat, logits=z)["flat"], MSP().score(logits=z))
    with pytest.raises(ValueError, match="absent must be one of several columns of logits, got 9"):
        MSP(model=head).score(logits=z[:, :9])
    first = torch.cat([z[:, -1:], z[:, :-1]], 1)
    torch.testing.assert_close(AbsentClass(model=Head(0)).score(first), scores["absent"])
    torch.testing.assert_close(AbsentClass(absent=0).score(logits=first), scores["absent"])


def test_a_head_tells_its_column_and_its_layer() -> None:
    from oodkernels.detectors import GradNorm, extract
    from oodkernels.nn import Head as FeatureHead

    head = FeatureHead(10, 6, absent=True, hidden=[4], confidence=True)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    x = logits()
    outputs = extract(head, x)
    assert outputs.absent == 5
    z, hidden = outputs.logits, outputs.features
    torch.testing.assert_close(z, head.linear(hidden))
    torch.testing.assert_close(MSP(model=head).score(x), MSP().score(logits=z[:, :5]))
    expected = GradNorm().score(features=hidden, logits=z[:, :5])
    torch.testing.assert_close(GradNorm(model=head).score(x), expected)


def test_odin_leaves_the_absent_column_out() -> None:
    x, w = logits(), logits(6, 10)
    whole, classes = nn.Linear(10, 6, bias=False), nn.Linear(10, 5, bias=False)
    whole.weight.data, classes.weight.data = w, w[:5]
    expected = ODIN(10.0, 0.1, model=classes).score(x)
    torch.testing.assert_close(ODIN(10.0, 0.1, absent=5, model=whole).score(x), expected)
    whole.absent_column = 5
    detector = ODIN(10.0, 0.1, model=whole)
    torch.testing.assert_close(detector.score(x), expected)
    detector.calibrate(expected)
    assert torch.equal(detector.predict(x).label, classes(x).argmax(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: MSP(absent=3, model=Head(9)).score(logits()),
            "MSP.score: absent must be column 9, as the model has it, got 3",
        ),
        (
            lambda: MSP(absent=10).score(logits=logits()),
            "MSP.score: absent must be one of several columns of logits, got 10 for 10 columns",
        ),
        (
            lambda: Energy(absent=-1).score(logits=logits(columns=1)),
            "Energy.score: absent must be one of several columns of logits, got -1 for 1 columns",
        ),
    ],
)
def test_absent_columns_that_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="MSP: absent must be an int, got True"):
        MSP(absent=True)


# --- NumPy scalars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: MSP(np.float32(2.5), absent=np.int64(3)),
        lambda: Energy(np.int32(2)),
        lambda: ODIN(np.float64(10), np.float32(0.1), np.array([0.5, 0.25], np.float32)),
        lambda: ODIN(std=[np.float32(0.5), np.float64(0.25)]),
        lambda: ODIN(std=np.float32(0.5)),
        lambda: MOS(GROUPS, np.True_),
        lambda: KNN(k=np.int64(5)).fit(features=logits()),
        lambda: Mahalanobis(shrinkage=np.float32(0.5), eps=np.float64(0), classes=np.int64(3)).fit(
            features=logits(), labels=torch.arange(60) % 3
        ),
        lambda: Mahalanobis(["a"], axis=np.int64(1), shrinkage=0.5).fit(
            features={"a": logits()[:, :, None]}, labels=torch.arange(60) % 3
        ),
        lambda: Mahalanobis(["a"], axis={"a": np.int64(1)}, shrinkage=0.5).fit(
            features={"a": logits()[:, :, None]}, labels=torch.arange(60) % 3
        ),
    ],
)
def test_numpy_scalars_are_taken_and_kept(make: Callable[[], OODDetector], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    detector = make()
    detector.calibrate(np.random.default_rng(0).normal(size=50), tpr=np.float64(0.9))
    detector.save(tmp_path / "file")
    loaded = OODDetector.load(tmp_path / "file")
    assert repr(loaded) == repr(detector)
    assert "np." not in repr(loaded)
    assert loaded.threshold == detector.threshold


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KNN(5.5), "KNN: k must be an int >= 1, got 5.5"),
        (lambda: KNN(True), "KNN: k must be an int >= 1, got True"),
        (lambda: MSP("2"), "MSP: temperature must be a number, got '2'"),
        (lambda: MSP(True), "MSP: temperature must be a number, got True"),
        (lambda: ODIN(std=["a"]), "ODIN: std must be a number, got 'a'"),
        (lambda: MOS(GROUPS, 1), "MOS: log_odds must be True or False, got 1"),
        (lambda: AbnormalityModule(epochs=(1, 2.5)), "epochs must be an int, got 2.5"),
        (lambda: AbnormalityModule(freeze=2), "freeze must be True or False, got 2"),
        (lambda: AbnormalityModule(seed=0.5), "seed must be an int, got 0.5"),
        (lambda: Mahalanobis(shrinkage="a"), "shrinkage must be a number, got 'a'"),
        (lambda: Mahalanobis(axis=1.5), "axis must be an int, got 1.5"),
    ],
)
def test_other_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --- files ----------------------------------------------------------------------------------------


def fitted_knn() -> OODDetector:
    return KNN(3).fit(features=logits())


def fitted_mahalanobis() -> OODDetector:
    return Mahalanobis(shrinkage=0.5).fit(features=logits(), labels=torch.arange(60) % 3)


def fitted_abnormality() -> OODDetector:
    x = logits(8, 10).reshape(8, 10)
    model = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3))
    noise: Callable[..., Tensor] = lambda x, generator: -x  # noqa: E731
    return AbnormalityModule(epochs=(1, 1), noise=noise, model=model).fit(
        [(x, torch.arange(8) % 3)]
    )


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another number of rows": lambda t: t[:1] if t.dim() else t[None],
    "another width": lambda t: t[..., :-1] if t.dim() else t[None, None],
    "one axis less": lambda t: t.reshape(-1)[0],
    "one axis more": lambda t: t[None, None, None],
    "no rows": lambda t: t.reshape(-1)[:0],
    "bools": lambda t: t > 0,
    "NaN": lambda t: t.double() + torch.nan,
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("make", [fitted_knn, fitted_mahalanobis, fitted_abnormality])
def test_a_file_with_other_tensors_is_one_line(
    make: Callable[[], OODDetector], tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "file"
    make().save(path)
    good = safetensors.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name in good:
        for what, change in CHANGES.items():
            changed = change(good[name]).contiguous()
            if torch.equal(changed, good[name]):
                continue
            safetensors.save_file({**good, name: changed}, path, metadata)
            with pytest.raises(ValueError, match=r"OODDetector.load: .*file: ") as caught:
                OODDetector.load(path)
            assert "\n" not in str(caught.value), (name, what)
            assert len(str(caught.value)) < 1000
    for changed_settings in ({"k": "a"}, {"nothing": 1}, {"k": 10**400}, [], None, {"k": {}}):
        content = {**json.loads(metadata["oodkernels"]), "settings": changed_settings}
        safetensors.save_file(good, path, {"oodkernels": json.dumps(content)})
        with pytest.raises(ValueError, match=r"OODDetector.load: .*file: "):
            OODDetector.load(path)


def test_a_bank_is_as_large_as_k(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    fitted_knn().save(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        metadata, bank = file.metadata(), file.get_tensor("bank")
    safetensors.save_file({"bank": bank[:2].clone()}, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match=r"bank must have at least k = 3 rows, got 2"):
        KNN.load(tmp_path / "file")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("", "a folder"), ("pipe", "a pipe or a device")):
        with pytest.raises(ValueError, match=f"must be a file, got {kind}"):
            MSP.load(tmp_path / name)


# --- registry -------------------------------------------------------------------------------------


def test_a_row_has_what_commands_and_docs_need() -> None:
    for name, detector in DETECTORS.items():
        spec = detector.spec
        assert (spec.name, spec.detector) == (name, detector)
        assert spec.paper[-4:].isdigit()
        assert spec.summary.endswith(".")
        assert (spec.needs, spec.trained_on) == (detector.needs, detector.trained_on)
        for option in spec.options.values():
            assert f"{option.name}:" in detector.__doc__ or "Arguments as for" in detector.__doc__
    assert list(KNN.spec.options) == ["k", "backend"]
    assert KNN.spec.options["k"].default == 50
    types = {o.name: o.type_name for o in Mahalanobis.spec.options.values()}
    assert types["shrinkage"] == "float | None"
    assert types["layers"] == "Sequence[str]"


def test_options_are_read_from_text() -> None:
    made = KNN.spec.make("x", {"k": "10", "backend": "torch"})
    assert (made.k, made.backend) == (10, "torch")
    made = ODIN.spec.make("x", {"std": "0.5+0.25", "eps": "1e-3", "absent": "-1"})
    assert (made.std, made.eps, made.absent) == ([0.5, 0.25], 1e-3, -1)
    assert ODIN.spec.make("x", {"std": "0.5"}).std == 0.5
    assert ODIN.spec.make("x", {"std": "none"}).std is None
    made = Mahalanobis.spec.make("x", {"layers": "block.1+block.2", "axis": "-1"})
    assert (made.layers, made.axis) == (("block.1", "block.2"), -1)
    model = linear()
    made = MOS.spec.make("x", {"log_odds": "true"}, groups=GROUPS, model=model)
    assert (made.groups, made.log_odds, made.model) == (GROUPS, True, model)
    assert AbnormalityModule.spec.make("x", {"epochs": "3+2"}).epochs == (3, 2)
    for spec, options, message in (
        (KNN.spec, {"k": "ten"}, "x: k must be int, got 'ten'"),
        (KNN.spec, {"backend": "annoy"}, r"x: backend must be Literal\['native', 'faiss', 'torch'"),
        (KNN.spec, {"n": "3"}, "x: knn has no option 'n', only k, backend"),
        (MOS.spec, {}, "x: detector 'mos' needs groups"),
        (AbnormalityModule.spec, {"noise": "much"}, "x: noise must be Callable"),
    ):
        with pytest.raises(ValueError, match=message):
            spec.make("x", options)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="name must be a new one, got 'msp'"):
        register("msp", "A", "Nobody, 2000")
    with pytest.raises(ValueError, match="family must be one of A, B, C, D, E, F, got 'Z'"):
        register("new", "Z", "Nobody, 2000")


def test_the_docs_have_the_registry() -> None:
    root = Path(__file__).parents[2]
    namespace = runpy.run_path(str(root / "scripts" / "detectors_table.py"))
    text = namespace["PAGE"].read_text(encoding="utf-8")
    assert text == namespace["page"](text), "run scripts/detectors_table.py"
