"""The pictures and prompts in the rows of a table: a picture is the name of a file, or lies in the table itself."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reward_models import files, images, tables
from reward_models.prompt import Prompt
from reward_models.types import Images


@dataclass(frozen=True)
class Stored:
    """A picture that is read when it is needed. `name` is its name in the source; `data` is the content of its file if
    it is stored in a table; `path` is the file, or that table."""

    name: str
    path: Path
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> Images:
        """The picture, [1, 3, H, W] float32 in [0, 1]. ValueError, in one line, if it cannot be read."""
        return images.from_file(self.path) if self.data is None else images.from_bytes(self.data)


def of_cell(cell: Any, column: str, source: Path, where: str, name: str = "") -> Stored:
    """The picture in a cell of the table `source`: the name of a file relative to the table's folder, the bytes of a
    file, or {bytes, path}, which is how `datasets` writes pictures. `where` names the row; `name` names a picture that
    is stored without a name. ValueError, which begins with `where`, for any other cell."""
    stored = cell if isinstance(cell, Mapping) else {"bytes" if isinstance(cell, bytes) else "path": cell}
    path, data = stored.get("path"), stored.get("bytes")
    if not isinstance(path, str | None) or not isinstance(data, bytes | None) or not (path or data):
        raise ValueError(f"{where}: `{column}` must be the name of a file or its bytes")
    if data is not None:
        return Stored(path or name or f"{column} of {where.rpartition(', ')[2]}", source, data)
    return Stored(path, source.parent / files.named(path))


def in_row(row: Mapping[str, Any], column: str, source: Path, where: str, name: str = "") -> Stored:
    """The picture in a column of a row, as `of_cell`."""
    if row.get(column) is None:
        raise ValueError(f"{where}: no `{column}`; columns are {', '.join(row)}")
    return of_cell(row[column], column, source, where, name)


def distinct(stored: Stored, by_name: dict[str, Stored], where: str) -> Stored:
    """The picture under a name that no other picture of `by_name` has, and entered there: a second one of the same name
    but other content gets the row's number. One that is there already is returned from there."""
    if by_name.get(stored.name, stored) != stored:
        stored = replace(stored, name=f"{stored.name} of {where.rpartition(', ')[2]}")
    return by_name.setdefault(stored.name, stored)


def prompt_of(
    row: Mapping[str, Any], other: str | None, where: str, aside: Collection[str], folder: Path | None = None
) -> Prompt | None:
    """The prompt of a row: `prompt`, or the text `other`, None without both; `id`; and as ground truth the columns that
    are not `aside`, whose pictures are named relative to `folder`. ValueError, which begins with `where`."""
    text = worded(row["prompt"], where) if row.get("prompt") is not None else other
    if text is None:
        return None
    number = tables.whole(row.get("id", 0))
    if number is None:
        raise ValueError(f"{where}: `id` must be a whole number, got {row['id']!r}")
    prompt = Prompt(text, {key: value for key, value in row.items() if key not in aside}, number)
    return prompt if folder is None else replace(prompt, wants=images.beside(prompt.wants, folder))


def worded(text: Any, where: str) -> str:
    """A prompt's text. ValueError, which begins with `where`, as `tables.wording`."""
    try:
        return tables.wording(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
