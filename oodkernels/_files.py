"""Files that are replaced whole or not at all, and what marks their text as ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; on success the file gets that name.

    Raises:
        OSError: The file cannot be written; what was at ``path`` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to ``path`` by way of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_json(where: str, text: str, format: str, version: int) -> dict[str, Any]:
    """The fields of a JSON object beside ``format`` and ``version``, which must be those given.

    Raises:
        ValueError: ``text`` is not JSON, or of another format or version.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: text must be JSON: {error}") from None
    found = content.pop("format", None) if isinstance(content, dict) else content
    if found != format or not isinstance(content, dict):
        raise ValueError(f"{where}: format must be {format!r}, got {str(found)[:80]!r}")
    if (found := content.pop("version", None)) != version:
        raise ValueError(f"{where}: version must be {version}, got {found!r}")
    return content
