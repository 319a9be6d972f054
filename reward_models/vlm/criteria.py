"""The criteria of a checklist, yes-or-no questions about a picture from people, by rule or from a model, and how often
images meet them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from reward_models.errors import first_problem

KINDS = ("object", "count", "attribute", "relation", "text", "style")
MOST = 20  # criteria of a prompt
CRITIQUES = 5  # of the last images that failed


@checked(frozen=True, config=ConfigDict(extra="forbid", str_strip_whitespace=True))
class Criterion:
    """`question` is answered by yes or no; yes is good. `depends`: the numbers, from 1, of earlier criteria without
    which it makes no sense. `fix`: a few words that would add it to the request."""

    question: str = Field(min_length=3, max_length=500)
    kind: str = Field("object", pattern=f"^({'|'.join(KINDS)})$")
    weight: int | float = Field(1.0, gt=0, le=100)
    depends: tuple[int, ...] = ()
    fix: str = ""


CRITERIA = TypeAdapter(list[Criterion])


def criteria_of(rows: Any) -> list[Criterion]:
    """The criteria in a JSON value. ValueError, in one line, if they are invalid."""
    try:
        criteria = CRITERIA.validate_python(rows)
    except ValidationError as error:
        raise ValueError(f"criteria: {first_problem(error.errors())}") from None
    if not 1 <= len(criteria) <= MOST:
        raise ValueError(f"criteria: {len(criteria)} of them; 1 to {MOST} are needed")
    for number, criterion in enumerate(criteria, 1):
        if not all(0 < parent < number for parent in criterion.depends):
            raise ValueError(f"criteria: number {number} depends on {list(criterion.depends)}; earlier ones are needed")
    return criteria


def by_rule(wants: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of a prompt in GenEval's layout: presence, number, colour, size and position of each object, and the
    words to be written. Empty if the prompt has no such ground truth."""
    criteria: list[Criterion] = []
    numbers: list[int] = []
    for item in wants.get("include", ()):
        name, count = str(item["class"]), int(item.get("count", 1))
        criteria.append(Criterion(f"Is there a {name} in the picture?", "object", 1.0, (), f"a {name}"))
        numbers.append(parent := len(criteria))
        number = f"exactly {count} {name}{'' if count == 1 else 's'}"
        there = f"Is there {number}" if count == 1 else f"Are there {number}"
        criteria.append(Criterion(f"{there} in the picture, no more and no fewer?", "count", 1.0, (parent,), number))
        for key in ("color", "size"):
            if item.get(key):
                question = f"Is every {name} that was asked for {item[key]}?"
                criteria.append(Criterion(question, "attribute", 1.0, (parent,), f"the {name} {item[key]}"))
        if item.get("position"):
            where, other = item["position"]
            arrangement = f"the {name} {where} the {wants['include'][other]['class']}"
            if other < len(numbers) - 1:
                criteria.append(Criterion(f"Is {arrangement}?", "relation", 1.0, (parent, numbers[other]), arrangement))
            else:
                criteria.append(Criterion(f"Is {arrangement}?", "relation", 1.0, (parent,), arrangement))
    if isinstance(wants.get("text"), str):
        criteria.append(
            Criterion(
                f"Do the words in the picture read {wants['text']!r}?", "text", 1.0, (), f"the text {wants['text']!r}"
            )
        )
    return criteria


@dataclass
class Tally:
    """How many `images` of a prompt were judged, how many of them met each criterion, and what the last ones lacked."""

    images: int = 0
    met: list[int] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)

    def add(self, passed: Sequence[bool], critique: str) -> None:
        """Count one image."""
        self.images += 1
        self.met = [n + answer for n, answer in zip(self.met or [0] * len(passed), passed, strict=True)]
        if not all(passed):
            self.critiques = [*self.critiques, critique][-CRITIQUES:]

    def constant(self) -> list[int]:
        """The numbers, from 1, of the criteria that all images met, or that none did."""
        return [number for number, count in enumerate(self.met, 1) if count in (0, self.images)]


def without(criteria: Sequence[Criterion], retired: Collection[int]) -> list[Criterion]:
    """The criteria but those of the numbers `retired`, from 1, with what they depend on renumbered."""
    left = [number for number in range(1, len(criteria) + 1) if number not in retired]
    place = {number: k for k, number in enumerate(left, 1)}
    return [
        replace(criteria[number - 1], depends=tuple(place[n] for n in criteria[number - 1].depends if n in place))
        for number in left
    ]
