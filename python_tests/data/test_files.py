from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from oodkernels import _files
from oodkernels._files import LOCK, locked, read_json, replacing, write_text


def test_threads_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    """Each writes a text of its own length to the same file; every state of it is whole."""
    path = tmp_path / "x.json"
    texts = [json.dumps({"x": str(i) * 10_000 * (i + 1)}) for i in range(8)]
    failures: list[Exception] = []

    def save(text: str) -> None:
        try:
            for _ in range(50):
                write_text(path, text)
                assert path.read_text() in texts
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


SAME_NUMBER = """
import os
os.getpid = lambda: 1
from oodkernels._files import replacing
with replacing("x") as path:
    path.touch()
    print(path)
"""


def test_processes_of_one_number_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    """As two containers have it that write to one disk."""
    command = [sys.executable, "-c", SAME_NUMBER]
    names = {subprocess.check_output(command, cwd=tmp_path) for _ in range(2)}
    assert len(names) == 2
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as two:
        assert one != two
        one.touch()
        two.touch()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_names_of_its_own(tmp_path: Path) -> None:
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        os.write(write, _files._token.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() != _files._token


def test_names_of_any_length_can_be_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 240), "x")
    assert (tmp_path / ("n" * 240)).read_text() == "x"


def test_a_link_stays_one_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "x")
    write_text(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "y"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match=f"is no file, and cannot be replaced: .*{name}"):
            write_text(tmp_path / name, "x")
    assert {p.name for p in tmp_path.iterdir()} == {"link", "file", "pipe", "folder"}


def test_a_folder_is_one_writers(tmp_path: Path) -> None:
    with locked(tmp_path, "Trainer"):
        holder = rf"process {os.getpid()} on {socket.gethostname()} since 20\d\d-"
        with (
            pytest.raises(RuntimeError, match=rf"extract: .* is being written by {holder}"),
            locked(tmp_path, "extract"),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, "again"):
        pass


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def without(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    warned = pytest.warns(UserWarning, match=r"extract: .* cannot be locked: No locks available")
    with warned, locked(tmp_path, "extract"):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from oodkernels._files import locked, replacing
with locked(".", "first"), replacing("model.pt") as path:
    path.write_text("half")
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()  # as a worker does that outlives its parent
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_holder_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".mine.tmp").touch()
    with replacing(tmp_path / "of another live run") as live:
        live.touch()
        before = set(tmp_path.iterdir())
        run = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stdin=subprocess.PIPE)
        assert run.wait() == -signal.SIGKILL
        assert len(set(tmp_path.iterdir()) - before) == 2  # the lock, half a file
        with locked(tmp_path, "second"):
            assert set(tmp_path.iterdir()) - before == {tmp_path / LOCK}
        assert set(tmp_path.iterdir()) == before
        assert run.stdin is not None
        run.stdin.close()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "9" * 5000])
def test_json_that_cannot_be_parsed_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="load: text must be JSON: "):
        read_json("load", text, "x", 1)
