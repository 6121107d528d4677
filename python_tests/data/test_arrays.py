from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_code
from torch import Tensor

from oodkernels.data import FORMATS, open_arrays, open_samples, save_arrays

pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")

N = 23
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def write(path: Path, arrays: Mapping[str, Tensor]) -> Path:
    """By the formats' own libraries: an independent writer for two dimensions too."""
    numpy = {name: a.numpy() for name, a in arrays.items() if a.dtype != torch.bfloat16}
    if path.suffix == ".npy":
        (array,) = numpy.values()
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **numpy)
    elif path.suffix == ".pt":
        torch.save(dict(arrays), path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(arrays), path)
    else:
        columns: dict[str, np.ndarray] = {}
        for name, array in numpy.items():
            if array.ndim == 1:
                columns[name] = array
            else:
                columns |= {f"{name}_{i}": array[:, i] for i in range(array.shape[1])}
        if path.suffix == ".csv":
            rows = zip(*columns.values(), strict=True)
            lines = [",".join(columns), *(",".join(map(repr, map(item, row))) for row in rows)]
            path.write_text("\n".join(lines) + "\n")
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=5)
    return path


def item(value: np.generic) -> object:
    return value.item()


@pytest.fixture
def arrays() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(N, 11, generator=generator),
        "features": torch.randn(N, 3, generator=generator),
        "score": torch.randn(N, generator=generator),
        "label": torch.arange(N) % 11,
    }


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".csv", ".parquet"])
@pytest.mark.parametrize("rows", [1, 4, 5, N, 100])
def test_every_format_gives_back_what_was_written(
    tmp_path: Path, arrays: dict[str, Tensor], suffix: str, rows: int
) -> None:
    samples = open_samples(write(tmp_path / f"data{suffix}", arrays))
    assert set(samples.arrays) == {"logits", "features", "scores", "labels"}
    assert samples.num_samples in (N, None)
    batches = list(samples.batches(rows))
    assert [len(batch["labels"]) for batch in batches] == [
        min(rows, N - start) for start in range(0, N, rows)
    ]
    names = {"scores": "score", "labels": "label"}
    for role in samples.arrays:
        read = torch.cat([batch[role] for batch in batches])
        expected = arrays[names.get(role, role)]
        assert torch.equal(read, expected.to(read.dtype))
        assert torch.equal(samples.read(role), read)
        assert read.dtype == (torch.int64 if role == "labels" else read.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_types_are_kept(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and suffix in (".npy", ".npz"):
        pytest.skip("NumPy has no bfloat16")
    logits = torch.randn(N, 4).to(dtype)
    samples = open_samples(write(tmp_path / f"x{suffix}", {"logits": logits}))
    assert samples["logits"].dtype == dtype
    assert samples["logits"].shape == (N, 4)
    assert torch.equal(samples.read("logits"), logits)


def test_npy_in_any_order_and_any_endianness(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    for name, array in {"c": x, "f": np.asfortranarray(x), "big": x.astype(">f4")}.items():
        np.save(tmp_path / f"{name}.npy", array)
        np.savez(tmp_path / f"{name}.npz", logits=array)
        for suffix in (".npy", ".npz"):
            samples = open_samples(tmp_path / f"{name}{suffix}")
            read = torch.cat([batch["logits"] for batch in samples.batches(4)])
            np.testing.assert_array_equal(read.numpy(), x)


def test_a_lone_array_is_what_its_dimensions_or_kind_say(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    np.savez(tmp_path / "arr_0.npz", np.zeros((3, 4), np.float32))
    assert set(open_samples(tmp_path / "wide.npy").arrays) == {"logits"}
    assert set(open_samples(tmp_path / "arr_0.npz").arrays) == {"logits"}
    assert set(open_samples(tmp_path / "wide.npy", kind="features").arrays) == {"features"}
    assert set(open_samples(tmp_path / "flat.npy").arrays) == {"scores"}


def test_labels_from_another_file_must_be_as_many(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "y.npy", np.array([2, 0, 1]))
    samples = open_samples(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    assert samples.read("labels").tolist() == [2, 0, 1]
    np.save(tmp_path / "y.npy", np.array([2, 0]))
    with pytest.raises(ValueError, match=r"3 in .*x\.npy, 2 in .*y\.npy"):
        open_samples(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    (tmp_path / "y.csv").write_text("label\n1\n0\n")  # as long as it is read only
    with pytest.raises(ValueError, match="must have equally many samples"):
        list(open_samples(tmp_path / "x.npy", labels=tmp_path / "y.csv"))


def test_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("path;energy;msp\na.jpg;1.5;1\nb.jpg;-2;0\n")
    assert set(open_arrays(path)) == {"energy", "msp"}
    samples = open_samples(path, columns={"scores": "energy"})
    assert samples.read("scores").tolist() == [1.5, -2]
    with pytest.raises(ValueError, match=r"has no column 'mos', only energy, msp"):
        open_samples(path, columns={"scores": "mos"})
    assert set(open_samples(path).arrays) == {"energy"}  # msp is made of integers
    path.write_text("path;energy;msp\na.jpg;1.5;1\nb.jpg;-2;0.5\n")
    samples = open_samples(path)
    assert {name: samples.read(name).tolist() for name in samples.arrays} == {
        "energy": [1.5, -2],
        "msp": [1, 0.5],
    }
    (tmp_path / "n.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must hold logits, features or scores, got a, b"):
        open_samples(tmp_path / "n.csv")


def test_csv_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("1.5\n2\n")
    (tmp_path / "two.csv").write_text("1.5,2\n3,4\n")
    assert open_samples(tmp_path / "one.csv").read("scores").tolist() == [1.5, 2]
    assert open_samples(tmp_path / "two.csv").read("logits").tolist() == [[1.5, 2], [3, 4]]


def test_parquet_of_lists(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    x = np.arange(12.0).reshape(4, 3)
    for kind in (pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.float32(), 3)):
        table = pyarrow.table({"logits": pyarrow.array(x.tolist(), kind), "label": [0, 1, 2, 0]})
        parquet.write_table(table, tmp_path / "x.parquet", row_group_size=3)
        samples = open_samples(tmp_path / "x.parquet")
        read = torch.cat([batch["logits"] for batch in samples.batches(2)])
        np.testing.assert_array_equal(read.numpy(), x)
    table = pyarrow.table({"logits": [[1.0, 2.0], [3.0]]})
    parquet.write_table(table, tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match="logits must have 2 numbers in each row"):
        open_samples(tmp_path / "ragged.parquet").read("logits")
    table = pyarrow.table({"score": [1.0, None, 3.0]})
    parquet.write_table(table, tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="score must not be null, got null at row 1"):
        open_samples(tmp_path / "null.parquet").read("scores")


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((2, 3), np.int64), TypeError, "logits must be floating-point, got torch.int64"),
        (np.zeros((2, 3, 4)), ValueError, r"scores must be \(N,\), got \(2, 3, 4\)"),
        (np.zeros((2, 3), np.complex64), TypeError, "floating-point|numbers"),
        (np.zeros(2, bool), TypeError, "scores must be numbers, got torch.bool"),
        (np.zeros((0, 3)), ValueError, r"logits must not be empty, got \(0, 3\)"),
        (np.array(["a", "b"]), ValueError, "must hold an array of numbers"),
        (np.array(3.0), ValueError, "must hold an array of numbers"),
    ],
)
def test_wrong_arrays_are_refused(
    tmp_path: Path, array: np.ndarray, error: type[Exception], message: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=message) as raised:
        open_samples(tmp_path / "x.npy")
    assert "x.npy" in str(raised.value)


def test_labels_must_be_integers(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", logits=np.zeros((2, 3)), labels=np.zeros(2))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float64"):
        open_samples(tmp_path / "x.npz")


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("unpickled"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("pickled.npy", "wb") as file:
        pickle.dump(_Bomb(), file)
    np.save("object.npy", np.array([_Bomb()], dtype=object), allow_pickle=True)
    np.savez("object.npz", logits=np.array([_Bomb()], dtype=object))
    torch.save(_Bomb(), "bomb.pt")
    for name in ("pickled.npy", "object.npy", "object.npz", "bomb.pt"):
        with pytest.raises(ValueError, match="not loaded") as raised:
            open_samples(name)
        assert name in str(raised.value)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("suffix", [".npy", *(s for s in FORMATS if s not in (".npy", ".csv"))])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.97])
def test_a_truncated_file_is_a_clear_error(tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(tmp_path / f"x{suffix}", {"logits": torch.randn(500, 7)})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"x\.") as raised:
        open_samples(path).read("logits")
    assert str(path) in str(raised.value)


def test_damage_inside_a_compressed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, logits=np.random.default_rng(0).normal(size=(500, 7)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz cannot be read"):
        open_samples(path).read("logits")


def test_bad_cells_of_a_csv_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("score\n1\n2\nthree\n")
    with pytest.raises(ValueError, match=r"x\.csv.*three.*row 2"):
        open_samples(tmp_path / "x.csv").read("scores")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty\.csv is empty"):
        open_samples(tmp_path / "empty.csv")


def test_missing_files_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_samples(tmp_path / "none.npy")
    (tmp_path / "x.txt").write_text("1")
    with pytest.raises(ValueError, match=r"x\.txt must end in \.npy, "):
        open_samples(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="it has none"):
        open_samples(tmp_path)


def test_a_folder_of_arrays(tmp_path: Path, arrays: dict[str, Tensor]) -> None:
    for name in ("logits", "features", "label"):
        np.save(tmp_path / f"{name}.npy", arrays[name].numpy())
    samples = open_samples(tmp_path)
    assert set(samples.arrays) == {"logits", "features", "labels"}
    assert torch.equal(samples.read("features"), arrays["features"])


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_saved_scores_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    score = torch.tensor([0.1, -1e-20, 3e30, torch.inf])
    saved = {"score": score}
    if suffix != ".npy":
        saved["is_ood"] = torch.tensor([0, 1, 0, 1])
    save_arrays(path, saved)
    read = open_samples(path).read("scores")
    assert torch.equal(read.to(score.dtype), score)
    if suffix != ".npy":
        assert open_arrays(path)["is_ood"].read().tolist() == [0, 1, 0, 1]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    two = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"\.npy holds one array"):
        save_arrays(tmp_path / "x.npy", two)
    with pytest.raises(ValueError, match="one dimension"):
        save_arrays(tmp_path / "x.csv", {"a": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="must end in"):
        save_arrays(tmp_path / "x.txt", two)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import re, sys
from pathlib import Path
from oodkernels.data.samples import open_samples
from oodkernels.evaluation import evaluate

def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\\s*(\\d+) kB", status)[1]) >> 10

def grown(run):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before

for path in sys.argv[1:]:
    samples = open_samples(path)
    few = next(iter(samples.batches(1000)))["logits"].float()
    evaluate(None, few, {"few": few}, ["msp"], memory="16MiB")  # imports all, once
    print("read", grown(lambda: [None for batch in samples]))
    if path.endswith(".npy"):
        for memory in (None, "16MiB"):
            def run():
                found = evaluate(None, samples, {"x": samples}, ["msp", "energy"], memory=memory)
                assert found.rows[0][4:] == (1.0, 0.5, 0.5, 0.5, 200_000, 200_000), found.rows[0]
            print("evaluate", grown(run))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_files_are_not_read_whole(tmp_path: Path) -> None:
    """400 MB of float16 logits, where the format allows zeros of a sparse file, in far less."""
    rows, columns = 200_000, 1008
    paths = [tmp_path / f"zeros{suffix}" for suffix in (".npy", ".safetensors", ".pt")]
    np.lib.format.open_memmap(paths[0], "w+", np.float16, (rows, columns)).flush()
    size = 2 * rows * columns
    header = json.dumps(
        {"logits": {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, size]}}
    ).encode()
    with paths[1].open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    torch.save(torch.zeros(rows, columns, dtype=torch.float16), paths[2])
    run = run_code(MEMORY, *map(str, paths))
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        what, grown = line.split()
        assert int(grown) < {"read": 160, "evaluate": 200}[what], line + " MiB"
    assert len(run.stdout.splitlines()) == 5
