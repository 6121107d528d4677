"""Every reader on damaged files, in a process of its own with little memory.

    python python_tests/fuzz/readers.py --cases 100000 --seed 7

A case is its seed and number; it is printed before it runs when ``--verbose`` is given, and always
when it fails.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oodkernels import Groups, Threshold
from oodkernels.data import FORMATS, ToTensor, open_arrays, open_images, open_samples, save_arrays
from oodkernels.detectors import Mahalanobis, OODDetector
from oodkernels.nn import Head, read_weights, save_weights

DOCUMENTED = (ValueError, TypeError, OSError, ImportError)
"""What a reader may raise; every message is one line and names the file."""
SECONDS = 10
"""More than any file of these sizes may take."""
MEMORY = 1 << 30
"""Beside what the process has when the cases begin."""


def bases(folder: Path) -> dict[str, bytes]:
    """Whole files of every format, by the end of their names after a counter."""
    generator = torch.Generator().manual_seed(0)
    arrays = {
        "logits": torch.randn(20, 4, generator=generator),
        "score": torch.randn(20, generator=generator),
        "labels": torch.arange(20) % 4,
    }
    found = {}

    def keep(suffix: str) -> None:
        found[f"{len(found)}{suffix}"] = (folder / f"base{suffix}").read_bytes()

    for suffix, form in FORMATS.items():
        columns = {f"logits_{i}": arrays["logits"][:, i] for i in range(4)}
        flat = {**columns, "score": arrays["score"], "labels": arrays["labels"]}
        given = flat if form.flat else arrays
        save_arrays(folder / f"base{suffix}", {"": arrays["logits"]} if form.one else given)
        keep(suffix)
    np.save(folder / "base.npy", np.asfortranarray(arrays["logits"].numpy()).astype(">f8"))
    keep(".npy")
    np.savez_compressed(folder / "base.npz", logits=np.asfortranarray(arrays["logits"].numpy()))
    keep(".npz")
    torch.save(arrays["logits"].t(), folder / "base.pt")
    keep(".pt")
    (folder / "base.csv").write_text('path;"a\nb";score\n"x;y";1;.5\nz;2;.25\n')
    keep(".csv")
    (folder / "base.csv").write_text("".join(f"{i / 7},{i / 3}\n" for i in range(20)))
    keep(".csv")
    groups = Groups([0, 1, 0, 1], class_names=list("abcd"))
    groups.save(folder / "base.groups.json")
    Threshold.calibrate(arrays["score"]).save(folder / "base.threshold.json")
    Head(4, 6, groups).save(folder / "base.head.safetensors")
    known = Mahalanobis().fit(features=arrays["logits"], labels=arrays["labels"])
    known.save(folder / "base.detector.safetensors")
    save_weights(torch.nn.Linear(2, 6), folder / "base.model.pt", 6, groups=groups)
    for suffix in LOADERS:
        keep(suffix)
    found[f"{len(found)}.txt"] = b"a.png 1\nb.png, 2\nsub dir/c.jpg\t-1\n"
    try:
        from PIL import Image
    except ImportError:
        return found
    for form, mode in (("png", "RGB"), ("png", "I;16"), ("jpeg", "L"), ("gif", "P"), ("tiff", "L")):
        image = Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))
        image = image if mode == "I;16" else image.convert("L").convert(mode)
        image.save(folder / "image", form)
        found[f"{len(found)}.image.{form}"] = (folder / "image").read_bytes()
    return found


# --- damage -----------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 127, 255, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 10**12)
WORDS = (b"0", b"-1", b"nan", b"inf", b"1e999", b"1" * 400, b"", b"''", b'"', b"\0", b"\xff", b",,")
WORDS += (b"[" * 5000, b"{" * 5000, b"null", b"99999999999999999999", b"(((", b"1,5", b"\r\n\r\n")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file after one to four accidents."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 4, 8, 16, 100, len(data)))
        piece = data[at : at + length]
        kind = rng.randrange(9)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + piece + data[at:]
        elif kind == 3 and data:
            flipped = bytearray(data)
            flipped[at - 1] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        elif kind == 4:
            data = data[:at] + rng.randbytes(min(length, 100)) + data[at + length :]
        elif kind == 5:
            form = rng.choice("bhiqBHIQ")
            value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
            text = value.to_bytes(struct.calcsize(form), rng.choice(("little", "big")))
            data = data[:at] + text + data[at + len(text) :]
        elif kind == 6:
            data = data[:at] + rng.choice(WORDS) + data[at:]
        elif kind == 7:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                at = rng.choice(digits)
                data = data[:at] + rng.choice(WORDS) + data[at + 1 :]
        else:
            data = data[:at] + data[rng.randrange(len(data) + 1) :]
    return data


def members_damaged(data: bytes, rng: random.Random) -> bytes:
    """A zip archive that is whole, with damage in a file of it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except (OSError, ValueError, zipfile.BadZipFile):
        return damaged(data, rng)
    chosen = rng.choice(list(members))
    members[chosen] = damaged(members[chosen], rng)
    made = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def header_damaged(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else, and is whole."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice(list(header))]
    key = rng.choice(list(entry))
    values: list[Any] = [*NUMBERS, [], [1], [2**40, 2**40], None, "F64", "x", {}, [[0, 1]], 0.5]
    entry[key] = rng.choice(values)
    if isinstance(entry[key], int):
        entry[key] = [entry[key], rng.choice(NUMBERS)]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# --- reading ----------------------------------------------------------------------------------


LOADERS: dict[str, Callable[[Path], Any]] = {
    ".groups.json": Groups.load,
    ".threshold.json": Threshold.load,
    ".head.safetensors": Head.load,
    ".detector.safetensors": OODDetector.load,
    ".model.pt": read_weights,
}


def read(path: Path) -> None:
    """All that can be read from a file."""
    loader = next((load for end, load in LOADERS.items() if path.name.endswith(end)), None)
    if loader is not None:
        loader(path)
    elif ".image." in path.name:
        _ = open_images(path.parent, ToTensor(8))[0]  # type: ignore[index]
    elif path.suffix == ".txt":
        open_images(path)
    else:
        for array in open_arrays(path).values():
            for chunk in array.chunks(7):
                assert len(chunk) <= 7
        for batch in open_samples(path).batches(7):
            assert batch


def case(seed: int, number: int, found: dict[str, bytes]) -> tuple[str, bytes]:
    """File name and content."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(found))
    change: Callable[[bytes, random.Random], bytes] = damaged
    if name.endswith((".npz", ".pt")) and rng.random() < 0.5:
        change = members_damaged
    if name.endswith(".safetensors") and rng.random() < 0.5:
        change = header_damaged
    return name, change(found[name], rng)


def cases(seed: int, numbers: range, seconds: float) -> Iterator[tuple[int, str, bytes]]:
    """As many as there is time for."""
    with tempfile.TemporaryDirectory() as folder:
        found = bases(Path(folder))
    end = time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            return
        yield number, *case(seed, number, found)


def limit_memory() -> None:
    """Of address space, so that what asks for too much is refused."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def stop(*_: Any) -> None:
    """Of the alarm."""
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    """Number of cases that failed, at most 1 as an exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    for name, content in case_files().items():  # imports all, before memory is limited
        check(name, content)
    limit_memory()
    signal.signal(signal.SIGALRM, stop)
    failed = done = refused = 0
    numbers = range(given.first, given.first + given.cases)
    for number, name, content in cases(given.seed, numbers, given.seconds):
        if given.verbose:
            print(f"seed {given.seed} case {number}: {name}", flush=True)
        signal.alarm(SECONDS)
        try:
            refused += check(name, content)
        except BaseException:
            failed += 1
            print(f"FAILED: --seed {given.seed} --first {number} --cases 1: {name}", flush=True)
            traceback.print_exc(file=sys.stdout)
        finally:
            signal.alarm(0)
        done += 1
    print(f"seed {given.seed}: {done} cases, {refused} refused, {failed} failed", flush=True)
    return failed > 0


def case_files() -> dict[str, bytes]:
    """The whole files."""
    with tempfile.TemporaryDirectory() as folder:
        return bases(Path(folder))


def check(name: str, content: bytes) -> bool:
    """Read a file; whether it was refused, as documented."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            read(path)
        except TimeoutError:
            raise
        except DOCUMENTED as error:
            message = str(error)
            if "\n" in message or len(message) > 2000 or name not in message:
                raise AssertionError(f"message: {message[:3000]}") from error
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
