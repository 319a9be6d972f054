"""`checklist`: a vision-language model answers yes or no to each criterion of a prompt.

Criteria are binary because judges that grade a picture as a whole are easier to please. They come from
`Prompt.wants["criteria"]`, else by rule from GenEval's layout (`include`, `text`), else from the model itself, which
writes them once per prompt; `written` stores those in a file. A criterion fails if one it depends on fails. A reply
that leaves a criterion without an answer fails the image, because the share of the others would be a different
quantity. Components, shares of weight in [0, 1], higher is better, roughly comparable across prompts:

- `share`: of all criteria.
- `object`, `count`, `attribute`, `relation`, `text`, `style`: of those of one kind, NaN if there are none.

The critique lists the failed criteria, and the revised request asks for them again; evidence boxes become regions of
credit 1 or -1, labelled with their criterion.

With `review`, the criteria that the model wrote change while they are used (RubiCap): one that so many images of the
prompt in a row all passed, or all failed, tells them apart no longer and is retired, and the model is asked for others
in its place, with the critiques of the last images that failed. Scores of a prompt before and after a review are
different quantities; they are not cached, and a run that is resumed counts again from 0.

After RubiCap, CM2 and DSG; the instructions and rules are ours. Licence: the model's own.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from reward_models.regions import Region, inside
from reward_models.scoring import each
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.vlm import ask, replies, scales, templates, types
from reward_models.vlm.criteria import KINDS, Criterion, Tally, by_rule, criteria_of, without
from reward_models.vlm.written import Subject, Written

MOST_NEW = 3  # criteria that a review adds
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


@dataclass(frozen=True)
class Verdict:
    """The answer, its evidence, and a box in pixels if the judge gives one."""

    answer: bool
    evidence: str = ""
    box: tuple[int | float, ...] | None = None


def read(text: str, count: int, size: tuple[int, int], coordinates: str = "pixels", cut: bool = False) -> list[Verdict]:
    """The verdicts on `count` criteria in a reply about a picture of `size` (height, width). ValueError if a criterion
    has no answer or two, or a box is outside the picture."""
    verdicts: dict[int, Verdict] = {}
    for number, row in _listed(replies.answer(text, cut)):
        if not 1 <= number <= count:
            raise ValueError(f"there is no criterion {number}; there are {count}")
        answer = _answer(replies.one_of(row, ("answer", "verdict", "pass", "satisfied")), number)
        box = row.get("box")
        try:
            pixels = None if not box else tuple(replies.scaled(box, size, coordinates))
            if pixels:
                inside([Region(pixels, 0)], size)
        except ValueError as error:
            raise ValueError(f"criterion {number}: {error}") from None
        evidence = str(replies.one_of(row, ("evidence", "why", "reason")) or "")
        if verdicts.setdefault(number, verdict := Verdict(answer, evidence, pixels)).answer != verdict.answer:
            raise ValueError(f"criterion {number} has two answers")
    if not verdicts:
        raise ValueError("the reply answers no criterion")
    missing = [number for number in range(1, count + 1) if number not in verdicts]
    if missing:
        raise ValueError(f"criterion {missing[0]} has no answer")
    return [verdicts[number] for number in range(1, count + 1)]


def _answer(value: Any, number: int) -> bool:
    """True for yes, False for no; a note may follow. ValueError for anything else."""
    words = " ".join(scales.unwrapped(str(value)).lower().split())
    head = re.match(rf"(?:{'|'.join(YES | NO)})\b(?!\.\d)", words)
    rest = words[head.end() :] if head else words
    alone = re.fullmatch(r"(?s)(?:[.,;:(!].*| [-–—] .*)?", rest) and not OTHER.match(rest) and " or " not in rest
    if head is None or not alone:
        raise ValueError(f"criterion {number}: the answer is {words[:99]!r:.40}; yes or no is needed")
    return head[0] in YES


def _listed(text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = replies.unanimous(rows for value in replies.values(text) if (rows := _numbered(value)) is not None)
    if rows is not None:
        return rows
    heads = (NUMBERED.match(line.lstrip(replies.MARKS + "-")) for line in text.split("\n"))
    return [(int(head[1]), {"answer": head[2]}) for head in heads if head]


def _numbered(value: Any) -> list[tuple[int, dict[str, Any]]] | None:
    """Verdicts with their numbers, if a JSON value contains them."""
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


def passed(criteria: Sequence[Criterion], verdicts: Sequence[Verdict]) -> list[bool]:
    """Whether each criterion is met, and all that it depends on."""
    good: list[bool] = []
    for criterion, verdict in zip(criteria, verdicts, strict=True):
        good.append(verdict.answer and all(good[parent - 1] for parent in criterion.depends))
    return good


def combined(criteria: Sequence[Criterion], verdicts: Sequence[Verdict]) -> ImageScores:
    """The scores of an image from the verdicts on its criteria; `request` has only the fixes."""
    good = passed(criteria, verdicts)
    values = {}
    for name in ("share", *KINDS):
        weighted = [
            (criterion.weight, answer)
            for criterion, answer in zip(criteria, good, strict=True)
            if name in ("share", criterion.kind)
        ]
        if weighted:
            values[name] = sum(weight * answer for weight, answer in weighted) / sum(weight for weight, _ in weighted)
    failed = [criterion for criterion, answer in zip(criteria, good, strict=True) if not answer]
    regions = tuple(
        Region(verdict.box, 1.0 if answer else -1.0, criterion.question, verdict.evidence)
        for criterion, verdict, answer in zip(criteria, verdicts, good, strict=True)
        if verdict.box
    )
    critique = "; ".join(f"no: {criterion.question}" for criterion in failed) or "every criterion is met"
    fixes = ", ".join(criterion.fix for criterion in failed if criterion.fix)
    return ImageScores(values, critique, fixes, regions=regions)


class Checklist:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server. `written`: a JSONL file of the
    criteria that the model wrote, read and extended. `coordinates`: the unit of boxes, "pixels", "thousand" or "unit".
    `review`: images of a prompt after which its criteria are reviewed. `instruction`, `writing`, `reviewing`: files
    that replace our instructions. `asking`: see `ask.judge`. ValueError if the model is unavailable or a setting is
    invalid."""

    names = ("share", *KINDS)

    def __init__(
        self,
        model: str,
        url: str | None = None,
        written: str | None = None,
        coordinates: str = "pixels",
        review: int | None = None,
        instruction: str | None = None,
        writing: str | None = None,
        reviewing: str | None = None,
        tokens: int = 1024,
        grid: int = 8,
        **asking: Any,
    ):
        if review is not None and review < 2:
            raise ValueError(f"checklist: review is at least 2 images, not {review}")
        if coordinates not in replies.UNITS:
            raise ValueError(f"checklist: coordinates is one of {', '.join(replies.UNITS)}, not {coordinates!r}")
        self.template = templates.Template.of("checklist", "checklist", ("image", "prompt", "criteria"), instruction)
        self.writing = templates.Template.of("checklist", "checklist_write", ("prompt",), writing)
        given = ("prompt", "criteria", "critiques")
        self.reviewing = templates.Template.of("checklist", "checklist_review", given, reviewing)
        self.coordinates, self.tokens, self.grid, self.review = coordinates, tokens, grid, review
        self.changes = review is not None
        self.tallies: dict[str, Tally] = {}
        self.written: Written[list[Criterion]] = Written(
            "checklist", "criteria", written, _read_criteria, criteria_of, _shown, revised=True
        )
        self.judge = ask.judge("checklist", model, url, asking)
        settings = {"coordinates": coordinates, "tokens": tokens, "grid": grid}
        settings |= {"instruction": self.template.source, "writing": self.writing.source}
        if review is not None:
            settings |= {"review": review, "reviewing": self.reviewing.source}
        self.card = ask.card("checklist", self.judge, 0, 1, settings, has_map=True)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size = tuple(images.shape[2:])
        lists = self.criteria(prompts)

        def question(i: int) -> types.Question:
            if isinstance(lists[i], ValueError):
                raise lists[i]
            numbered = "\n".join(
                f"{k}. {templates.quoted(criterion.question)}" for k, criterion in enumerate(lists[i], 1)
            )
            units = replies.UNITS[self.coordinates]
            given = {"image": images[i], "prompt": templates.quoted(prompts[i].text)}
            return self.template.fill(**given, criteria=numbered, coordinates=units)

        def parse(i: int, reply: types.Reply) -> ImageScores:
            verdicts = read(reply.text, len(lists[i]), size, self.coordinates, reply.cut)
            row = combined(lists[i], verdicts)
            if self.review is not None and self.written.known.get(Subject(prompts[i].text).key) is lists[i]:
                self.tallies.setdefault(prompts[i].text, Tally()).add(passed(lists[i], verdicts), row.critique)
            return replace(row, request=f"{prompts[i].text}; {row.request}" if row.request else "")

        answers = ask.ask_all(self.judge, range(len(images)), question, self.tokens, VERDICTS)
        scores = ask.parse_replies(self.names, answers, parse, size, self.grid)
        self._review()
        return scores

    def _review(self) -> None:
        """Replace the criteria that no longer tell the images of their prompt apart."""
        due = {text: tally for text, tally in self.tallies.items() if tally.images >= self.review}
        retired = {text: tally.constant() for text, tally in due.items()}
        for text in due:
            del self.tallies[text]
        questions, left = (
            [],
            {
                text: without(self.written.known[Subject(text).key], numbers)
                for text, numbers in retired.items()
                if numbers
            },
        )
        for text, criteria in left.items():
            numbered = "\n".join(f"- {templates.quoted(criterion.question)}" for criterion in criteria) or "(none)"
            critiques = "\n".join(f"- {templates.quoted(line)}" for line in due[text].critiques) or "(none failed)"
            given = {"prompt": templates.quoted(text), "criteria": numbered, "critiques": critiques}
            questions.append(self.reviewing.fill(**given))
        answers = self.judge.ask(questions, self.tokens) if questions else []
        for (text, criteria), reply in zip(left.items(), answers, strict=True):
            try:
                new = _read_criteria(reply)[:MOST_NEW] if not reply.failure else []
            except ValueError:  # the rest of the criteria still stand
                new = []
            new = [replace(criterion, depends=()) for criterion in new]
            if criteria or new:
                self.written.revise(Subject(text), [*criteria, *new])

    def criteria(self, prompts: Sequence[Prompt]) -> list[list[Criterion] | ValueError]:
        """The criteria of each prompt, or the reason why it has none. The model writes those of each text at most
        once."""
        lists: list[list[Criterion] | ValueError] = []
        for prompt in prompts:
            try:
                given = prompt.wants.get("criteria")
                lists.append(criteria_of(given) if given is not None else by_rule(prompt.wants))
            except ValueError as error:
                lists.append(error)
            except (KeyError, TypeError, IndexError) as error:
                lists.append(ValueError(f"{type(error).__name__}: {error}"))
        missing = [i for i, criteria in enumerate(lists) if criteria == []]
        new = self.written.of([Subject(prompts[i].text) for i in missing], self._write)
        for i, criteria in zip(missing, new, strict=True):
            lists[i] = criteria
        return lists

    def _write(self, subjects: Sequence[Subject]) -> list[types.Reply]:
        questions = [self.writing.fill(prompt=templates.quoted(subject.text)) for subject in subjects]
        return self.judge.ask(questions, self.tokens)


def _shown(criteria: Sequence[Criterion]) -> list[dict[str, Any]]:
    return [asdict(criterion) for criterion in criteria]


def _read_criteria(reply: types.Reply) -> list[Criterion]:
    return criteria_of(_criteria_rows(reply.text))


def _criteria_rows(text: str) -> Any:
    for value in replies.values(replies.answer(text)):
        rows = replies.one_of(replies.plain(value), ("criteria", "checklist")) if isinstance(value, dict) else value
        if isinstance(rows, list):
            return rows
    raise ValueError("the reply contains no list")
