"""Ask a model that sees images and writes: what it is asked, and what comes back. Two back ends answer alike, a model
run here (`Local`) and a server that speaks OpenAI's protocol (`reward_models.vlm.openai_server.Server`).

What is asked is a text file anyone can read and change (`reward_models/instructions/`). It is cut at its placeholders
before anything is filled in, and a user's words go in as a JSON string without line ends or angle brackets: whatever
they say, they add no heading, no placeholder, no turn and no special token to the question.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from reward_models.images import from_file
from reward_models.regions import Region, paint
from reward_models.types import Card, Prompt, Scores
from reward_models.vlm import replies, transformers_model as vlm
from reward_models.vlm.types import Judge, Picture, Question, Reply
from reward_models.weights import fingerprint, named


@dataclass
class Local:
    """An image-text model of transformers, run here, `batch` questions at a time; the likeliest token each time."""

    model: torch.nn.Module
    processor: Any
    device: str
    batch: int
    about: Mapping[str, Any]
    usage: Counter[str] = field(default_factory=Counter)

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda own: self._written(own, tokens), lambda why: Reply(failure=why))

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        yes, no = vlm.openings(self.processor.tokenizer, *answers)
        return self._each(questions, lambda own: vlm.log_odds(self.model, self._inputs(own), yes, no).tolist(), str)

    def _written(self, questions: Sequence[Question], tokens: int) -> list[Reply]:
        inputs = self._inputs(questions)
        texts, cut, count = vlm.written(self.model, self.processor, inputs, tokens)
        self.usage["prompt_tokens"] += inputs["input_ids"].numel()
        self.usage["reply_tokens"] += count
        return [Reply(text, cut=short) for text, short in zip(texts, cut, strict=True)]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        return vlm.asked(self.processor, questions, self.device)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        """In batches; a batch that fails, for memory or for one question, is tried again in halves."""
        self.usage["calls"] += len(questions)
        if not questions:
            return []
        found = []
        for start in range(0, len(questions), self.batch):
            part = questions[start : start + self.batch]
            try:
                found += answer(part)
            except (ValueError, RuntimeError) as error:
                if len(part) == 1:
                    self.usage["failed"] += 1
                    found.append(failed(" ".join(str(error).split()) or type(error).__name__))
                    continue
                self.usage["calls"] -= len(part)
                half = len(part) // 2
                found += self._each(part[:half], answer, failed) + self._each(part[half:], answer, failed)
        return found


LOCAL = {"device": "cpu", "dtype": "float32", "batch": 4}


def judge(scorer: str, model: str, url: str | None, settings: Mapping[str, Any]) -> Judge:
    """The back end: the server at `url` that serves `model`, else `model`, a folder or hub id, here. `settings` are its
    own: `device`, `dtype`, `batch` here; those of `chat.Server` there. ValueError if it cannot be had, or for a setting
    it does not have."""
    if url is not None:
        from reward_models.vlm.openai_server import Server

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
class Parsed:
    """What one reply says. `values` by component, those left out are NaN."""

    values: Mapping[str, int | float]
    said: str = ""
    request: str = ""
    regions: tuple[Region, ...] = ()


def findings(
    names: tuple[str, ...],
    asked: Sequence[Reply],
    read: Callable[[int, Reply], Parsed],
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
