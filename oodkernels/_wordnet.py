"""MOS's super-classes of WordNet ids, from WordNet's own database."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


class _Noun(NamedTuple):
    """A synset: its first word, and those above it."""

    name: str
    hypernyms: list[int]


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
    synsets, nouns = _read(where, wnids, wordnet)
    labels = []
    for synset in synsets:
        closure = _closure(synset, nouns)
        labels.append(next((name for name, root in _ROOTS.items() if root in closure), "misc"))
    return labels


def cut(
    where: str, wnids: Sequence[str], k: int, wordnet: str | os.PathLike[str] | None
) -> list[str]:
    """Cut the tree of WordNet ids into so many subtrees, of which each id gets the name.

    From the whole tree on, the group with the most classes gives up the largest branch below the
    lowest synset that they all share; what is left keeps that synset's name. A synset with several
    hypernyms stands below its first.

    Args:
        where: What the messages begin with.
        wnids: Ids such as "n01440764", each once.
        k: Number of groups, 1 to the number of ids.
        wordnet: As for :func:`super_classes`.

    Raises:
        ValueError: As :func:`super_classes`, an id is there twice, or ``k`` is out of range.
        TypeError: As there.
        FileNotFoundError: As there.
    """
    synsets, nouns = _read(where, wnids, wordnet)
    if len(set(synsets)) < len(synsets):
        twice = next(w for i, w in enumerate(wnids) if w in wnids[:i])
        raise ValueError(f"{where}: wnids must be there once each, got {twice!r} again")
    if not 1 <= k <= len(synsets):
        raise ValueError(f"{where}: k must be 1 to {len(synsets)}, one a class, got {k}")
    paths = {synset: _path(synset, nouns) for synset in synsets}
    groups: list[list[int]] = [synsets]
    while len(groups) < k:
        whole = max(groups, key=len)
        depth = _shared(whole, paths)
        branches: dict[int, list[int]] = {}
        for synset in whole:
            below = paths[synset][depth : depth + 1] or (synset,)
            branches.setdefault(below[0], []).append(synset)
        branch = max(branches.values(), key=len)
        groups.remove(whole)
        groups += [branch, [synset for synset in whole if synset not in set(branch)]]
    names: dict[str, list[int]] = {}
    for group in groups:
        top = paths[group[0]][_shared(group, paths) - 1]
        name = nouns[top].name
        names[name if name not in names else f"{name} n{top:08d} {len(names)}"] = group
    label = {synset: name for name, group in names.items() for synset in group}
    return [label[synset] for synset in synsets]


def _shared(synsets: Sequence[int], paths: Mapping[int, tuple[int, ...]]) -> int:
    """How many steps from the root all their paths go together."""
    steps = zip(*(paths[synset] for synset in synsets), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda step: len(set(step)) == 1, steps))


def _path(synset: int, nouns: Mapping[int, _Noun]) -> tuple[int, ...]:
    """Give the path from the root down, by first hypernyms."""
    path = [synset]
    while nouns[path[-1]].hypernyms:
        path.append(nouns[path[-1]].hypernyms[0])
    return tuple(reversed(path))


def _read(
    where: str, wnids: Sequence[str], wordnet: str | os.PathLike[str] | None
) -> tuple[list[int], dict[int, _Noun]]:
    """The ids as offsets, and all nouns by theirs."""
    if isinstance(wnids, str):
        raise TypeError(f"{where}: wnids must hold one id per class, got {wnids!r}")
    path = _wordnet_file(where, wordnet)
    nouns = _read_nouns(where, path)
    for i, wnid in enumerate(wnids):
        if not isinstance(wnid, str) or not re.fullmatch(r"n\d{8}", wnid):
            raise ValueError(
                f"{where}: wnids must look like 'n01440764', got {wnid!r} at index {i}"
            )
        if int(wnid[1:]) not in nouns:
            raise ValueError(f"{where}: wnids must be nouns of {path}, got {wnid!r} at index {i}")
    return [int(wnid[1:]) for wnid in wnids], nouns


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


def _read_nouns(where: str, path: Path) -> dict[int, _Noun]:
    """Every synset by its offset. File format: WordNet's manual page wndb(5)."""
    nouns: dict[int, _Noun] = {}
    roots = {offset: name.replace(" ", "_") for name, offset in _ROOTS.items()}
    try:
        with path.open(encoding="latin-1") as file:
            for line in file:
                if line.startswith(" "):  # the licence
                    continue
                fields = line.partition("|")[0].split()
                offset, words = int(fields[0]), int(fields[3], 16)
                pointers = fields[5 + 2 * words :]  # symbol, offset, part of speech, source/target
                above = [
                    int(target)
                    for symbol, target in zip(pointers[::4], pointers[1::4], strict=True)
                    if symbol in ("@", "@i")
                ]
                nouns[offset] = _Noun(fields[4].replace("_", " "), above)
                if roots.get(offset) == fields[4]:
                    del roots[offset]
    except (IndexError, ValueError) as error:
        raise ValueError(f"{where}: {path} must be a WordNet database: {error}") from None
    if roots:
        raise ValueError(
            f"{where}: {path} must be of WordNet 3.0, whose numbers ImageNet uses: it has no "
            f"{roots.popitem()[1]!r} where that has it"
        )
    return nouns


def _closure(synset: int, nouns: Mapping[int, _Noun]) -> set[int]:
    closure: set[int] = set()
    pending = [synset]
    while pending:
        synset = pending.pop()
        if synset not in closure:
            closure.add(synset)
            pending += nouns[synset].hypernyms
    return closure
