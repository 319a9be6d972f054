"""Read and write tables of plain values: JSON lines, a JSON list, CSV, TSV, Parquet.

A row has a cell for each heading. An empty cell in CSV, or null elsewhere, is a missing cell. Headings are stripped of
spaces and must be distinct. An invalid row is an error with its number: nothing is truncated, filled in or guessed.
Messages name the row; the caller adds the name of the file.

In CSV, spreadsheets take a text that begins with `=`, `+`, `-`, `@`, a tab or a line end for a formula. `separated`
writes an apostrophe before it, which spreadsheets do not show, and reading removes it again.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from reward_models import files, limits

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
# control characters other than white space, and lone surrogates
UNPRINTED = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
MANY = 64  # rows of Parquet per batch: their cells may be pictures

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """`names`: the headings, None where each row has its own. `unit`: what a row is called, "line" or "row".

    `rows(only)` yields the number of each row, from 0, with its cells, restricted to the columns `only` if given. A row
    of JSON lines has the number of its line; blank lines are skipped. ValueError that names the row.
    """

    names: list[str] | None
    unit: str
    rows: Callable[[Sequence[str] | None], Iterator[tuple[int, Row]]]

    def where(self, number: int) -> str:
        return f"{self.unit} {number + 1}"


def read(path: Path) -> Table:
    """The table in a file, by its file name extension. OSError if it cannot be read, ValueError if it is invalid."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"no table: its name must end in {', '.join(ENDINGS)}")
    if ending == ".parquet":
        return _parquet(path)
    if ending in SEPARATORS:
        return _separated(files.decoded(files.content(path, limits.TEXT)), SEPARATORS[ending])
    if ending in LINES:
        text = files.decoded(files.content(path, limits.TEXT))
        return Table(None, "line", lambda only: _chosen(_of_lines(text), only))
    values = files.parsed(files.content(path, limits.JSON))
    if not isinstance(values, list):
        raise ValueError(f"a list of objects is needed, got {type(values).__name__}; an object a line is .jsonl")
    return Table(None, "row", lambda only: _chosen(_of_list(values), only))


def columns(table: Table, source: str | Path) -> list[str]:
    """The headings of a table; where each row has its own, those of the first row, none without rows. ValueError as
    `numbered`."""
    return table.names or [*next((row for _, row in numbered(table, source)), {})]


def numbered(table: Table, source: str | Path) -> Iterator[tuple[str, Row]]:
    """The rows, each after its position in the form used in messages: "SOURCE, row 1". ValueError, in one line that
    begins with the source."""
    try:
        for number, row in table.rows(None):
            yield f"{source}, row {number + 1}", row
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _of_lines(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(files.lines(text)):
        if line.strip():
            try:
                yield number, row_in(line)
            except ValueError as error:
                raise ValueError(f"line {number + 1}: {error}") from None


def _of_list(values: list[Any]) -> Iterator[tuple[int, Row]]:
    for number, value in enumerate(values):
        try:
            yield number, _row(value)
        except ValueError as error:
            raise ValueError(f"row {number + 1}: {error}") from None


def row_in(line: str) -> Row:
    """The row in a line of JSON. ValueError, without the number of the line, if it is invalid."""
    if len(line) > limits.JSON:
        raise ValueError(f"longer than {limits.JSON} characters")
    try:
        value = files.parsed(line)
    except JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise ValueError(f"not a JSON object: {error}") from None
    return _row(value)


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object, but {type(value).__name__}")
    return dict(zip(headings(list(value)), map(given, value.values()), strict=True))


def given(value: Any) -> Any:
    """The value without null fields, at any depth, because Parquet has every field in every row."""
    if isinstance(value, Mapping):
        return {key: given(part) for key, part in value.items() if part is not None}
    return [given(part) for part in value] if isinstance(value, list) else value


def _chosen(rows: Iterator[tuple[int, Row]], only: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    """At most `limits.ROWS` rows, without missing cells, restricted to the columns `only`."""
    for count, (number, row) in enumerate(rows):
        if count == limits.ROWS:
            raise ValueError(f"more than {limits.ROWS} rows; split the table")
        yield number, {name: cell for name, cell in row.items() if cell is not None and (only is None or name in only)}


def headings(names: Sequence[Any]) -> list[str]:
    """Headings without spaces around them. ValueError for two that are equal."""
    stripped = [str(name).strip() for name in names]
    for index, name in enumerate(stripped):
        if name in stripped[:index]:
            raise ValueError(f"two columns are called {name[:40]!r}")
    return stripped


# ------------------------------------------------------------------------------------------------------- CSV and TSV


def _separated(text: str, mark: str) -> Table:
    def parts() -> Iterator[list[str]]:
        return parts_of(csv.reader(StringIO(text, newline="\n"), delimiter=mark, strict=True))

    names = headings([plain(name) for name in next(parts(), [])])

    def rows() -> Iterator[tuple[int, Row]]:
        for number, part in enumerate(islice(parts(), 1, None)):
            yield number, under(names, part, number, mark)

    return Table(names, "row", lambda only: _chosen(rows(), only))


def under(names: Sequence[str], cells: Sequence[str], number: int, mark: str) -> Row:
    """The row with these cells under the headings. ValueError for another number of cells."""
    if len(cells) != len(names):
        raise ValueError(
            f"row {number + 1}: {len(cells)} cells under {len(names)} headings; a text with "
            f"{'a comma' if mark == ',' else 'a tab'} in it stands in double quotes"
        )
    return {name: plain(cell) or None for name, cell in zip(names, cells, strict=True)}


def parts_of(reader: Iterator[list[str]], number: int = 0) -> Iterator[list[str]]:
    """The cells of each row from a number on; 0 is the row of headings. Blank lines are skipped."""
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{f'row {number}' if number else 'headings'}: {error}") from None
        if cells:
            number += 1
            yield cells


def separated(rows: Sequence[Row]) -> str:
    """The rows as CSV, with the keys of the first as headings. Texts are escaped against formulas, numbers are not."""
    file = StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([safe(name) for name in rows[0]])
    writer.writerows([[safe(cell) for cell in row.values()] for row in rows])
    return file.getvalue()


def safe(cell: Any) -> Any:
    """A cell that spreadsheets do not run: a text that looks like a formula gets a leading apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def plain(cell: str) -> str:
    """The inverse of `safe`."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


# ------------------------------------------------------------------------------------------------------------ Parquet


def _parquet(path: Path) -> Table:
    stored = parquet(path)
    names = headings(stored.schema_arrow.names)

    def rows(only: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
        size = 0
        for number, part in _batches(stored, 0, only):
            size += part.nbytes
            if size > limits.TEXT:
                raise ValueError(f"row {number + 1}: more than {limits.TEXT} bytes so far; split the table")
            yield from _cells(number, part)

    return Table(names, "row", lambda only: _chosen(rows(only), only))


def parquet(path: Path) -> Any:
    """The file as pyarrow's `ParquetFile`. OSError if it cannot be read, ValueError if it is invalid."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmalign[parquet]'") from None
    try:
        stored = ParquetFile(files.opened(path))
        headings(stored.schema_arrow.names)
    except (ArrowException, EOFError, UnicodeError) as error:
        raise _refused(error) from None
    return stored


def rows_of_parquet(stored: Any, begin: int) -> Iterator[tuple[int, Row]]:
    """The numbered rows of a `ParquetFile` from one on, `MANY` in memory at a time. ValueError."""
    for number, part in _batches(stored, begin, None):
        if part.nbytes > limits.TEXT:
            raise ValueError(f"row {number + 1}: {MANY} rows of more than {limits.TEXT} bytes")
        yield from _cells(number, part)


def _batches(stored: Any, begin: int, only: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
    """Record batches with the number of their first row, from the row `begin` on; row groups before it are not read."""
    from pyarrow import ArrowException

    columns = [column for column in stored.schema_arrow.names if only is None or column.strip() in only]
    first = number = 0
    try:
        while first < stored.num_row_groups and number + (rows := stored.metadata.row_group(first).num_rows) <= begin:
            first, number = first + 1, number + rows
        for part in stored.iter_batches(MANY, row_groups=[*range(first, stored.num_row_groups)], columns=columns):
            skipped = min(max(begin - number, 0), part.num_rows)
            yield number + skipped, part.slice(skipped)
            number += part.num_rows
    except (ArrowException, EOFError, UnicodeError, OverflowError) as error:
        raise _refused(error) from None


def _cells(number: int, part: Any) -> Iterator[tuple[int, Row]]:
    try:
        rows = part.to_pylist()
    except (EOFError, UnicodeError, OverflowError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _refused(error) from None
    for offset, row in enumerate(rows):
        yield number + offset, {name.strip(): given(cell) for name, cell in row.items()}


def _refused(error: BaseException) -> ValueError:
    return ValueError(f"no Parquet that can be read: {' '.join(str(error).split())[:300]}")


# -------------------------------------------------------------------------------------------------------------- cells


def wording(text: Any) -> str:
    """A prompt's text, unchanged. ValueError if it is not a text, is blank, or has unprintable characters."""
    if not isinstance(text, str):
        raise ValueError(f"the prompt is {type(text).__name__}; a text is needed")
    if not text.strip():
        raise ValueError("the prompt is blank")
    if (odd := UNPRINTED.search(text)) is not None:
        raise ValueError(f"the prompt holds U+{ord(odd[0]):04X}, which cannot be printed")
    return text


def whole(cell: Any) -> int | None:
    """The 64-bit integer in a cell, None for anything else."""
    if isinstance(cell, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", cell, re.ASCII):
        cell = int(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    fits = isinstance(cell, int) and not isinstance(cell, bool) and -(2**63) <= cell < 2**63
    return cell if fits else None
