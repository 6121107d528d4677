"""What strangers' files look like: read as they are meant, or refused with their place."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_code

from oodkernels.data import FORMATS, ROLES, open_arrays, open_samples, save_arrays
from oodkernels.data.arrays import MAX_ROW_BYTES
from oodkernels.data.formats import csv as csv_format
from oodkernels.data.formats.csv import cell_value, text_cell

# --- columns of tables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # pandas' header of numbers, for logits, scores and labels
        ("0,1,2\n.5,.25,.1\n.1,.2,.3\n", "the first line, '0', '1', '2', may be pandas' numbers"),
        ("0\n.5\n.25\n", "the first line, '0', may be"),
        ("0\n1\n2\n", "the first line, '0', may be"),
        ("7,8,9\n.5,.25,.1\n.1,.2,.3\n", "the first line, '7', '8', '9', may be"),
        # a sample that would be taken for names, an index above names of numbers
        ("a.jpg,.5\nb.jpg,.25\n", "names or numbers, got both: 'a.jpg', '.5'"),
        (",0,1\n0,.5,.25\n1,.1,.2\n", "names or numbers, got both: '', '0', '1'"),
        # an index that would be a class
        ("0,.5,.25\n1,.1,.2\n", "column 0 counts the rows"),
        # holes
        ("logits_0,logits_1\n,1\n2,3\n", r"'' in row 0, column 'logits_0', must be a number"),
        ("logits_0,logits_1\n1,2\n2,\n", r"'' in row 1, column 'logits_1', must be a number"),
        ("score\n1\nNA\n", r"'NA' in row 1, column 'score', must be a number"),
        ("1.5,2\n3,\n", r"'' in row 1, column 1, must be a number"),
        ("label\ncat\ndog\n", r"'cat' in row 0, column 'label', must be a number: write class ids"),
        # gaps and the same column twice
        ("logits_0,logits_2\n1,2\n", "of the columns logits number 1 is missing before 'logits_2'"),
        ("logits_2,logits_3\n1,2\n", "of the columns logits number 1 is missing before 'logits_2'"),
        ("logits_1,logits_01\n1,2\n", "'logits_1' and 'logits_01' are the same column"),
        ("score,score\n1,2\n", "more than one column 'score'"),
        ("logits,logits_0\n1,2\n", "has a column 'logits' beside 'logits_0'"),
        (",score\n5,.5\n6,.25\n", "column 0 has no name, and is no index"),
        # rows of unequal width
        ("score,energy\n1,2\n1,2,3\n", "row 1 must have 2 cells, as the first line, got 3"),
        ("logits_0,logits_1\n1.5,2\n1\n", "row 1 must have 2 cells, as the first line, got 1"),
        # decimal commas
        ("id;score\n1;0,5\n2;0,7\n", "'0,5' in row 0, column 'score', .*: write a decimal point"),
        ("score\n0,5\n0,7\n", "row 0 must have 1 cells, as the first line, got 2"),
        ("id,score\n1,0,5\n2,0,7\n", "row 0 must have 2 cells, as the first line, got 3"),
        ("0,5;0,3\n0,1;0,2\n", "separated by ',' and ';'"),
        ("0,5\n0,7\n", "may be one with a decimal comma"),
        ("0,5\t0,3\n0,1\t0,2\n", "separated by ',' and '"),
        # no table
        ('score\n"1\n2\n', "a quoted cell does not end"),
        ("score\n", "has no rows but the first"),
    ],
)
def test_a_table_that_would_be_guessed_at_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        open_samples(path)
    assert "x.csv" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,score\na.jpg,.5\nb.jpg,.25\n", {"scores": [0.5, 0.25]}),
        (",energy\n0,.5\n1,.25\n", {"scores": [0.5, 0.25]}),  # pandas' index
        ("logits_1,logits_0\n1,2\n3,4\n", {"logits": [[2, 1], [4, 3]]}),
        ("\ufefflogits_1;logits_2\r\n1;2\r\n\r\n3;4\r\n", {"logits": [[1, 2], [3, 4]]}),
        ("score\tlabel\n.5\t3\n.25\t-1\n", {"scores": [0.5, 0.25], "labels": [3, -1]}),
        ('"a,\nb",score\n"x\n\ny",.5\n"",.25\n', {"scores": [0.5, 0.25]}),
        ("2\n0\n1\n", {"scores": [2, 0, 1]}),
    ],
)
def test_a_table_that_is_certain_is_read(
    tmp_path: Path, text: str, expected: dict[str, list[float]]
) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    samples = open_samples(tmp_path / "x.csv")
    assert {role: samples.read(role).tolist() for role in samples.arrays} == expected


def test_blank_lines_do_not_end_a_table(tmp_path: Path) -> None:
    """Wherever they fall between two chunks."""
    lines = ["score", "1", "2", "", "", "", "3", "", "4", ""]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    for rows in (1, 2, 3, 4, 5):
        batches = open_samples(tmp_path / "x.csv").batches(rows)
        assert torch.cat([batch["scores"] for batch in batches]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,0.5,1", "'x' in row 1500, column 'logits_0', must be a number"),
        ("1,,1", "'' in row 1500, column 'logits_1', must be a number"),
        ("1,0.5", "row 1500 must have 3 cells, as the first line, got 2"),
        ("1,0.5,1,2", "row 1500 must have 3 cells, as the first line, got 4"),
        ("1,0.5,1.5", "'1.5' in row 1500, column 'label', must be an integer"),
        ("1,0.5,99999999999999999999", "cannot be read"),
    ],
)
def test_rows_after_the_sample_have_to_agree(tmp_path: Path, row: str, message: str) -> None:
    rows = ["logits_0,logits_1,label", *["1,0.5,1"] * 1500, row, "1,0.5,1"]
    (tmp_path / "x.csv").write_text("\n".join(rows) + "\n")
    samples = open_samples(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=message) as raised:
        list(samples.batches(100))
    assert "x.csv" in str(raised.value)


def test_a_column_that_nothing_asks_for_may_have_holes(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("loss,score\n.5,1\n,2\n")
    assert open_samples(tmp_path / "x.csv").read("scores").tolist() == [1, 2]
    with pytest.raises(ValueError, match="'' in row 1, column 'loss', must be a number"):
        open_arrays(tmp_path / "x.csv")["loss"].read()


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s not in (".npy",)])
def test_two_names_of_one_thing_are_refused(tmp_path: Path, suffix: str) -> None:
    x = torch.tensor([0.5, 0.25])
    save_arrays(path := tmp_path / f"x{suffix}", {"score": x, "confidence": 2 * x})
    with pytest.raises(ValueError, match="score and confidence, any of which may be the scores"):
        open_samples(path)
    samples = open_samples(path, columns={"scores": "confidence"})
    assert samples.read("scores").tolist() == [1, 0.5]


def test_two_files_of_a_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train", "val"):
        save_arrays(tmp_path / f"{name}.safetensors", {"logits": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"logits twice, in train\.safetensors and val\.safet"):
        open_samples(tmp_path)


def test_columns_of_parquet_are_known_by_their_names(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def opened(**columns: object) -> dict[str, list[float]]:
        parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
        samples = open_samples(tmp_path / "x.parquet")
        return {role: samples.read(role).tolist() for role in samples.arrays}

    numbers = {"1": [2.0, 3.0], "0": [0.0, 1.0], "__index_level_0__": [0, 1]}
    assert opened(**numbers) == {"logits": [[0, 2], [1, 3]]}
    mixed = {"logits_0": arrow.array([1.0], arrow.float32()), "logits_1": [1e-300]}
    assert opened(**mixed) == {"logits": [[1, 1e-300]]}
    for columns, message in (
        ({"logits_0": [1.0], "logits_2": [2.0]}, "number 1 is missing before 'logits_2'"),
        ({"score": ["a"]}, "column 'score' must be numbers, got string"),
        ({"logits_0": [1.0], "logits_1": ["a"]}, "column 'logits_1' must be numbers, got string"),
        ({"logits": [[1.0], None]}, "logits must not be null, got null at row 1"),
        ({"logits": [[1.0, 2.0], [1.0, None]]}, "logits must not be null, got null at row 1"),
        ({"logits": [[1.0, 2.0], [1.0]]}, "2 numbers in each row, got 1 at row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(**columns)


def test_an_object_array_that_nothing_asks_for_does_not_matter(tmp_path: Path) -> None:
    paths = np.array(["a.jpg", None], dtype=object)
    np.savez(tmp_path / "x.npz", logits=np.zeros((2, 3)), paths=paths)
    assert open_samples(tmp_path / "x.npz").read("logits").shape == (2, 3)
    np.savez(tmp_path / "y.npz", logits=np.zeros((2, 3)), labels=paths)
    with pytest.raises(ValueError, match=r"y\.npz: labels holds Python objects"):
        open_samples(tmp_path / "y.npz")


# --- what is written --------------------------------------------------------------------------

NAMES = ["a,b", "a\nb", 'a"b', "=1+1", "@x", "+1", "-1", "'=1", "''=1", "ä;b", "\tx", "plain"]


@pytest.mark.parametrize("suffix", [s for s, form in FORMATS.items() if not form.one])
def test_names_come_back_whatever_is_in_them(tmp_path: Path, suffix: str) -> None:
    values = {name: torch.tensor([i, 0.5]) for i, name in enumerate(NAMES)}
    save_arrays(tmp_path / f"x{suffix}", values)
    found = open_arrays(tmp_path / f"x{suffix}")
    assert {name: found[name].read().tolist() for name in found} == {
        name: array.tolist() for name, array in values.items()
    }


def test_no_cell_of_a_written_table_is_a_formula() -> None:
    assert [text_cell(name)[0] for name in NAMES if name[0] in "=@+-\t"] == ["'"] * 5
    assert [cell_value(text_cell(name)) for name in NAMES] == NAMES


# --- files that change, and hostile ones ------------------------------------------------------


def big(path: Path, rows: int) -> Path:
    """A file of many pages."""
    logits = np.random.default_rng(0).normal(size=(rows, 50)).astype(np.float32)
    if path.suffix == ".npy":
        np.save(path, logits)
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        columns = {f"logits_{i}": logits[:, i] for i in range(50)}
        parquet.write_table(arrow.table(columns), path, row_group_size=500)
    elif path.suffix == ".csv":
        names = ",".join(f"logits_{i}" for i in range(50))
        np.savetxt(path, logits, delimiter=",", header=names, comments="")
    else:
        save_arrays(path, {"logits": torch.from_numpy(logits)})
    return path


@pytest.mark.parametrize("suffix", list(FORMATS))
@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, suffix: str, change: str
) -> None:
    path = big(tmp_path / f"x{suffix}", 5000)
    batches = open_samples(path).batches(100)
    next(batches)
    if change == "cut":
        os.truncate(path, 5000)
    else:
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=rf"x\{suffix} changed while it was read"):
        list(batches)
    samples = open_samples(big(path, 5000))
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=rf"x\{suffix} changed while it was read"):
        list(samples)


CUT = """
import os, sys, threading
from pathlib import Path
from oodkernels.data import open_samples

def cut(path: Path, size: int) -> None:
    while not done.is_set():
        os.truncate(path, 8192)
        os.truncate(path, size)

for path in map(Path, sys.argv[1:]):
    content = path.read_bytes()
    refused = 0
    for attempt in range(5):
        path.write_bytes(content)
        samples = open_samples(path)
        done = threading.Event()
        thread = threading.Thread(target=cut, args=(path, len(content)))
        thread.start()
        try:
            list(samples.batches(1 << 20))
        except ValueError as error:
            assert "changed while it was read" in str(error), error
            refused += 1
        done.set()
        thread.join()
    assert refused > 0, path
    print("read", path)
"""


def test_a_file_cut_short_does_not_end_the_process(tmp_path: Path) -> None:
    """As it would if it were mapped into memory, by SIGBUS."""
    paths = [tmp_path / f"x{suffix}" for suffix in (".npy", ".pt", ".safetensors")]
    for path in paths:
        save_arrays(path, {"logits": torch.zeros(1 << 12, 1000)})
    run = run_code(CUT, *map(str, paths))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("read") == 3


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_a_pipe_is_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="must be a file, got a pipe"):
        open_samples(tmp_path / f"x{suffix}")


def test_a_row_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    """A small file of zeros, compressed, whose one row would fill the memory."""
    columns = MAX_ROW_BYTES // 4 + 1
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        form = {"descr": "<f4", "fortran_order": False, "shape": (1, columns)}
        np.lib.format.write_array_header_1_0(header, form)
        with archive.open("logits.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(columns // (1 << 20)):
                file.write(bytes(4 << 20))
            file.write(bytes(4 * (columns % (1 << 20))))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="a row must have at most 256 MiB, got 256 MiB"):
        next(open_samples(tmp_path / "x.npz").batches())


def test_numbers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    x = torch.zeros(1)
    for name, tensor in {
        "rows": x.expand(10**12).reshape(-1, 1),
        "columns": x.expand(2, 10**12),
    }.items():
        torch.save({"logits": tensor}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=r"repeats \d+ numbers as \d+"):
            open_samples(tmp_path / f"{name}.pt")
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)}
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"x\.npy is cut off"):
        open_samples(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"logits": 3}',
        b'{"logits": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}}',
        b'{"logits": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 80]}}',
        b'{"logits": {"dtype": "F32", "shape": [1000000000000, 2], "data_offsets": [0, 8]}}',
        b'{"logits": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]}}',
        b'{"logits": {"dtype": "F3", "shape": [1, 2], "data_offsets": [0, 8]}}',
        b'{"logits": {"dtype": [], "shape": [1, 2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_one_line(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"x\.safetensors") as raised:
        open_samples(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_format, "MAX_RECORD", 1000)
    for text in ("score\n" + "1" * 2000, 'score\n"' + "1\n" * 2000):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match="a row is longer than"):
            open_samples(tmp_path / "x.csv")


def test_strides_of_tensors(tmp_path: Path) -> None:
    """Views that torch saves with the whole of what they are part of."""
    x = torch.randn(7, 6)
    views = {
        "logits": x.t().contiguous().t(),
        "features": x[1:, 1:4][:6].repeat(2, 1)[:7],
        "part": x[1:, 1:4],
        "rows": x[::2],
        "reversed": x.flip(0),
        "three": torch.randn(2, 3, 4).permute(2, 0, 1),
        "none": x[:0],
    }
    torch.save(views, tmp_path / "x.pt")
    found = open_arrays(tmp_path / "x.pt")
    for name, tensor in views.items():
        assert torch.equal(found[name].read(), tensor), name
        if len(tensor):
            assert torch.equal(torch.cat(list(found[name].chunks(2))), tensor), name
    torch.save(torch.randn(2, 3, 4).permute(1, 2, 0), tmp_path / "y.pt")
    with pytest.raises(ValueError, match="save a contiguous copy"):
        open_arrays(tmp_path / "y.pt")


@pytest.mark.parametrize("name", ["n" * 240 + ".npy", "a b,c;[x]=@.npz", "ä\nb.safetensors"])
def test_names_of_files_do_not_matter(tmp_path: Path, name: str) -> None:
    save_arrays(tmp_path / name, {"scores": torch.tensor([1.5, 2])})
    assert open_samples(tmp_path / name).read("scores").tolist() == [1.5, 2]


def test_the_page_about_files_has_what_is_registered() -> None:
    page = (Path(__file__).parents[2] / "docs/files.md").read_text(encoding="utf-8")
    for suffix, form in FORMATS.items():
        needs = f" {form.package}" if form.package else ""
        assert f"| `{suffix}` | {form.holds} |{needs} |\n" in page
    for role, names in ROLES.items():
        shown = ", ".join(f"`{name}`" for name in names)
        assert re.search(rf"\| {role} \| \(N.*\) \| {shown} \|\n", page)
