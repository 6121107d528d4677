"""``.csv``: cells separated by a comma, a semicolon or a tab.

What the columns are is decided from the first thousand rows and the names, and every row after
them has to agree: a hole, a word among numbers, a decimal comma, a row of another width or a first
row that may be names or numbers are refused, with their place.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from oodkernels.data.arrays import (
    MATRICES,
    ROLES,
    Array,
    FileError,
    Source,
    columns_of_arrays,
    is_role,
    telling,
)

SAMPLE_ROWS, SAMPLE_CHARACTERS = 1000, 1 << 24
MAX_RECORD = 1 << 26
"""Characters of a row; a longer one is no table's."""

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")
_FORMULA = re.compile(r"'*[=@+\-\t\r]")


class _Column(NamedTuple):
    """Column of the sample: type of its numbers, None for text; its first cell of another kind."""

    dtype: torch.dtype | None
    odd: tuple[int, str] | None


def read(source: Source) -> dict[str, Array]:
    """Numeric columns, and numbered columns together, by name; "" for all of those without."""
    path = source.path
    with _opened(source) as file, telling(path):
        head = _sample(_records(file))
    if not head:
        raise FileError(f"{path} is empty")
    delimiter, rows = _split(path, head)
    named = _has_names(path, rows[0], rows[1:])
    cells = rows[0]
    rows = rows[named:]
    columns = [_column(cells) for cells in zip(*rows, strict=True)]
    if not named:
        return {"": _without_names(source, rows, columns, delimiter)}
    if not rows:
        raise FileError(f"{path} has no rows but the first, {_shown(cells)}")
    names = [cell_value(cell) for cell in cells]
    _check_index(path, names, rows)
    places = {name: place for place, name in enumerate(names)}
    kept = []
    for name, column in zip(names, columns, strict=True):
        wanted = any(is_role(n) for n in columns_of_arrays(path, [name], gaps=True))
        if wanted and (column.odd is not None or column.dtype is None):
            row, cell = column.odd or (0, rows[0][places[name]])
            raise FileError(_wrong(path, cell, row, name))
        if name and column.dtype is not None:
            kept.append(name)
    if len(set(names)) < len(names):
        columns_of_arrays(path, names)
    found = {}
    for name, together in columns_of_arrays(path, kept).items():
        dtype = columns[places[together[0]]].dtype
        if len(together) > 1 or name in MATRICES:
            dtype = torch.float32
        elif name in ROLES["scores"]:
            dtype = torch.float64
        assert dtype is not None
        where = {n: places[n] for n in together}
        found[name] = _array(source, name, where, len(cells), dtype, 1, delimiter)
    return found


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """A header and a row for each sample."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(text_cell, arrays))
        writer.writerows(zip(*(array.tolist() for array in arrays.values()), strict=True))


def text_cell(text: str) -> str:
    """Text as a cell that spreadsheets do not take for a formula; :func:`cell_value` undoes it."""
    return f"'{text}" if _FORMULA.match(text) else text


def cell_value(cell: str) -> str:
    """The text of a cell that :func:`text_cell` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell.strip()


# --- rows -------------------------------------------------------------------------------------


@contextmanager
def _opened(source: Source) -> Iterator[TextIO]:
    with source.open() as file:
        yield io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8-sig", newline="")  # type: ignore[type-var]


def _records(file: TextIO) -> Iterator[str]:
    """Rows as text: a quoted cell may go over several lines; blank lines do not count."""
    for line in iter(lambda: file.readline(MAX_RECORD), ""):
        parts, size, quotes = [line], len(line), line.count('"')
        while quotes % 2:
            parts.append(file.readline(MAX_RECORD))
            if not parts[-1]:
                raise ValueError(f"a quoted cell does not end: {_shown([line])}")
            size, quotes = size + len(parts[-1]), quotes + parts[-1].count('"')
            if size >= MAX_RECORD:
                break
        if size >= MAX_RECORD:
            raise ValueError(f"a row is longer than {MAX_RECORD >> 20} MiB")
        record = "".join(parts)
        if record.strip(" \r\n"):
            yield record


def _sample(records: Iterator[str]) -> list[str]:
    found, size = [], 0
    for record in itertools.islice(records, SAMPLE_ROWS + 1):
        found.append(record)
        size += len(record)
        if size > SAMPLE_CHARACTERS:
            break
    return found


def _split(path: Path, head: Sequence[str]) -> tuple[str, list[list[str]]]:
    """What separates the cells, and the cells."""
    ragged = None
    found = []
    for delimiter in ",;\t":
        rows = [next(csv.reader(io.StringIO(record), delimiter=delimiter)) for record in head]
        width = len(rows[0])
        odd = next((i for i, row in enumerate(rows) if len(row) != width), None)
        if odd is None and width > 1:
            found.append((delimiter, rows))
        elif odd is not None and ragged is None:
            ragged = (
                f"{path}: row {odd - 1} must have {width} cells, as the first line, got "
                f"{len(rows[odd])}: {_shown(rows[odd])}"
            )
    if len(found) > 1:
        both = " and ".join(repr(delimiter) for delimiter, _ in found)
        raise FileError(
            f"{path}: cells are separated by {both}: write one of them only, and numbers with a "
            "decimal point"
        )
    if found:
        return found[0]
    if ragged:
        raise FileError(ragged)
    return ",", [next(csv.reader(io.StringIO(record))) for record in head]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _has_names(path: Path, first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Whether the first line holds names; it must be certain."""
    numbers = [_is_number(cell) or bool(_DECIMAL_COMMA.fullmatch(cell)) for cell in first]
    if not any(numbers):
        return True
    if not all(numbers):
        raise FileError(
            f"{path}: the first line must be names or numbers, got both: {_shown(first)}: put a "
            "line of names above the samples, without an index"
        )
    if all(map(_INTEGER.fullmatch, first)):
        counts = [int(cell) for cell in first] == list(range(len(first)))
        others = bool(rest) and not any(
            any(map(_INTEGER.fullmatch, cells)) for cells in zip(*rest, strict=True)
        )
        if counts or (others and len(set(first)) == len(first)):
            raise FileError(
                f"{path}: the first line, {_shown(first)}, may be pandas' numbers of columns or a "
                "sample: put a line of names above the samples, such as "
                + (f"logits_0 to logits_{len(first) - 1}" if len(first) > 1 else "score or label")
            )
    return False


def _column(cells: Sequence[str]) -> _Column:
    try:
        list(map(float, cells))
    except ValueError:
        numbers = [_is_number(cell) for cell in cells]
        if not any(numbers) and not any(map(_DECIMAL_COMMA.fullmatch, cells)):
            return _Column(None, None)
        return _Column(torch.float64, next((i, c) for i, c in enumerate(cells) if not numbers[i]))
    whole = all(map(_INTEGER.fullmatch, cells))
    return _Column(torch.int64 if whole else torch.float64, None)


def _check_index(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A column without a name is an index, as pandas writes it, or it is refused."""
    for place, name in enumerate(names):
        cells = [row[place] for row in rows]
        if not name and any(cells) and cells != [str(i) for i in range(len(cells))]:
            raise FileError(f"{path}: column {place} has no name, and is no index of the rows")


def _without_names(
    source: Source, rows: list[list[str]], columns: list[_Column], delimiter: str
) -> Array:
    path, width = source.path, len(columns)
    whole = [column.dtype == torch.int64 for column in columns]
    for place, column in enumerate(columns):
        if column.odd is not None or column.dtype is None:
            raise FileError(_wrong(path, *(column.odd or (0, rows[0][place]))[::-1], place))
    counting = [row[0] for row in rows] == [str(i) for i in range(len(rows))]
    if width > 1 and len(rows) > 1 and counting:
        raise FileError(
            f"{path}: column 0 counts the rows, as an index does: write the file without it, or "
            "put a line of names above the samples"
        )
    if width == 2 and all(whole) and not any("-" in row[1] for row in rows):
        raise FileError(
            f"{path}: two columns of whole numbers may be one with a decimal comma: write a "
            "decimal point, or put a line of names above the samples"
        )
    dtype = torch.int64 if width == 1 and whole[0] else torch.float64
    return _array(source, "", {str(i): i for i in range(width)}, width, dtype, 0, delimiter)


def _shown(cells: Sequence[str]) -> str:
    text = ", ".join(repr(cell.strip()[:40]) for cell in cells[:4])
    return text + (", ..." if len(cells) > 4 else "")


def _wrong(path: Path, cell: str, row: int, column: str | int, kind: str = "a number") -> str:
    hint = ": write a decimal point" if _DECIMAL_COMMA.fullmatch(cell) else ""
    if not hint and column in ROLES["labels"]:
        hint = ": write class ids, or another name for the column"
    return f"{path}: {cell[:40]!r} in row {row}, column {column!r}, must be {kind}{hint}"


# --- numbers ----------------------------------------------------------------------------------


def _array(
    source: Source,
    name: str,
    columns: Mapping[str, int],
    width: int,
    dtype: torch.dtype,
    skip: int,
    delimiter: str,
) -> Array:
    """The columns at these places, of a table so many cells wide."""
    one = len(columns) == 1
    as_numpy = torch.empty(0, dtype=dtype).numpy().dtype

    def split(record: str) -> list[str]:
        return next(csv.reader(io.StringIO(record), delimiter=delimiter))

    def whole(records: Iterator[str], start: int) -> Iterator[str]:
        for row, record in enumerate(records, start):
            plain = '"' not in record
            if (found := record.count(delimiter) + 1 if plain else len(split(record))) != width:
                raise FileError(
                    f"{source.path}: row {row} must have {width} cells, as the first line, got "
                    f"{found}: {_shown(split(record))}"
                )
            yield record

    def refuse(start: int) -> None:
        """The cell that could not be read."""
        with _opened(source) as file:
            records = itertools.islice(_records(file), skip + start, None)
            for row, record in enumerate(records, start):
                cells = split(record)
                for column, place in columns.items():
                    number, kind = _is_number(cells[place]), "a number"
                    if dtype == torch.int64:
                        number, kind = bool(_INTEGER.fullmatch(cells[place])), "an integer"
                    if not number:
                        raise FileError(_wrong(source.path, cells[place], row, column, kind))

    def pieces(rows: int) -> Iterator[Tensor]:
        with _opened(source) as file:
            records = itertools.islice(_records(file), skip, None)
            for start in itertools.count(0, rows):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "loadtxt: input contained no data")
                    try:
                        values = np.loadtxt(
                            whole(itertools.islice(records, rows), start),
                            as_numpy,
                            comments=None,
                            delimiter=delimiter,
                            usecols=list(columns.values()),
                            ndmin=2,
                            quotechar='"',
                        )
                    except FileError:
                        raise
                    except (OverflowError, ValueError):
                        refuse(start)
                        raise
                source.check(file)
                if not len(values):
                    return
                yield torch.from_numpy(values[:, 0] if one else values)

    shape = (None,) if one else (None, len(columns))
    return Array(source.path, name, shape, dtype, pieces)
