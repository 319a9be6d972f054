"""What a judge wrote, read tolerantly: JSON, fenced or among other text, or headings and lines.

Models leave out what they were asked for, wrap it, and put it in bold; all of that is read. What is then still unclear,
a score without a scale, a box outside the image, is refused with a ValueError that names it: a guess would train.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from reward_models.regions import Region, inside

Coordinates = Literal["pixels", "thousand", "unit"]
UNITS: dict[str, str] = {
    "pixels": "pixels of the picture",
    "thousand": "thousandths of the picture's width and height",
    "unit": "parts of the picture's width and height, 0 to 1",
}
BOX, SCORE = ("box", "bbox", "bbox_2d"), ("score", "credit", "reward")
LABEL, NUMBER = ("label", "object", "identified_object"), ("region", "region_id", "id")
SIZE, LISTS = ("image_size", "size"), ("regions", "objects", "vlm_rewards", "rewards")
VALUE = r"([-+−–]?\s*(?:\d+\.?\d*|\.\d+))\s*(?:/\s*(\d+(?:\.\d+)?))?"
REGION = re.compile(r"^[\s#*>-]*region\s*(?:id)?\s*[:#\[(]?\s*(\d+)", re.IGNORECASE | re.MULTILINE)
SHOWN = 120  # letters of a reply in an error


def answer(reply: str) -> str:
    """The reply without what was thought before it. ValueError if the thinking has no end."""
    _, end, rest = reply.rpartition("</think>")
    if not end and "<think>" in reply:
        raise ValueError("the reply ends before it has thought to an end")
    return (rest if end else reply).strip()


def shown(reply: str) -> str:
    """The beginning of a reply, in one line."""
    line = " ".join(reply.split())
    return repr(line[:SHOWN] + ("…" if len(line) > SHOWN else ""))


def values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, outermost ones, in order."""
    decoder, place = json.JSONDecoder(), 0
    while (start := re.compile(r"[\[{]").search(text, place)) is not None:
        try:
            found, place = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            place = start.end()
            continue
        yield found


def overall(reply: str) -> tuple[float, str]:
    """The score in [-1, 1] of the whole image and the reason for it."""
    text = answer(reply)
    for found in values(text):
        if isinstance(found, dict):
            own = plain(found)
            score = one_of(own, SCORE)
            if score is not None:
                return _in_range(score), str(own.get("reason") or "")
    return _in_range(*_after(text, "score")), _line(text, "reason")


def places(
    reply: str, size: tuple[int, int], coordinates: str = "pixels", proposed: Sequence[Sequence[int | float]] = ()
) -> list[Region]:
    """The regions a judge names in an image of `size` (height, width). `coordinates`: what boxes count in, see `UNITS`.
    With `proposed` boxes, in pixels, a region is named by its number, from 1. ValueError names the region that cannot
    be right."""
    if coordinates not in UNITS:
        raise ValueError(f"no coordinates called {coordinates!r}; known: {', '.join(UNITS)}")
    text = answer(reply)
    rows = _listed(text)
    if rows is None:
        raise ValueError("the reply names no regions")
    regions = []
    for place, row in enumerate(rows, 1):
        number = one_of(row, NUMBER)
        where = f"region {place if number is None else number}"
        try:
            regions.append(_region(row, number, size, coordinates, proposed))
            inside(regions[-1:], size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return regions


def _listed(text: str) -> list[dict[str, Any]] | None:
    """A row for each region; None if there is no list of them."""
    for found in values(text):
        if isinstance(found, dict):
            own = plain(found)
            inner = one_of(own, LISTS)
            found = inner if isinstance(inner, list) else [found] if one_of(own, SCORE) is not None else None
        if isinstance(found, list) and all(isinstance(row, dict) for row in found):
            return [plain(row) for row in found]
    heads = [*REGION.finditer(text)]
    if not heads:
        return None
    ends = [head.start() for head in heads[1:]] + [len(text)]
    blocks = [(int(head[1][:9]), text[head.end() : end]) for head, end in zip(heads, ends, strict=True)]
    return [_block(number, block) for number, block in blocks]


def _block(number: int, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {"region": number, "reason": _line(text, "reason")}
    row["label"] = _line(text, "identified object") or _line(text, "label")
    box = re.search(r"box[^\[(\n]*[\[(]([^\])\n]*)[\])]", text, re.IGNORECASE)
    if box:
        row["box"] = [_number(part) for part in box[1].split(",")]
    row["score"] = _after(text, "score")
    return row


def _region(
    row: Mapping[str, Any],
    number: Any,
    size: tuple[int, int],
    coordinates: str,
    proposed: Sequence[Sequence[int | float]],
) -> Region:
    score = one_of(row, SCORE)
    credit = _in_range(*score) if isinstance(score, tuple) else _in_range(score)
    if proposed:
        if not isinstance(number, int) or not 1 <= number <= len(proposed):
            raise ValueError(f"there is no region {number!r}; {len(proposed)} were given")
        box = proposed[number - 1]
    else:
        box = scaled(one_of(row, BOX), size, coordinates)
        meant = one_of(row, SIZE)
        if meant is not None and meant != [size[1], size[0]]:
            raise ValueError(f"its box is of an image of {meant} pixels, this one is {[size[1], size[0]]}")
    return Region(tuple(box), credit, str(one_of(row, LABEL) or ""), str(row.get("reason") or ""))


def scaled(box: Any, size: tuple[int, int], coordinates: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(edge) for edge in box):
        raise ValueError(f"box {box!r:.80} is not four numbers")
    whole = {"pixels": (1, 1), "thousand": (size[1] / 1000, size[0] / 1000), "unit": (size[1], size[0])}[coordinates]
    return [float(edge) * whole[k % 2] for k, edge in enumerate(box)]


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """With keys in lower case and without spaces or stars."""
    return {re.sub(r"[\s-]+", "_", str(key).strip(" *").lower()): value for key, value in row.items()}


def one_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # not for NaN


def _number(text: str) -> float | str:
    try:
        return float(re.sub(r"\s+", "", text.replace("−", "-").replace("–", "-")))
    except ValueError:
        return text.strip()


def _after(text: str, name: str) -> tuple[str | None, str | None]:
    """The number after a heading, as written, and what it is out of."""
    found = re.search(rf"{name}\s*\W*?[:=]\W*?\s*{VALUE}", text, re.IGNORECASE)
    return (found[1], found[2]) if found else (None, None)


def _line(text: str, name: str) -> str:
    """What stands after a heading on its line, without stars."""
    found = re.search(rf"^[\s#*>-]*{name}\s*\**\s*:\s*(.*)$", text, re.IGNORECASE | re.MULTILINE)
    return found[1].strip(" *\"'") if found else ""


def _in_range(value: Any, out_of: Any = None) -> float:
    """A score in [-1, 1], of a number, or of text that may say it is out of 1."""
    if isinstance(value, str):
        pair = re.fullmatch(rf"\W*?{VALUE}\W*", value)
        value, out_of = (_number(pair[1]), pair[2] or out_of) if pair else (value, out_of)
    if value is None:
        raise ValueError("the score is missing")
    if out_of is not None and float(out_of) != 1:
        raise ValueError(f"the score is {value} out of {out_of}; the scale is -1 to 1")
    if not _is_number(value) or not -1 <= value <= 1:
        raise ValueError(f"the score is {value!r:.40}; a number from -1 to 1 is needed")
    return float(value)
