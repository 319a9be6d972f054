"""Tolerant parsers of judges' replies: JSON, fenced or among other text, or headings and lines.

Models leave parts out, wrap them, and write them in bold; the parsers accept that. Anything still ambiguous or wrong,
such as a score off its scale or a box outside the image, is rejected with a ValueError that names it, because a guess
would be trained on. Every parser takes time linear in the reply, which may be any text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from reward_models import limits
from reward_models.regions import Region, inside
from reward_models.vlm.scales import Scale

Value = TypeVar("Value")
UNITS: dict[str, str] = {
    "pixels": "pixels of the picture",
    "thousand": "thousandths of the picture's width and height",
    "unit": "parts of the picture's width and height, 0 to 1",
}
BOX, SCORE = ("box", "bbox", "bbox_2d"), ("score", "credit", "reward")
LABEL, NUMBER = ("label", "object", "identified_object"), ("region", "region_id", "id")
SIZE, LISTS = ("image_size", "size"), ("regions", "objects", "vlm_rewards", "rewards")
CREDIT = Scale(-1, 1)
MARKS = " \t\r#*_>`~|•"  # that may surround a heading
TITLES = ("score", "final score", "overall score")
REGION = re.compile(r"region\s?(?:id)?\s?[:#\[(]?\s?(\d{1,9})(?!\d)", re.IGNORECASE)
SHOWN = 120  # characters of a reply in an error message
OPENING = re.compile(r"[\[{]")
ITEM = re.compile(r"\s{0,99}(?:#|[*>-]{0,9}\s?\d{1,3}[.):](?:\s|$))")
TRIES = 1000  # opening brackets of a reply at which JSON is tried


def answer(reply: str, cut: bool = False) -> str:
    """The reply without its thinking part and, if it was `cut` off, without its last line, which may be incomplete.
    ValueError if the thinking has no end, or the reply is longer than `limits.REPLY`."""
    if len(reply) > limits.REPLY:
        raise ValueError(f"the reply has {len(reply)} characters; at most {limits.REPLY} are read")
    _, end, rest = reply.rpartition("</think>")
    if not end and "<think>" in reply:
        raise ValueError("the reply ends within its thinking part")
    text = rest if end else reply
    return (text.rpartition("\n")[0] if cut else text).strip()


def excerpt(reply: str) -> str:
    """The beginning of a reply, in one line."""
    line = " ".join(reply[: 10 * SHOWN].split())
    return repr(line[:SHOWN] + ("…" if len(line) > SHOWN or len(reply) > 10 * SHOWN else ""))


def printable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot encode, replaced."""
    return text.encode("utf-8", "replace").decode()


def values(text: str) -> Iterator[Any]:
    """The outermost JSON objects and lists in a text, in order. Parts of a value that breaks off are skipped, and a
    value nested too deeply for the parser ends the search. ValueError for an object that has a key twice with different
    values."""
    decoder, position = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_unique_keys), 0
    for _ in range(TRIES):  # an error counts the lines before it, so its cost grows with the text
        start = OPENING.search(text, position)
        if start is None:
            return
        try:
            value, position = decoder.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            position = max(start.end(), error.pos)  # searching the parsed part again would take quadratic time
            continue
        except RecursionError:
            return
        yield value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row and row[key] != value:
            raise ValueError(f"the reply gives {key[:SHOWN]!r} twice, with different values")
        row[key] = value
    return row


def unanimous(candidates: Iterable[Value]) -> Value | None:
    """The value that all candidates agree on; None without candidates. ValueError if two differ."""
    first, *others = [*candidates] or [None]
    if any(other != first for other in others):
        raise ValueError("the reply gives two different answers")
    return first


def heading(line: str, dashes: bool = True) -> tuple[str, str, str]:
    """Title, note and remainder of a line such as `**2. Visual Quality (1-4):** 3.5`: the title in lower case, without
    number and marks, the note with its brackets, the remainder unchanged. A line without a colon is all title, unless
    the cells of a table or, with `dashes`, a dash divide it."""
    text = line.lstrip(MARKS + "-–").rstrip()
    if text.lower().startswith(("<score>", "<rating>")):
        return "score", "", text
    if number := re.match(r"\d{1,3}\s?[.):]", text):
        text = text[number.end() :].lstrip(MARKS)
    ends = [position for mark in ":=：" if (position := text.find(mark)) >= 0]
    rest = ""
    if ends:
        text, rest = text[: min(ends)], text[min(ends) + 1 :]
    elif "|" in text.rstrip("| "):
        text, _, rest = text.partition("|")
        rest = rest.rstrip("| ").replace("|", " - ")
    elif dashes and (dash := re.search(r" [-–—] ", text)):
        text, rest = text[: dash.start()], text[dash.end() :]
    title, note = text.strip(MARKS), ""
    if title.endswith(")") and "(" in title:
        title, note = title[: title.rfind("(")], title[title.rfind("(") :]
    return named(title), note, rest


def named(title: str) -> str:
    """A title in normal form: lower case, words joined by single spaces."""
    return re.sub(r"[\s_&-]+", " ", title).strip(MARKS + ":.").lower()


def after(lines: Sequence[str], number: int, rest: str) -> str:
    """The content of a heading at `lines[number]`: the remainder of its line, or the next line that is not empty,
    unless that is a heading or an item of a list."""
    if rest.strip(MARKS):
        return rest
    line = next((line for line in lines[number + 1 : number + 4] if line.strip(MARKS)), "")
    return "" if ITEM.match(line) or ":" in line else line


def titled(text: str, titles: Sequence[str], dashes: bool = True) -> list[tuple[str, str]]:
    """The content of each heading with one of the titles, and the heading's note, in order."""
    lines = text.split("\n")
    heads = ((number, *heading(line, dashes)) for number, line in enumerate(lines))
    return [(after(lines, number, rest), note) for number, title, note, rest in heads if title in titles]


def score_of(text: str, scale: Scale, titles: Sequence[str] = TITLES, what: str = "the score") -> float | None:
    """The score under the headings `titles` of a text. ValueError, naming `what`, if it is missing, not a single number
    on the scale, or given twice with different values."""
    lines = titled(text, titles, dashes=scale.low >= 0)  # if scores may be negative, a dash may be a sign
    scores = [scale.read(line, what, note) for line, note in lines]
    if not scores:
        return scale.read(None, what)
    if any(score != scores[0] for score in scores):
        raise ValueError(f"{what} is given twice: {' and '.join(map(str, dict.fromkeys(scores)))}")
    return scores[0]


def overall(reply: str, cut: bool = False) -> tuple[float, str]:
    """The score in [-1, 1] of the image and the reason for it."""
    text = answer(reply, cut)
    rows = [row for row in map(plain, (value for value in values(text) if isinstance(value, dict))) if _has_score(row)]
    score = unanimous(_credit(row) for row in rows)
    if score is not None:
        return score, str(rows[0].get("reason") or "")
    return score_of(text, CREDIT), _line(text, "reason")


def _has_score(row: Mapping[str, Any]) -> bool:
    return one_of(row, SCORE) is not None


def _credit(row: Mapping[str, Any]) -> float:
    """The score of a row, under any of its names; ValueError if two of them differ."""
    return (
        unanimous(CREDIT.read(row[name]) for name in SCORE if row.get(name) is not None)
        if _has_score(row)
        else CREDIT.read(None)
    )


def read_regions(
    reply: str,
    size: tuple[int, int],
    coordinates: str = "pixels",
    proposed: Sequence[Sequence[int | float]] = (),
    cut: bool = False,
) -> list[Region]:
    """The regions that a judge names in an image of `size` (height, width). `coordinates`: the unit of boxes, see
    `UNITS`. With `proposed` boxes, in pixels, a region is named by its number, from 1. ValueError names the invalid
    region."""
    if coordinates not in UNITS:
        raise ValueError(f"no coordinates called {coordinates!r}; known: {', '.join(UNITS)}")
    text = answer(reply)
    rows = _listed(text, cut)
    if rows is None:
        raise ValueError("the reply names no regions")
    regions, numbers = [], []
    for index, row in enumerate(rows, 1):
        number = one_of(row, NUMBER)
        try:
            regions.append(_region(row, number, size, coordinates, proposed))
            inside(regions[-1:], size)
        except ValueError as error:
            raise ValueError(f"region {index if number is None else number}: {error}") from None
        numbers.append(number)
    if proposed and sorted(numbers) != [*range(1, len(proposed) + 1)]:
        raise ValueError(f"the reply scores the regions {sorted(numbers)}; each of {len(proposed)} once is needed")
    return regions


def _listed(text: str, cut: bool) -> Iterable[dict[str, Any]] | None:
    """A row for each region, parsed lazily; None if there is no list of regions."""
    rows = unanimous(filter(lambda rows: rows is not None, map(_rows, values(text))))
    if rows is not None:
        return rows
    blocks: list[tuple[int, list[str]]] = []
    for line in text.split("\n"):
        head = REGION.match(line.lstrip(MARKS + "-"))
        if head:
            blocks.append((int(head[1]), []))
        elif blocks:
            blocks[-1][1].append(line)
    if blocks and cut:
        raise ValueError("the reply ends before all regions are listed")
    return (_block(number, "\n".join(lines)) for number, lines in blocks) if blocks else None


def _rows(value: Any) -> list[dict[str, Any]] | None:
    """The rows in a JSON value, if it is a list of regions, an object with such a list, or one region."""
    if isinstance(value, dict):
        row = plain(value)
        inner = one_of(row, LISTS)
        value = inner if isinstance(inner, list) else [value] if _has_score(row) else None
    return (
        [plain(row) for row in value] if isinstance(value, list) and all(isinstance(r, dict) for r in value) else None
    )


def _block(number: int, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {"region": number, "reason": _line(text, "reason")}
    row["label"] = _line(text, "identified object") or _line(text, "label")
    for line, _ in titled(text, (*BOX, "bounding box"))[:1]:
        _, opened, inner = line.replace("(", "[").replace(")", "]").partition("[")
        row["box"] = [_number(part) for part in inner.partition("]")[0].split(",")] if opened else line
    row["score"] = score_of(text, CREDIT)
    return row


def _region(
    row: Mapping[str, Any],
    number: Any,
    size: tuple[int, int],
    coordinates: str,
    proposed: Sequence[Sequence[int | float]],
) -> Region:
    credit = _credit(row)
    if proposed:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= len(proposed):
            raise ValueError(f"there is no region {number!r}; there are {len(proposed)}")
        box = proposed[number - 1]
    else:
        box = scaled(one_of(row, BOX), size, coordinates)
        reported = one_of(row, SIZE)
        if reported is not None and reported != [size[1], size[0]]:
            raise ValueError(f"its box refers to an image of {reported} pixels, this one is {[size[1], size[0]]}")
    return Region(tuple(box), credit, str(one_of(row, LABEL) or ""), str(row.get("reason") or ""))


def scaled(box: Any, size: tuple[int, int], coordinates: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(edge) for edge in box):
        raise ValueError(f"box {box!r:.80} is not four numbers")
    unit = {"pixels": (1, 1), "thousand": (size[1] / 1000, size[0] / 1000), "unit": (size[1], size[0])}[coordinates]
    return [float(edge) * unit[k % 2] for k, edge in enumerate(box)]


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its keys in lower case, without spaces or stars."""
    return {re.sub(r"[\s-]+", "_", str(key).strip(" *").lower()): value for key, value in row.items()}


def one_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # false for NaN


def _number(text: str) -> float | str:
    plain_digits = re.sub(r"\s+", "", text.replace("−", "-").replace("–", "-"))
    return float(plain_digits) if re.fullmatch(r"[+-]?\d{1,9}(?:\.\d{1,17})?", plain_digits) else text.strip()


def _line(text: str, title: str) -> str:
    """The content of the first heading with the title, without marks."""
    return next((line for line, _ in titled(text, (title,))), "").strip(MARKS + "\"'")
