"""Every expected failure is a line that names file and cure; output that is never cut."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_code

pytest.importorskip("typer")

from rich.errors import MarkupError
from test_cli import oodk, plain

from oodk._output import print_json, print_table


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    for name, scale in (("id", 3), ("far", 1)):
        logits = (scale * rng.normal(size=(60, 5))).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", logits)
    return {path.stem: path for path in tmp_path.iterdir()}


def bomb(message: str) -> Exception:
    return pytest.importorskip("PIL.Image").DecompressionBombError(message)


def cut_off(message: str) -> Exception:
    return pytest.importorskip("safetensors").SafetensorError(message)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (pickle.UnpicklingError, "UnpicklingError: what: it holds more than tensors"),
        (KeyError, "KeyError: 'what'; OODK_TRACEBACK=1 shows where"),
        (IndexError, "IndexError: what; OODK_TRACEBACK=1 shows where"),
        (zipfile.BadZipFile, "BadZipFile: what"),
        (MemoryError, "MemoryError: what: less at once needs less memory"),
        (RecursionError, "what"),
        (ZeroDivisionError, "ZeroDivisionError: what"),
        (MarkupError, "MarkupError: what"),
        (bomb, "DecompressionBombError: what: make the image smaller"),
        (cut_off, "SafetensorError: what: write the file anew"),
    ],
)
def test_whatever_a_dependency_raises_is_a_line(
    data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[str], Exception],
    said: str,
) -> None:
    raised = error("what")

    def fail(*args: object, **more: object) -> None:
        raise raised

    monkeypatch.setattr("oodkernels.evaluation.evaluate", fail)
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--quiet")
    assert found.exit_code == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"oodk eval: cannot evaluate {data['id']}: {said}")
    monkeypatch.setenv("OODK_TRACEBACK", "1")
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--quiet")
    assert found.exception is raised


@pytest.mark.parametrize("name", ["svhn[test]", "[", "[red]x[-red]", "a,b"])
def test_names_are_shown_as_they_are(data: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.npy"
    path.write_bytes(data["far"].read_bytes())
    found = oodk("eval", "--id", data["id"], "--ood", path, "--name", "[bold]m")
    assert found.exit_code == 0, found.output
    assert f" {name} " in f" {plain(found)} "
    assert "[bold]m" in found.stdout
    found = oodk("eval", "--id", data["id"], "--ood", f"x={tmp_path / '[b].npy'}")
    assert found.exit_code == 2
    assert "[b].npy" in plain(found)


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes")
def test_a_file_name_that_is_not_utf_8(data: dict[str, Path], tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.npy"
    with open(path, "wb") as file:
        file.write(data["far"].read_bytes())
    out = tmp_path / "run"
    found = oodk("eval", "--id", data["id"], "--ood", os.fsdecode(path), "--out", out)
    assert found.exit_code == 0, found.output
    assert "caf\\udce9" in found.stdout
    assert len(list(out.iterdir())) == 6
    found = oodk("score", "--data", os.fsdecode(path) + "x", "-d", "msp")
    assert found.exit_code == 2
    assert "Traceback" not in found.output


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_report_does_not_depend_on_a_notebooks_backend(
    data: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    arguments = ["eval", "--id", str(data["id"]), "--ood", str(data["far"])]
    arguments += ["--out", str(tmp_path / "run")]
    code = f"import sys; sys.argv = ['oodk', *{arguments!r}]; from oodk import main; main()"
    found = run_code(code, MPLBACKEND=backend)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_leaves_table_and_results(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("oodkernels.evaluation.report.histograms", fail)
    out = tmp_path / "run"
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--out", out, "--quiet")
    assert found.exit_code == 1
    assert f"oodk eval: cannot draw the report in {out}: no picture" in found.stderr
    assert "AUROC" in found.stdout
    names = ["config.toml", *(f"results.{suffix}" for suffix in ("csv", "json", "md", "tex"))]
    assert sorted(path.name for path in out.iterdir()) == names


def test_nan_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "best": [float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "best": ["inf"]}


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d\d", text)


def test_off_a_terminal_a_table_is_as_wide_as_it_needs(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a model with a very long name indeed, " * 3
    given = ("--id", data["id"], "--ood", f"{'set ' * 20}={data['far']}", "--name", name)
    found = oodk("eval", *given, "--json", "--quiet")
    rows = json.loads(found.stdout)["results"]
    shown = oodk("eval", *given, "--quiet").stdout
    assert name.strip() in shown
    expected = [f"{100 * row[k]:.2f}" for row in rows for k in ("fpr95", "auroc", "aupr_in")]
    assert sorted(set(expected)) == sorted(set(expected) & set(numbers(shown)))
    assert "…" not in shown


def test_on_a_narrow_terminal_numbers_are_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    row = ["a long name of a set", "a long name of a model", "12.34", "56.78", "99.99"]
    print_table(["set", "model", "acc.", "FPR95", "AUROC"], [row], numbers=3)
    shown = capsys.readouterr().out
    assert numbers(shown) == ["12.34", "56.78", "99.99"]
    assert "…" not in shown
    assert "long name" in shown


def test_warnings_are_lines(data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warn(*args: object, **more: object) -> None:
        warnings.warn("mind\nthe gap", stacklevel=2)
        raise ValueError("the end")

    monkeypatch.setattr("oodkernels.evaluation.evaluate", warn)
    found = oodk("eval", "--id", data["id"], "--ood", data["far"], "--quiet")
    assert found.stderr.splitlines()[0] == "oodk: warning: mind the gap"


def test_training_that_diverges_is_a_line(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    np.savez(tmp_path / "x.npz", features=features, labels=np.arange(60) % 3)
    given = ("--data", tmp_path / "x.npz", "--accelerator", "cpu", "--quiet", "--json")
    found = oodk("train", *given, "--out", tmp_path / "run", "--lr", "1e30", "--epochs", 30)
    assert found.exit_code == 1
    assert "Traceback" not in found.output
    (line,) = [line for line in found.stderr.splitlines() if not line.startswith("oodk: warning")]
    assert line.startswith("oodk train: ")
    assert "lr" in line or "learning rate" in line


def test_a_file_of_objects_is_a_line(data: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"x": Path("x")}, tmp_path / "x.pt")
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    for name in ("x.pt", "y.safetensors"):
        found = oodk("eval", "--id", tmp_path / name, "--ood", data["far"], "--quiet")
        assert found.exit_code == 1
        (line,) = found.stderr.splitlines()
        assert line.startswith("oodk eval: ")
        assert name in line


def test_progress_shows_names_as_they_are(data: dict[str, Path]) -> None:
    found = oodk("eval", "--id", data["id"], "--ood", f"a[red]b={data['far']}")
    assert "a[red]b" in found.stderr
