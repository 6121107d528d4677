"""Programs and ONNX give what the bundle gives; a compiled library does in the demo's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import KINDS, SHAPE, data, make, network
from torch import Tensor

from oodkernels.deploy import Bundle, exports
from oodkernels.deploy.exports import decompose, nodes_of
from oodkernels.detectors import MSP, ODIN

X = data().new
SLOW_KINDS = [pytest.param(kind, marks=() if kind == "mos" else pytest.mark.slow) for kind in KINDS]


def calibrated(kind: str) -> Bundle:
    bundle = make(kind, calibrated=False)
    bundle.calibrate(data().held_out, by="group" if kind == "mos" else None)
    return bundle


def fields(bundle: Bundle, x: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in bundle(x)._asdict().items() if v is not None}


def batches() -> list[Tensor]:
    """Of several sizes, one with a NaN."""
    nan = X[:3].clone()
    nan[1, 0, 0, 0] = torch.nan
    return [X, X[:1], nan]


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_a_program_decides_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file, with our ops written out, and as ONNX in Triton's folder."""
    bundle = calibrated(kind)
    program = bundle.export()
    ops = {str(n.target) for n in nodes_of(program) if n.op == "call_function"}
    assert any(op.startswith("oodk.") for op in ops)  # fused, as in eager mode
    torch.export.save(program, tmp_path / "bundle.pt2")
    loaded = torch.export.load(tmp_path / "bundle.pt2").module(check_guards=False)
    for x in batches():
        wanted = fields(bundle, x)
        found = loaded(x)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
    plain = decompose(program)
    assert not any("oodk" in str(n.target) for n in nodes_of(plain))
    for x in batches():
        check(bundle, x, plain.module(check_guards=False)(x))
    if kind != "mos":  # of which ONNX makes it all itself
        monkeypatch.setattr(exports, "export_bundle", lambda *args: program)
        monkeypatch.setattr(exports, "decompose", lambda given: plain)
    check_onnx(bundle, tmp_path)


def check(bundle: Bundle, x: Tensor, found: dict[str, Tensor]) -> None:
    """Decisions but for scores in their last digits, and p-values one sample of 120 apart."""
    wanted = fields(bundle, x)
    assert list(found) == list(wanted)
    torch.testing.assert_close(
        found["score"], wanted["score"], rtol=1e-4, atol=1e-4, equal_nan=True
    )
    apart = (wanted["score"].double() - bundle.cut).abs() > 1e-3
    for name in found.keys() - {"score", "p_value", "is_ood"}:
        assert torch.equal(found[name], wanted[name])
    assert torch.equal(found["is_ood"][apart], wanted["is_ood"][apart])
    assert apart.any() or len(x) == 1
    least = min(bundle.p_value_info["counts"].values())
    assert (found["p_value"] - wanted["p_value"]).abs().max() < 1.5 / (least + 1)


def check_onnx(bundle: Bundle, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    folder = bundle.to_triton(tmp_path, "ood", max_batch=8)
    session = runtime.InferenceSession(folder / "1" / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    for x in batches():
        found = session.run(None, {"x": x.numpy()})
        check(bundle, x, dict(zip(names, map(torch.from_numpy, found), strict=True)))
    config = (folder / "config.pbtxt").read_text()
    assert 'name: "ood"\nbackend: "onnxruntime"\nmax_batch_size: 8\n' in config
    assert 'name: "x" data_type: TYPE_FP32 dims: [ 1, 8, 8 ]' in config
    for name, array in zip(names, found, strict=True):
        kinds = {"f": "FP", "i": "INT", "b": "BOOL"}
        size = "" if array.dtype == np.bool_ else str(8 * array.dtype.itemsize)
        wanted = f'name: "{name}" data_type: TYPE_{kinds[array.dtype.kind]}{size} dims: [ 1 ]'
        assert wanted in config


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    model = network()
    bundle = Bundle(model, ODIN(model=model), input_shape=SHAPE)
    with pytest.raises(ValueError, match="threshold must be given"):
        bundle.export()
    bundle.calibrate(data().held_out)
    with pytest.raises(ValueError, match=r"Bundle\.export: odin takes gradients of the model"):
        bundle.export()
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got 'a'"):
        bundle.compile_to("a")
    with pytest.raises(ValueError, match=r"path must end in \.onnx, got 'a'"):
        bundle.to_onnx("a")
    with pytest.raises(ValueError, match=r"name must be letters.*got '\.\./a'"):
        bundle.to_triton(tmp_path, "../a")
    plain = Bundle(model, MSP(model=model), input_shape=SHAPE)
    with pytest.raises(ValueError, match="max_batch must be an int >= 1, got 0"):
        plain.to_triton(tmp_path, max_batch=0)
