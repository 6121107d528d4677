"""MOS's super-classes of WordNet ids, from WordNet's own database."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

WORDNET_GROUPS = (
    "animal",
    "artifact",
    "geological formation",
    "fungus",
    "misc",
    "natural object",
    "person",
    "plant",
)
"""Super-classes of ImageNet-1k in MOS, in the column order of the authors' models."""

# Offsets in WordNet 3.0's data.noun. The first one found in a synset's hypernym closure wins; in
# the whole database only "bar" and "sandbar" have two, and MOS has sandbar as a natural object.
_ROOTS = {
    "animal": 15388,
    "artifact": 21939,
    "natural object": 19128,
    "geological formation": 9287968,
    "fungus": 12992868,
    "person": 7846,
    "plant": 17222,
}
_DIRECTORIES = (
    "/usr/share/wordnet",
    "/usr/share/wordnet/dict",
    "/usr/share/wordnet-3.0/dict",
    "/usr/local/WordNet-3.0/dict",
)


def super_classes(
    where: str, wnids: Sequence[str], wordnet: str | os.PathLike[str] | None
) -> list[str]:
    """Name the super-class of each WordNet id, one of :data:`WORDNET_GROUPS`.

    Args:
        where: What the messages begin with.
        wnids: Ids such as "n01440764".
        wordnet: Directory of ``data.noun``; by default ``$WNSEARCHDIR`` or where systems keep it.

    Raises:
        ValueError: An id is malformed or not in the database, or that is not WordNet 3.0.
        TypeError: ``wnids`` is a string.
        FileNotFoundError: There is no ``data.noun``.
    """
    if isinstance(wnids, str):
        raise TypeError(f"{where}: wnids must hold one id per class, got {wnids!r}")
    path = _wordnet_file(where, wordnet)
    hypernyms = _read_hypernyms(where, path)
    labels = []
    for i, wnid in enumerate(wnids):
        if not isinstance(wnid, str) or not re.fullmatch(r"n\d{8}", wnid):
            raise ValueError(
                f"{where}: wnids must look like 'n01440764', got {wnid!r} at index {i}"
            )
        if int(wnid[1:]) not in hypernyms:
            raise ValueError(f"{where}: wnids must be nouns of {path}, got {wnid!r} at index {i}")
        closure = _closure(int(wnid[1:]), hypernyms)
        labels.append(next((name for name, root in _ROOTS.items() if root in closure), "misc"))
    return labels


def _wordnet_file(where: str, wordnet: str | os.PathLike[str] | None) -> Path:
    given = wordnet or os.environ.get("WNSEARCHDIR")
    directories = [given] if given else _DIRECTORIES
    for directory in directories:
        path = Path(directory, "data.noun")
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{where}: no data.noun in {', '.join(map(str, directories))}: install WordNet 3.0 "
        "(Debian: wordnet-base) or give its directory as wordnet"
    )


def _read_hypernyms(where: str, path: Path) -> dict[int, list[int]]:
    """Hypernyms of each synset, by offset. File format: WordNet's manual page wndb(5)."""
    hypernyms: dict[int, list[int]] = {}
    roots = {offset: name.replace(" ", "_") for name, offset in _ROOTS.items()}
    try:
        with path.open(encoding="latin-1") as file:
            for line in file:
                if line.startswith(" "):  # the licence
                    continue
                fields = line.partition("|")[0].split()
                offset, words = int(fields[0]), int(fields[3], 16)
                pointers = fields[5 + 2 * words :]  # symbol, offset, part of speech, source/target
                hypernyms[offset] = [
                    int(target)
                    for symbol, target in zip(pointers[::4], pointers[1::4], strict=True)
                    if symbol in ("@", "@i")
                ]
                if roots.get(offset) == fields[4]:
                    del roots[offset]
    except (IndexError, ValueError) as error:
        raise ValueError(f"{where}: {path} must be a WordNet database: {error}") from None
    if roots:
        raise ValueError(
            f"{where}: {path} must be of WordNet 3.0, whose numbers ImageNet uses: it has no "
            f"{roots.popitem()[1]!r} where that has it"
        )
    return hypernyms


def _closure(synset: int, hypernyms: dict[int, list[int]]) -> set[int]:
    closure: set[int] = set()
    pending = [synset]
    while pending:
        synset = pending.pop()
        if synset not in closure:
            closure.add(synset)
            pending += hypernyms[synset]
    return closure
