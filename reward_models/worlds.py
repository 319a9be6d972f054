"""What the embedded worlds share: requests in the layout of GenEval's metadata, their sentences and meanings, single
changes of them, and places for things.

A request has a `tag`, and in `include` an entry for each kind of thing with `class`, `count` and, where they are asked
for, `color`, `size`, `style` and `position` ([relation, index of the other entry]). A request for letters has `text`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from reward_models.errors import first_problem

COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOST = 16  # things or letters of a request
ATTRIBUTES = ("color", "size", "style")  # of an entry
Relation = Literal["left of", "right of", "above", "below"]
IRREGULAR = {"fish": "fish", "knife": "knives", "leaf": "leaves", "snowman": "snowmen"}


class Entry(BaseModel):
    """An entry of a request's `include`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    noun: str = Field(alias="class")
    count: int = Field(ge=1)
    color: str = ""
    size: str = ""
    style: str = ""
    position: Annotated[tuple[Relation, Literal[1]], Strict(False)] | None = None


class Request(BaseModel):
    """The request of a world in a prompt's ground truth, which may hold more for other scorers."""

    model_config = ConfigDict(strict=True)

    tag: str
    text: str = Field("", max_length=MOST)
    include: list[Entry] = []

    @model_validator(mode="after")
    def _consistent(self) -> "Request":
        if not (self.text if self.tag == "text" else self.include):
            raise ValueError(f"it has the tag {self.tag!r} but no `{'text' if self.tag == 'text' else 'include'}`")
        if (things := sum(entry.count for entry in self.include)) > MOST:
            raise ValueError(f"{things} things are requested, more than {MOST}")
        related = [bool(entry.position) for entry in self.include]
        if any(related) != (self.tag == "position") or any(related[1:]):
            raise ValueError("`position` belongs to the first entry, with the tag 'position'")
        if any(related) and [entry.count for entry in self.include] != [1, 1]:
            raise ValueError("a relation is one of two single things")
        return self


@dataclass(frozen=True)
class Words:
    """What requests of a world may name: `nouns`, the `values` of each attribute, and `letters`."""

    nouns: Collection[str]
    values: Mapping[str, Collection[str]]
    letters: Collection[str] = ()

    def check(self, wants: Mapping[str, Any], scorer: str) -> None:
        """ValueError for a request that is malformed, or has a word of another world: `scorer` could only call every
        picture wrong."""
        other = "include" if wants["tag"] == "text" else "text"  # for another scorer
        try:
            request = Request.model_validate({key: value for key, value in wants.items() if key != other})
        except ValidationError as error:
            problems = [{**problem, "loc": ("wants", *problem["loc"])} for problem in error.errors()]
            raise ValueError(first_problem(problems)) from None
        words = [(letter, self.letters) for letter in request.text]
        for entry in request.include:
            given = entry.model_dump(include={*ATTRIBUTES}, exclude_unset=True)
            words += [(entry.noun, self.nouns), *((word, self.values.get(name, ())) for name, word in given.items())]
        if unknown := [word for word, known in words if word not in known]:
            raise ValueError(f"the prompt asks for {unknown[0]!r:.80}, which `{scorer}` does not know")


def thing(
    noun: str, colour: str | None = None, count: int = 1, size: str | None = None, style: str | None = None
) -> dict[str, Any]:
    """One entry of a request's `include`; attributes that are not requested are absent."""
    entry = {"class": noun, "count": count, "color": colour, "size": size, "style": style}
    return {key: value for key, value in entry.items() if value is not None}


def plural(noun: str) -> str:
    """The plural of an English noun, "tennis rackets"; exceptions are in `IRREGULAR`."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def one(words: str) -> str:
    """The words with an article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase(item: dict[str, Any]) -> str:
    """`{"class": "square", "count": 3, "color": "green"}` -> "three green squares". A style is not named."""
    noun = item["class"] if item["count"] == 1 else plural(item["class"])
    words = " ".join(word for word in (item.get("size"), item.get("color"), noun) if word)
    number = {count: word for word, count in COUNTS.items()}
    return one(words) if item["count"] == 1 else f"{number[item['count']]} {words}"


def caption(wants: dict[str, Any]) -> str:
    """The sentence for a request."""
    if wants["tag"] == "text":
        return f'the text "{" ".join(wants["text"])}"'
    phrases = [phrase(item) for item in wants["include"]]
    if wants["tag"] == "position":
        return f"{phrases[0]} {wants['include'][0]['position'][0]} {phrases[1]}"
    if wants["tag"] == "style":
        return f"a {wants['include'][0]['style']} drawing of {phrases[0]}"
    return " and ".join(phrases)


def changed(
    wants: dict[str, Any],
    kind: str,
    rng: np.random.Generator,
    nouns: Collection[str],
    values: dict[str, Collection[str]],
    counts: Collection[int],
) -> dict[str, Any] | None:
    """The request with one thing changed that is of a `kind`: the noun of an "object", an "attribute" (`values` has
    those of each), the "relation" to its opposite, or a "count". None if it has nothing of this kind. No picture of the
    one fulfils the other."""
    include = [dict(item) for item in wants["include"]]
    alone = sum(item["count"] for item in include) == 1
    options: list[tuple[int, str, Any]] = []
    for k, item in enumerate(include):
        taken = {name: {other.get(name) for other in include} for name in ("class", *ATTRIBUTES)}
        if kind == "object":
            options += [(k, "class", noun) for noun in nouns if noun not in taken["class"]]
        for name in ATTRIBUTES:
            # two large things would not fit on a picture
            if kind == "attribute" and name in item and (alone or name != "size"):
                options += [(k, name, value) for value in values[name] if value not in taken[name]]
        if kind == "relation" and "position" in item:
            relation, other = item["position"]
            options.append((k, "position", [OPPOSITE[relation], other]))
        if kind == "count" and wants["tag"] == "counting":
            options += [(k, "count", count) for count in (1, *counts) if count != item["count"]]
    if not options:
        return None
    place, name, value = options[rng.integers(len(options))]
    include[place][name] = value
    return wants | {"include": include}


def meaning(wants: dict[str, Any]) -> str:
    """A string that is the same for captions with the same meaning: "a above b" and "b below a" must share a split."""
    include = [dict(item) for item in wants["include"]]
    if wants["tag"] == "position":
        relation = include[0].pop("position")[0]
        if relation in ("right of", "below"):
            include.reverse()
            relation = OPPOSITE[relation]
        return f"{relation} {include}"
    return f"{wants.get('text', '')} {sorted(map(str, include))}"


def centres(
    radii: Sequence[float],
    rng: np.random.Generator,
    side: int,
    gap: int | float,
    relation: str | None = None,
    along: int | float = 0,
    ahead: int | float = 0,
) -> list[tuple[float, float]]:
    """Random centres (x, y) of things with these half sides in a square picture: `gap` between their bounding boxes and
    1 px to the edge. With a relation, the distance of the first to the second is over `along` on its axis, and over
    that on the other by more than `ahead`. All in px."""
    while True:
        places = [tuple(rng.uniform(r + 1, side - r - 1, 2)) for r in radii]
        apart = all(
            max(abs(ax - bx), abs(ay - by)) > ra + rb + gap
            for ((ax, ay), ra), ((bx, by), rb) in combinations(zip(places, radii, strict=True), 2)
        )
        if apart and (relation is None or related(*places, relation, along, ahead)):
            return places


def related(
    first: tuple[float, float],
    second: tuple[float, float],
    relation: str,
    along: int | float,
    ahead: int | float = 0,
) -> bool:
    """Whether a relation holds between two centres (x, y), see `centres`."""
    sign_x, sign_y = RELATIONS[relation]
    (ax, ay), (bx, by) = first, second
    distance = (ax - bx) * sign_x + (ay - by) * sign_y
    across = abs((ax - bx) * sign_y + (ay - by) * sign_x)
    return bool(distance >= along and distance > across + ahead)
