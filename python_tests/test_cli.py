from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from processes import python

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner, Result

import oodkernels
from oodkernels.cli import app


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


def test_demo_prints_the_table_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    found = oodk("demo", "--out", out, "--epochs", 1, "--seed", 4)
    assert found.exit_code == 0, found.output
    for word in ("FPR95", "AUPR-out", "MOS features", "log-odds", "average"):
        assert word in plain(found)
    for name in ("results.csv", "results.json", "report.html"):
        assert (out / name).stat().st_size > 1000
        assert str(out / name) in found.output
    assert json.loads((out / "results.json").read_text())["settings"]["seed"] == 4


def test_demo_quiet_prints_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodkernels.demo.run", lambda *args: None)
    monkeypatch.setattr("oodkernels.report.write_report", lambda _, out: [out / "a", out / "b"])
    found = oodk("demo", "--out", tmp_path, "--quiet")
    assert found.output.splitlines() == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", 0),
        ("--epochs", "many"),
        ("--groups", 1),
        ("--groups", 11),
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

    monkeypatch.setattr("oodkernels.report.write_report", fail)
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


@pytest.mark.parametrize(("missing", "command"), [("typer", "--version"), ("skimage", "demo")])
def test_missing_extra_is_named_in_one_line(missing: str, command: str) -> None:
    found = python(
        "-c",
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['oodk', {command!r}]\n"
        "from oodkernels.__main__ import main; sys.exit(main())",
    )
    assert found.returncode == 1
    assert found.stderr == (
        f"oodk: {missing} is not installed; to get all that oodk needs: "
        'pip install "oodkernels[demo]"\n'
    )


def test_info_needs_neither_plotting_nor_data() -> None:
    found = python(
        "-c",
        "import sys\n"
        "for name in ('matplotlib', 'sklearn', 'skimage', 'jinja2'): sys.modules[name] = None\n"
        "sys.argv = ['oodk', 'info']\n"
        "from oodkernels.__main__ import main; sys.exit(main())",
    )
    assert found.returncode == 0, found.stderr


def test_other_missing_modules_are_not_hidden() -> None:
    found = python(
        "-c",
        "import sys; sys.modules['oodkernels.cli'] = None\n"
        "from oodkernels.__main__ import main; sys.exit(main())",
    )
    assert found.returncode == 1
    assert "Traceback" in found.stderr
