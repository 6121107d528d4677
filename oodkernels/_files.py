"""Files that are replaced whole or not at all, folders of one writer, text marked as ours."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

LOCK = ".oodkernels.lock"
"""Name of the file that says who writes to a folder."""

_number = itertools.count()
_token = secrets.token_hex(8)
_held: set[int] = set()


def _after_fork() -> None:
    """A child has names of its own, and does not keep its parent's folders when that dies."""
    global _token
    _token = secrets.token_hex(8)
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_file(where: str, path: str | os.PathLike[str]) -> Path:
    """The path of a file to read, which may be missing.

    Raises:
        ValueError: It is a pipe, which would be waited for, or a device or a folder.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{where}: must be a file, got {kind}")
    return path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; on success the file gets that name.

    No other thread, process or machine is given the same name. Where ``path`` is a link, what it
    points to is replaced.

    Raises:
        OSError: The file cannot be written, or ``path`` is a pipe or a device; what was at ``path``
            is still there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file, and cannot be replaced", str(path))
    temporary = path.with_name(f".{_token}-{next(_number)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str], op: str) -> Iterator[None]:
    """Keeps a folder for one writer, from whatever process, thread or container of the machine.

    The lock ends with its process, however that ends. What :func:`replacing` had not finished when
    an earlier holder was killed is removed, and nothing else.

    Args:
        folder: It exists.
        op: Who asks, for messages.

    Raises:
        RuntimeError: Another holds it; the message says who, where and since when.
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    if sys.platform == "win32":
        warnings.warn(f"{op}: {folder} cannot be locked on this system", stacklevel=3)
        yield
        return
    descriptor = _lock(folder, op)
    _held.add(descriptor)
    try:
        if found := _holder(descriptor).get("token"):
            for left in folder.glob(f".{found}-*.tmp"):
                left.unlink(missing_ok=True)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "token": _token,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        if descriptor in _held:  # not in a child of a fork
            _held.discard(descriptor)
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)


def _lock(folder: Path, op: str) -> int:
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise RuntimeError(
                f"{op}: {folder} is being written by process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'an unknown host')} since {holder.get('since', 'just now')}: "
                "wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{op}: {folder} cannot be locked: {error.strerror}", stacklevel=4)
            return descriptor
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or being written
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to ``path`` by way of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def file_digest(path: str | os.PathLike[str]) -> str:
    """The first 16 hex digits of the SHA-256 of a file's content.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()[:16]


def read_json(where: str, text: str, format: str, version: int) -> dict[str, Any]:
    """The fields of a JSON object beside ``format`` and ``version``, which must be those given.

    Raises:
        ValueError: ``text`` is not JSON, or of another format or version.
    """
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: text must be JSON: {error}") from None
    found = content.pop("format", None) if isinstance(content, dict) else content
    if found != format or not isinstance(content, dict):
        raise ValueError(f"{where}: format must be {format!r}, got {str(found)[:80]!r}")
    if (found := content.pop("version", None)) != version:
        raise ValueError(f"{where}: version must be {version}, got {found!r}")
    return content
