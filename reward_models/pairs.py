"""Read preference pairs: which of two images of one prompt is better, from tables and datasets in several layouts.

`LAYOUTS` lists them. The columns of a table, or those of the first row of JSON lines, decide which one it has.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from reward_models import files, hub, limits, pictures, tables
from reward_models.pictures import Stored
from reward_models.prompt import Prompt
from reward_models.tables import Table

PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
ASIDE = {  # columns of pairs and rankings that are not ground truth
    "image_a", "image_b", "chosen", "rejected", "gap", "aspect", "aspects", "images", "ranks", "ranking",
    "prompt", "id",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, and how much `a` is preferred to `b`, in [0, 1]: 1 for `a`, 0 for `b`, 0.5 for a tie.

    `prompt` is None where the source has none. `gap`, where it is known, is the difference of the two scores that the
    preference comes from, at least 0. `aspect` is what was compared, "" for the images as a whole. Images of one source
    with equal names are the same image.
    """

    a: Stored
    b: Stored
    prompt: Prompt | None
    preference: float
    gap: float | None = None
    aspect: str = ""


def read(source: str | Path, prompt: str | None = None, warn: Callable[[str], None] = lambda line: None) -> list[Pair]:
    """The pairs of a table (`reward_models.tables`) or of a dataset `hf:NAME[/CONFIG]:SPLIT` (`reward_models.hub`), in
    the order of its rows. Pictures are named relative to the table's folder, or lie in the table; none is read yet.

    `prompt` is used for all rows that have none. `warn` gets a line if rows give no pair because their images were not
    compared. ValueError, in one line that names the row, for a source in none of the `LAYOUTS`, for a row that is
    invalid, and for more than `limits.PAIRS` pairs.
    """
    table, path = _opened(source)
    columns = tables.columns(table, source)
    layout = layout_of(columns)
    if layout is None:
        known = "; ".join(f"{one.name}: {', '.join(one.columns)}" for one in LAYOUTS)
        raise ValueError(f"{source}: no pairs; its columns are {', '.join(columns) or 'none'}, and those of {known}")
    by_name: dict[str, Stored] = {}
    lines = (Line(where, row, path, prompt, by_name) for where, row in tables.numbered(table, source))
    pairs: list[Pair] = []
    without = 0
    for some in _groups(lines, layout.group):
        before = len(pairs)
        for pair in layout.pairs(some):
            if len(pairs) == limits.PAIRS:
                raise ValueError(f"{some[0].where}: more than {limits.PAIRS} pairs; split the table")
            pairs.append(pair)
        without += len(some) * (len(pairs) == before)
    if not pairs:
        raise ValueError(f"{source}: no pairs in it")
    if without:
        warn(f"{source}: {without} rows compare no images, and give no pair")
    return pairs


def _opened(source: str | Path) -> tuple[Table, Path]:
    """The table of a source, and its path, below whose folder the pictures are named."""
    try:
        if str(source).startswith("hf:"):
            parts = hub.NAMED.fullmatch(str(source))
            if parts is None or parts["column"]:
                raise ValueError("a dataset is named hf:NAME[/CONFIG]:SPLIT")
            name = files.home(parts["name"])
            return hub.read(name, parts["split"]), Path(name).absolute() / "rows"
        path = Path(files.home(str(source)))
        return tables.read(path), path
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or ' '.join(str(error).split())}") from None
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Line:
    """A row of a source: its position in the form used in messages, its cells, the table, the prompt of rows that have
    none, and the pictures of the source by name."""

    where: str
    cells: tables.Row
    source: Path
    other: str | None
    by_name: dict[str, Stored]

    def picture(self, column: str, name: str = "") -> Stored:
        """The picture in a column."""
        return self._distinct(pictures.in_row(self.cells, column, self.source, self.where, name))

    def pictures(self, column: str) -> list[Stored]:
        """The pictures in the list of a column."""
        cells = [*enumerate(self.listed(column), 1)]
        stored = [pictures.of_cell(c, column, self.source, self.where, f"{column} {i} of {self.row}") for i, c in cells]
        return [self._distinct(one) for one in stored]

    def _distinct(self, stored: Stored) -> Stored:
        return pictures.distinct(stored, self.by_name, self.where)

    @property
    def row(self) -> str:
        return self.where.rpartition(", ")[2]

    def listed(self, column: str) -> list[Any]:
        if not isinstance(cell := self.cells.get(column), list):
            raise ValueError(f"{self.where}: `{column}` must be a list, got {str(cell)[:60]!r}")
        return cell

    def numbers(self, column: str) -> list[float]:
        """The finite numbers in the list of a column."""
        return [self._finite(cell, column) for cell in self.listed(column)]

    def number(self, column: str) -> float:
        """The finite number in a column."""
        return self._finite(self.cells.get(column), column)

    def _finite(self, cell: Any, column: str) -> float:
        try:
            if isinstance(cell, int | float | str) and not isinstance(cell, bool) and math.isfinite(float(cell)):
                return float(cell)
        except (ValueError, OverflowError):
            pass
        raise ValueError(f"{self.where}: `{column}` must be a number, got {str(cell)[:60]!r}")

    def prompt(self) -> Prompt | None:
        """The prompt, with all other columns as its ground truth."""
        return pictures.prompt_of(self.cells, self.other, self.where, ASIDE, self.source.parent)

    def text(self, column: str = "prompt") -> Prompt | None:
        """The prompt in a column, without ground truth."""
        cell = self.cells.get(column, self.other)
        return None if cell is None else Prompt(pictures.worded(cell, self.where))


def _groups(lines: Iterable[Line], column: str) -> Iterator[Sequence[Line]]:
    """The lines one by one, or with a column those of equal value together, in the order of their first."""
    if not column:
        yield from ([line] for line in lines)
        return
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line.cells.get(column)), []).append(line)
    yield from groups.values()


# ------------------------------------------------------------------------------------------------------------- layouts


def _choices(lines: Sequence[Line]) -> Iterator[Pair]:
    """`chosen` is a, b or tie; `gap` is the difference of scores; `aspect` is what was compared. `aspects` has a choice
    for each aspect, beside or in place of `chosen`."""
    [line] = lines
    a, b, prompt, of_aspects = (
        line.picture("image_a"),
        line.picture("image_b"),
        line.prompt(),
        line.cells.get("aspects"),
    )
    if of_aspects is None or "chosen" in line.cells:
        gap = line.number("gap") if "gap" in line.cells else None
        if gap is not None and gap < 0:
            raise ValueError(f"{line.where}: `gap` must be at least 0, got {gap}")
        aspect = line.cells.get("aspect", "")
        if not isinstance(aspect, str):
            raise ValueError(f"{line.where}: `aspect` must be a text, got {str(aspect)[:60]!r}")
        yield Pair(a, b, prompt, _preference(line.cells.get("chosen"), "chosen", line.where), gap, aspect)
    if of_aspects is not None:
        if not isinstance(of_aspects, Mapping) or not of_aspects:
            raise ValueError(f"{line.where}: `aspects` must be an object of aspect: a, b or tie")
        for aspect, chosen in of_aspects.items():
            yield Pair(a, b, prompt, _preference(chosen, f"aspects.{aspect}"[:60], line.where), None, aspect)


def _preference(chosen: Any, column: str, where: str) -> float:
    if (preference := PREFERENCES.get(str(chosen).lower())) is None:
        raise ValueError(f"{where}: `{column}` must be a, b or tie, got {str(chosen)[:60]!r}")
    return preference


def _ranking(lines: Sequence[Line]) -> Iterator[Pair]:
    """The rank of each of `images`, 1 for the best one; equal ranks are ties."""
    [line] = lines
    ranks = "ranks" if "ranks" in line.cells else "ranking"
    return _ranked(line.pictures("images"), line.numbers(ranks), line.prompt(), line.where)


def _ranked(images: Sequence[Stored], ranks: Sequence[float], prompt: Prompt | None, where: str) -> Iterator[Pair]:
    """Every two images of a ranking, the smaller rank preferred."""
    if len(images) != len(ranks):
        raise ValueError(f"{where}: {len(images)} images but {len(ranks)} ranks")
    for (a, of_a), (b, of_b) in combinations(zip(images, ranks, strict=True), 2):
        yield Pair(a, b, prompt, 0.5 if of_a == of_b else float(of_a < of_b))


def _pick_a_pic(lines: Sequence[Line]) -> Iterator[Pair]:
    [line] = lines
    if not line.cells.get("has_label", True):
        return
    one, other = line.number("label_0"), line.number("label_1")
    if not 0 <= one <= 1 or one + other != 1:
        raise ValueError(f"{line.where}: `label_0` and `label_1` must be 0, 0.5 or 1 and sum to 1, got {one}, {other}")
    a, b = (line.picture(f"jpg_{k}", str(line.cells.get(f"image_{k}_uid", ""))) for k in (0, 1))
    yield Pair(a, b, line.text("caption"), one)


def _hpd(lines: Sequence[Line]) -> Iterator[Pair]:
    """`human_preference` is higher for the better image: of more than two, those with equal values were not compared.
    `rank` is 1 for the best one."""
    [line] = lines
    images, prompt = line.pictures("image_path"), line.text()
    if "human_preference" not in line.cells:
        return _ranked(images, line.numbers("rank"), prompt, line.where)
    votes = [-vote for vote in line.numbers("human_preference")]
    return (one for one in _ranked(images, votes, prompt, line.where) if len(images) == 2 or one.preference != 0.5)


def _image_reward_db(lines: Sequence[Line]) -> Iterator[Pair]:
    """The rows of a `prompt_id` are one ranking."""
    column = "image_path" if "image_path" in lines[0].cells else "image"
    for line in lines:
        if line.cells.get("prompt") != lines[0].cells.get("prompt"):
            raise ValueError(f"{line.where}: another prompt than {lines[0].row}, with the same `prompt_id`")
    images, ranks = [line.picture(column) for line in lines], [line.number("rank") for line in lines]
    return _ranked(images, ranks, lines[0].text(), lines[0].where)


def _rejected(lines: Sequence[Line]) -> Iterator[Pair]:
    [line] = lines
    yield Pair(line.picture("chosen"), line.picture("rejected"), line.prompt(), 1.0)


@dataclass(frozen=True)
class Layout:
    """A form of pairs: the `columns` that it is recognised by, alternatives separated by `|`; `pairs` of a row or, with
    `group`, of the rows with one value in that column."""

    name: str
    columns: tuple[str, ...]
    pairs: Callable[[Sequence[Line]], Iterator[Pair]]
    group: str = ""


LAYOUTS = (
    Layout("choices", ("image_a", "image_b", "chosen|aspects"), _choices),
    Layout("rankings", ("images", "ranks|ranking"), _ranking),
    Layout("Pick-a-Pic", ("jpg_0", "jpg_1", "label_0", "label_1", "caption"), _pick_a_pic),
    Layout("ImageRewardDB", ("prompt_id", "prompt", "image_path|image", "rank"), _image_reward_db, "prompt_id"),
    Layout("HPD v2", ("prompt", "image_path", "human_preference|rank"), _hpd),
    Layout("chosen and rejected", ("chosen", "rejected"), _rejected),
)


def layout_of(columns: Collection[str]) -> Layout | None:
    """The layout of a table with these columns, None for a table of no pairs."""
    there = {*columns}
    return next((one for one in LAYOUTS if all(there & {*names.split("|")} for names in one.columns)), None)
