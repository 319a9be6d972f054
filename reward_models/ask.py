"""Ask a model that sees images and writes: what it is asked, and what comes back. Two back ends answer alike, a model
run here (`Local`) and a server that speaks OpenAI's protocol (`reward_models.chat.Server`).

What is asked is a text file anyone can read and change (`reward_models/instructions/`). It is cut at its placeholders
before anything is filled in, and a user's words go in as a JSON string without line ends or angle brackets: whatever
they say, they add no heading, no placeholder, no turn and no special token to the question.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models import files, replies, vlm
from reward_models.images import from_file
from reward_models.regions import Region, paint
from reward_models.types import Card, Prompt, Scores
from reward_models.weights import fingerprint, named

Picture = Float[Tensor, "3 H W"]
Part = str | Tensor  # text, or a picture
FOLDER = Path(__file__).parent / "instructions"
TURN = "\n---\n"  # before it stands what the model is told once, after it what it is asked


@dataclass(frozen=True, eq=False)
class Question:
    """Text and pictures [3, H, W] in [0, 1], in order; `system` is what the model is told beforehand."""

    parts: tuple[Part, ...]
    system: str = ""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Reply:
    """What came back. `failure` says why there is none; `cut`: the model ran out of tokens."""

    text: str = ""
    failure: str = ""
    cut: bool = False


@runtime_checkable
class Judge(Protocol):
    """A back end. `about` names what answers, for a scorer's card; `spent` counts calls, failed ones, and tokens where
    they are known."""

    about: Mapping[str, Any]
    spent: Counter[str]

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """A reply to each, of at most `tokens`. `schema`: the JSON schema of a reply, where the model can be held to
        one. Nothing is raised for a question that fails."""
        ...

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        """log p(first answer) - log p(second) of the next word, or why there is none."""
        ...


def quoted(text: str) -> str:
    """A user's words as a JSON string: in quotes, on one line, without the brackets of tags and special tokens."""
    return re.sub(
        r"[<>\[\]\u2028\u2029\x85]", lambda own: f"\\u{ord(own[0]):04x}", json.dumps(text, ensure_ascii=False)
    )


@dataclass(frozen=True)
class Template:
    """A text with `{placeholders}`, cut at them. `source` is the text as it is."""

    source: str

    @classmethod
    def of(cls, scorer: str, name: str, needed: Sequence[str], file: str | None = None) -> "Template":
        """Of `file`, or our own called `name`. ValueError if it cannot be read or lacks a placeholder of `needed`."""
        path = Path(file) if file else FOLDER / f"{name}.txt"
        try:
            text = files.text(path)
        except ValueError as error:
            raise ValueError(f"{scorer}: {error}") from None
        for name in needed:
            if f"{{{name}}}" not in text:
                raise ValueError(f"{scorer}: {path} does not hold {{{name}}}")
        return cls(text)

    def fill(self, **given: Part) -> Question:
        """The question, with pictures and text in their places; what is put in is not looked at again. Words in braces
        that are not `given` stay as they are."""
        system, turn, body = self.source.rpartition(TURN)
        told = "".join(part for part in _filled(system, given) if isinstance(part, str)).strip() if turn else ""
        return Question(_filled(body.strip(), given), told)


def _filled(text: str, given: Mapping[str, Part]) -> tuple[Part, ...]:
    pieces = re.split(rf"\{{({'|'.join(given)})\}}", text) if given else [text]
    parts: list[Part] = []
    for k, piece in enumerate(pieces):
        part = given[piece] if k % 2 else piece
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif not isinstance(part, str) or part:
            parts.append(part)
    return tuple(parts)


@dataclass
class Local:
    """An image-text model of transformers, run here, `batch` questions at a time; the likeliest token each time."""

    model: torch.nn.Module
    processor: Any
    device: str
    batch: int
    about: Mapping[str, Any]
    spent: Counter[str] = field(default_factory=Counter)

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda own: self._written(own, tokens), lambda why: Reply(failure=why))

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        yes, no = vlm.openings(self.processor.tokenizer, *answers)
        return self._each(questions, lambda own: vlm.log_odds(self.model, self._inputs(own), yes, no).tolist(), str)

    def _written(self, questions: Sequence[Question], tokens: int) -> list[Reply]:
        inputs = self._inputs(questions)
        texts, cut, count = vlm.written(self.model, self.processor, inputs, tokens)
        self.spent["prompt_tokens"] += inputs["input_ids"].numel()
        self.spent["reply_tokens"] += count
        return [Reply(text, cut=short) for text, short in zip(texts, cut, strict=True)]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        return vlm.asked(self.processor, questions, self.device)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        """In batches; a batch that fails, for memory or for one question, is tried again in halves."""
        self.spent["calls"] += len(questions)
        if not questions:
            return []
        found = []
        for start in range(0, len(questions), self.batch):
            part = questions[start : start + self.batch]
            try:
                found += answer(part)
            except (ValueError, RuntimeError) as error:
                if len(part) == 1:
                    self.spent["failed"] += 1
                    found.append(failed(" ".join(str(error).split()) or type(error).__name__))
                    continue
                self.spent["calls"] -= len(part)
                half = len(part) // 2
                found += self._each(part[:half], answer, failed) + self._each(part[half:], answer, failed)
        return found


LOCAL = {"device": "cpu", "dtype": "float32", "batch": 4}


def judge(scorer: str, model: str, url: str | None, settings: Mapping[str, Any]) -> Judge:
    """The back end: the server at `url` that serves `model`, else `model`, a folder or hub id, here. `settings` are its
    own: `device`, `dtype`, `batch` here; those of `chat.Server` there. ValueError if it cannot be had, or for a setting
    it does not have."""
    if url is not None:
        from reward_models.chat import Server

        return Server.of(scorer, model, url, settings)
    unknown = sorted(set(settings) - set(LOCAL))
    if unknown:
        raise ValueError(f"{scorer}: no setting {unknown[0]!r} for a model that runs here; it takes {', '.join(LOCAL)}")
    own = LOCAL | dict(settings)
    network, processor = vlm.load(scorer, model, own["device"], own["dtype"])
    about = {"model": named(model), "checkpoint": fingerprint(network), "dtype": own["dtype"]}
    return Local(network, processor, own["device"], own["batch"], about)


def together(
    judge: Judge,
    items: Sequence[Any],
    question: Callable[[Any], Question],
    tokens: int,
    schema: Mapping[str, Any] | None = None,
) -> list[Reply]:
    """A reply for each item, all asked at once. An item `question` raises ValueError for is not asked about."""
    found: list[Reply | Question] = []
    for item in items:
        try:
            found.append(question(item))
        except ValueError as error:
            found.append(Reply(failure=str(error)))
    answers = iter(judge.ask([own for own in found if isinstance(own, Question)], tokens, schema))
    return [next(answers) if isinstance(own, Question) else own for own in found]


def picture_of(prompt: Prompt, key: str) -> Picture:
    """The picture in the file that `prompt.wants[key]` names. ValueError if there is none."""
    place = prompt.wants.get(key)
    if not isinstance(place, str):
        raise ValueError(f"the prompt names no picture: {key!r} in its ground truth, a file, is needed")
    try:
        return from_file(place)[0]
    except ValueError as error:
        raise ValueError(f"{key} {place}: {error}") from None


@dataclass(frozen=True)
class Finding:
    """What one reply says. `values` by component, those left out are NaN."""

    values: Mapping[str, int | float]
    said: str = ""
    request: str = ""
    regions: tuple[Region, ...] = ()


def findings(
    names: tuple[str, ...],
    asked: Sequence[Reply],
    read: Callable[[int, Reply], Finding],
    size: tuple[int, int] = (1, 1),
    grid: int | None = None,
) -> Scores:
    """The scores of images of `size` (height, width), one reply each. `read(i, reply)` raises ValueError for one that
    cannot be read; the raw reply is kept either way. With `grid`, regions are painted on grid x grid cells."""
    values = torch.full((len(asked), len(names)), torch.nan)
    maps = torch.full((len(asked), grid, grid), torch.nan) if grid else None
    said, requests, boxes, failures = ([""] * len(asked), [""] * len(asked), [()] * len(asked), {})
    for i, reply in enumerate(asked):
        try:
            if reply.failure:
                raise ValueError(reply.failure)
            found = read(i, reply)
        except ValueError as error:
            cut = " (it ran out of tokens)" if reply.cut else ""
            seen = f"; the reply{cut} begins {replies.shown(reply.text)}" if reply.text else ""
            failures[i] = replies.printable(f"{' '.join(str(error).split())}{seen}")
            continue
        values[i] = torch.tensor([float(found.values.get(name, torch.nan)) for name in names])
        said[i], requests[i] = replies.printable(found.said), replies.printable(found.request)
        boxes[i] = tuple(
            replace(own, label=replies.printable(own.label), reason=replies.printable(own.reason))
            for own in found.regions
        )
        if maps is not None:
            maps[i] = paint(found.regions, size, (grid, grid))
    raw = tuple(replies.printable(reply.text) for reply in asked)
    return Scores(names, values, tuple(said), maps, failures, tuple(boxes), tuple(requests), raw)


def card(scorer: str, judge: Judge, low: int | float, high: int | float, settings: Mapping[str, Any], **more) -> Card:
    """The card of a scorer that asks `judge`; `settings` are what else changes a score, instructions above all."""
    return Card(
        scorer,
        model=judge.about["model"],
        licence="the model's own",
        low=low,
        high=high,
        size="as the model's processor has it",
        checkpoint=judge.about.get("checkpoint", ""),
        settings={**judge.about, **settings},
        **more,
    )
