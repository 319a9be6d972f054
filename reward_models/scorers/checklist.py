"""`checklist`: yes or no to each of a prompt's own criteria, by an image-text model.

Criteria are binary, for judges that grade as a whole are easier to please. They come from `Prompt.wants["criteria"]`,
else by rule from GenEval's layout (`include`, `text`), else from the model itself, which writes them once per prompt;
`written` keeps those in a file. A criterion that depends on one that failed has failed; a reply that leaves one without
an answer fails the image, for the share of the others would be another number. Components, shares of weight in [0, 1],
higher is better, roughly comparable across prompts:

- `share`: of all criteria.
- `object`, `count`, `attribute`, `relation`, `text`, `style`: of those of a kind, NaN where there are none.

What failed is said in the critique, and asked for once more in the revised request; evidence boxes become regions of
credit 1 or -1, labelled with their criterion. After RubiCap, CM2 and DSG; words and rules are ours. Licence: the
model's own.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from reward_models import files
from reward_models.regions import Region, inside
from reward_models.scoring import each
from reward_models.service.client import first
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, replies, scales, templates, types

KINDS = ("object", "count", "attribute", "relation", "text", "style")
MOST = 20  # criteria of a prompt
VERDICTS = {
    "type": "object",
    "properties": {
        "verdicts": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer"},
                    "evidence": {"type": "string"},
                    "box": {"type": ["array", "null"], "items": {"type": "number"}},
                    "answer": {"type": "boolean"},
                },
                "required": ["id", "evidence", "box", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["verdicts"],
    "additionalProperties": False,
}
OTHER = re.compile(r"[ .,;:(!–—-]*(?:yes|no|true|false|or)\b")
NUMBERED = re.compile(r"(\d{1,3})\s?[.):](.*)")
YES, NO = {"yes", "true", "pass", "passed", "1", "y"}, {"no", "false", "fail", "failed", "0", "n"}


@checked(frozen=True, config=ConfigDict(extra="forbid", str_strip_whitespace=True))
class Criterion:
    """`question` is answered by yes or no, yes is good. `depends` are numbers, from 1, of criteria above it without
    which it makes no sense. `fix`: what a request would say to have it, in a few words."""

    question: str = Field(min_length=3, max_length=500)
    kind: str = Field("object", pattern=f"^({'|'.join(KINDS)})$")
    weight: int | float = Field(1.0, gt=0, le=100)
    depends: tuple[int, ...] = ()
    fix: str = ""


CRITERIA = TypeAdapter(list[Criterion])


def criteria_of(rows: Any) -> list[Criterion]:
    """ValueError, in one line, if these are no criteria."""
    try:
        found = CRITERIA.validate_python(rows)
    except ValidationError as error:
        raise ValueError(f"criteria: {first(error)}") from None
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"criteria: {len(found)} of them; 1 to {MOST} are needed")
    for number, own in enumerate(found, 1):
        if not all(0 < parent < number for parent in own.depends):
            raise ValueError(f"criteria: number {number} depends on {list(own.depends)}; only those above it can be")
    return found


def by_rule(wants: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of a prompt in GenEval's layout: each object there, in its number, with its colour and size, in its
    place, and the words to be written. Empty if the prompt has no such ground truth."""
    found: list[Criterion] = []
    numbers: list[int] = []
    for item in wants.get("include", ()):
        name, count = str(item["class"]), int(item.get("count", 1))
        found.append(Criterion(f"Is there a {name} in the picture?", "object", 1.0, (), f"a {name}"))
        numbers.append(parent := len(found))
        number = f"exactly {count} {name}{'' if count == 1 else 's'}"
        there = f"Is there {number}" if count == 1 else f"Are there {number}"
        found.append(Criterion(f"{there} in the picture, no more and no fewer?", "count", 1.0, (parent,), number))
        for key in ("color", "size"):
            if item.get(key):
                question = f"Is every {name} that was asked for {item[key]}?"
                found.append(Criterion(question, "attribute", 1.0, (parent,), f"the {name} {item[key]}"))
        if item.get("position"):
            where, other = item["position"]
            place = f"the {name} {where} the {wants['include'][other]['class']}"
            if other < len(numbers) - 1:
                found.append(Criterion(f"Is {place}?", "relation", 1.0, (parent, numbers[other]), place))
            else:
                found.append(Criterion(f"Is {place}?", "relation", 1.0, (parent,), place))
    if isinstance(wants.get("text"), str):
        found.append(
            Criterion(
                f"Do the words in the picture read {wants['text']!r}?", "text", 1.0, (), f"the text {wants['text']!r}"
            )
        )
    return found


@dataclass(frozen=True)
class Verdict:
    """The answer; why; and where, in pixels, if the judge says so."""

    answer: bool
    why: str = ""
    box: tuple[int | float, ...] | None = None


def read(text: str, count: int, size: tuple[int, int], coordinates: str = "pixels", cut: bool = False) -> list[Verdict]:
    """The verdicts on `count` criteria in a reply about a picture of `size` (height, width). ValueError if a criterion
    has no answer or two, or a box is not in the picture."""
    verdicts: dict[int, Verdict] = {}
    for number, row in _listed(replies.answer(text, cut)):
        if not 1 <= number <= count:
            raise ValueError(f"there is no criterion {number}; {count} were given")
        answer = _answer(replies.one_of(row, ("answer", "verdict", "pass", "satisfied")), number)
        box = row.get("box")
        try:
            place = None if not box else tuple(replies.scaled(box, size, coordinates))
            if place:
                inside([Region(place, 0)], size)
        except ValueError as error:
            raise ValueError(f"criterion {number}: {error}") from None
        why = str(replies.one_of(row, ("evidence", "why", "reason")) or "")
        if verdicts.setdefault(number, verdict := Verdict(answer, why, place)).answer != verdict.answer:
            raise ValueError(f"criterion {number} has two answers")
    if not verdicts:
        raise ValueError("the reply answers no criterion")
    missing = [number for number in range(1, count + 1) if number not in verdicts]
    if missing:
        raise ValueError(f"criterion {missing[0]} has no answer")
    return [verdicts[number] for number in range(1, count + 1)]


def _answer(value: Any, number: int) -> bool:
    """Yes or no alone, perhaps with a note behind it."""
    words = " ".join(scales.unwrapped(str(value)).lower().split())
    head = re.match(rf"(?:{'|'.join(YES | NO)})\b(?!\.\d)", words)
    rest = words[head.end() :] if head else words
    alone = re.fullmatch(r"(?s)(?:[.,;:(!].*| [-–—] .*)?", rest) and not OTHER.match(rest) and " or " not in rest
    if head is None or not alone:
        raise ValueError(f"criterion {number}: the answer is {words[:99]!r:.40}; yes or no is needed")
    return head[0] in YES


def _listed(text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = replies.alike(rows for value in replies.values(text) if (rows := _numbered(value)) is not None)
    if rows is not None:
        return rows
    heads = (NUMBERED.match(line.lstrip(replies.MARKS + "-")) for line in text.split("\n"))
    return [(int(head[1]), {"answer": head[2]}) for head in heads if head]


def _numbered(value: Any) -> list[tuple[int, dict[str, Any]]] | None:
    """Verdicts with their numbers, if a JSON value holds them."""
    if isinstance(value, dict):
        row = replies.plain(value)
        value = replies.one_of(row, ("verdicts", "answers", "criteria"))
        if value is None and row and all(key.isdecimal() for key in row):
            value = [{"id": int(key), "answer": answer} for key, answer in row.items()]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return None
    rows = [replies.plain(row) for row in value]
    numbers = [replies.one_of(row, ("id", "number", "criterion")) for row in rows]
    return [*zip(numbers, rows, strict=True)] if all(type(number) is int for number in numbers) else None


def judged(criteria: Sequence[Criterion], verdicts: Sequence[Verdict]) -> ask.Parsed:
    """What verdicts on criteria come to."""
    passed: list[bool] = []
    for criterion, verdict in zip(criteria, verdicts, strict=True):
        passed.append(verdict.answer and all(passed[parent - 1] for parent in criterion.depends))
    values = {}
    for name in ("share", *KINDS):
        counted = [
            (criterion.weight, answer)
            for criterion, answer in zip(criteria, passed, strict=True)
            if name in ("share", criterion.kind)
        ]
        if counted:
            values[name] = sum(weight * answer for weight, answer in counted) / sum(weight for weight, _ in counted)
    failed = [criterion for criterion, answer in zip(criteria, passed, strict=True) if not answer]
    regions = tuple(
        Region(verdict.box, 1.0 if answer else -1.0, criterion.question, verdict.why)
        for criterion, verdict, answer in zip(criteria, verdicts, passed, strict=True)
        if verdict.box
    )
    critique = "; ".join(f"no: {criterion.question}" for criterion in failed) or "every criterion is met"
    return ask.Parsed(values, critique, ", ".join(criterion.fix for criterion in failed if criterion.fix), regions)


class Checklist:
    """The scorer. `model` is a folder or hub id, or with `url` the name a server gives it. `written`: a JSONL file of
    the criteria the model wrote, read and added to. `coordinates`: what boxes count in, "pixels", "thousand" or "unit".
    `instruction`, `writing`: files in place of ours. `asking`: see `ask.judge`. ValueError if the model cannot be had
    or a setting is none of these."""

    names = ("share", *KINDS)

    def __init__(
        self,
        model: str,
        url: str | None = None,
        written: str | None = None,
        coordinates: str = "pixels",
        instruction: str | None = None,
        writing: str | None = None,
        tokens: int = 1024,
        grid: int = 8,
        **asking: Any,
    ):
        if coordinates not in replies.UNITS:
            raise ValueError(f"checklist: coordinates is one of {', '.join(replies.UNITS)}, not {coordinates!r}")
        self.template = templates.Template.of("checklist", "checklist", ("image", "prompt", "criteria"), instruction)
        self.writing = templates.Template.of("checklist", "checklist_write", ("prompt",), writing)
        self.coordinates, self.tokens, self.grid = coordinates, tokens, grid
        self.file = Path(written) if written else None
        self.known: dict[str, list[Criterion] | str] = dict(_kept(self.file)) if self.file else {}
        self.judge = ask.judge("checklist", model, url, asking)
        own = {"coordinates": coordinates, "tokens": tokens, "grid": grid}
        own |= {"instruction": self.template.source, "writing": self.writing.source}
        self.card = ask.card("checklist", self.judge, 0, 1, own, has_map=True)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, batch=max(1, len(images)))

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size = tuple(images.shape[2:])
        lists = self.criteria(prompts)

        def question(i: int) -> types.Question:
            if isinstance(lists[i], str):
                raise ValueError(lists[i])
            numbered = "\n".join(f"{k}. {templates.quoted(own.question)}" for k, own in enumerate(lists[i], 1))
            units = replies.UNITS[self.coordinates]
            given = {"image": images[i], "prompt": templates.quoted(prompts[i].text)}
            return self.template.fill(**given, criteria=numbered, coordinates=units)

        def finding(i: int, reply: types.Reply) -> ask.Parsed:
            verdicts = read(reply.text, len(lists[i]), size, self.coordinates, reply.cut)
            found = judged(lists[i], verdicts)
            request = f"{prompts[i].text}; {found.request}" if found.request else ""
            return ask.Parsed(found.values, found.said, request, found.regions)

        asked = ask.together(self.judge, range(len(images)), question, self.tokens, VERDICTS)
        return ask.findings(self.names, asked, finding, size, self.grid)

    def criteria(self, prompts: Sequence[Prompt]) -> list[list[Criterion] | str]:
        """Each prompt's criteria, or why it has none. The model is asked once for those of a text nobody has given."""
        found: list[list[Criterion] | str | None] = []
        for prompt in prompts:
            try:
                given = prompt.wants.get("criteria")
                own = criteria_of(given) if given is not None else by_rule(prompt.wants)
                found.append(own or self.known.get(_key(prompt.text)))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                found.append(f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error))
        texts = [*dict.fromkeys(prompt.text for prompt, own in zip(prompts, found, strict=True) if own is None)]
        if texts:
            new = dict(zip(texts, self._write(texts), strict=True))
            found = [new[prompt.text] if own is None else own for prompt, own in zip(prompts, found, strict=True)]
        return found

    def _write(self, texts: Sequence[str]) -> list[list[Criterion] | str]:
        questions = [self.writing.fill(prompt=templates.quoted(text)) for text in texts]
        out: list[list[Criterion] | str] = []
        for text, reply in zip(texts, self.judge.ask(questions, self.tokens), strict=True):
            try:
                if reply.failure:
                    raise ValueError(reply.failure)
                out.append(criteria_of(_written(reply.text)))
            except ValueError as error:  # not kept: it is asked again
                out.append(f"no criteria could be written: {error}")
                continue
            self.known[_key(text)] = out[-1]
            if self.file:
                files.append(self.file, {"prompt": text, "criteria": [asdict(own) for own in out[-1]]})
        return out


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _written(text: str) -> Any:
    for found in replies.values(replies.answer(text)):
        rows = replies.one_of(replies.plain(found), ("criteria", "checklist")) if isinstance(found, dict) else found
        if isinstance(rows, list):
            return rows
    raise ValueError(f"the reply holds no list; it begins {replies.shown(text)}")


def _kept(file: Path) -> list[tuple[str, list[Criterion]]]:
    try:
        lines = files.lines(files.text(file)) if file.exists() else []
        rows = [files.parsed(line) for line in lines if line.strip()]
        return [(_key(row["prompt"]), criteria_of(row["criteria"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checklist: {file}: {' '.join(str(error).split())}") from None
