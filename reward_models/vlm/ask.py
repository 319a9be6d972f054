"""Ask a vision-language model (VLM) questions, and collect its replies as scores. There are two back ends with one
interface: a model run in this process (`Local`) and a server that speaks OpenAI's protocol
(`reward_models.vlm.openai_server.Server`).

Questions are filled from text files that anyone can read and change (`reward_models/vlm/instructions/`). A template is
split at its placeholders before anything is filled in, and a user's words go in as a JSON string without line ends or
angle brackets: they cannot add a heading, a placeholder, a turn or a special token to the question.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.images import named_picture
from reward_models.types import Card, ImageScores, Prompt, Scores
from reward_models.vlm import replies, transformers_model as vlm
from reward_models.vlm.types import Judge, Picture, Question, Reply
from reward_models.weights import fingerprint, named


@dataclass
class Local:
    """An image-text model of transformers, run in this process with greedy decoding, `batch` questions at a time."""

    model: torch.nn.Module
    processor: Any
    device: str
    batch: int
    about: Mapping[str, Any]
    usage: Counter[str] = field(default_factory=Counter)

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda batch: self._generate(batch, tokens), lambda reason: Reply(failure=reason))

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        yes, no = vlm.first_tokens(self.processor.tokenizer, *answers)
        with torch.no_grad():
            return self._each(
                questions, lambda batch: vlm.log_odds(self.model, self._inputs(batch), yes, no).tolist(), str
            )

    def odds_in_graph(self, questions: Sequence[Question], answers: tuple[str, str]) -> Float[Tensor, "M"]:
        """What `odds` gives, in a graph that reaches the pixels of the pictures, which are not rounded."""
        yes, no = vlm.first_tokens(self.processor.tokenizer, *answers)
        return vlm.log_odds(self.model, vlm.inputs_of(self.processor, questions, self.device, exact=True), yes, no)

    def _generate(self, questions: Sequence[Question], tokens: int) -> list[Reply]:
        inputs = self._inputs(questions)
        texts, cut, count = vlm.generate(self.model, self.processor, inputs, tokens)
        self.usage["prompt_tokens"] += inputs["input_ids"].numel()
        self.usage["reply_tokens"] += count
        return [Reply(text, cut=truncated) for text, truncated in zip(texts, cut, strict=True)]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        return vlm.inputs_of(self.processor, questions, self.device)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        """Answer in batches; a batch that fails, for lack of memory or because of one question, is retried in
        halves."""
        self.usage["calls"] += len(questions)
        if not questions:
            return []
        results = []
        for start in range(0, len(questions), self.batch):
            batch = questions[start : start + self.batch]
            try:
                results += answer(batch)
            except (ValueError, RuntimeError) as error:
                if len(batch) == 1:
                    self.usage["failed"] += 1
                    results.append(failed(" ".join(str(error).split()) or type(error).__name__))
                    continue
                self.usage["calls"] -= len(batch)  # counted again by the two calls below
                half = len(batch) // 2
                results += self._each(batch[:half], answer, failed) + self._each(batch[half:], answer, failed)
        return results


LOCAL = {"device": "cpu", "dtype": "float32", "batch": 4}


def judge(scorer: str, model: str, url: str | None, settings: Mapping[str, Any]) -> Judge:
    """The back end: the server at `url` that serves `model`, else `model`, a folder or hub id, in this process.
    `settings` of the back end: `device`, `dtype`, `batch` in this process; those of `openai_server.Server` for a
    server. ValueError if it is unavailable, or for an unknown setting."""
    if url is not None:
        from reward_models.vlm.openai_server import Server

        return Server.of(scorer, model, url, settings)
    unknown = sorted(set(settings) - set(LOCAL))
    if unknown:
        raise ValueError(f"{scorer}: no setting {unknown[0]!r} for a local model; it takes {', '.join(LOCAL)}")
    chosen = LOCAL | dict(settings)
    network, processor = vlm.load(scorer, model, chosen["device"], chosen["dtype"])
    about = {"model": named(model), "checkpoint": fingerprint(network), "dtype": chosen["dtype"]}
    return Local(network, processor, chosen["device"], chosen["batch"], about)


def ask_all(
    judge: Judge,
    items: Sequence[Any],
    question: Callable[[Any], Question],
    tokens: int,
    schema: Mapping[str, Any] | None = None,
) -> list[Reply]:
    """A reply for each item, in one call of the judge. An item for which `question` raises ValueError is not asked
    about; its reply is the failure."""
    pending: list[Reply | Question] = []
    for item in items:
        try:
            pending.append(question(item))
        except ValueError as error:
            pending.append(Reply(failure=str(error)))
    answers = iter(judge.ask([entry for entry in pending if isinstance(entry, Question)], tokens, schema))
    return [next(answers) if isinstance(entry, Question) else entry for entry in pending]


def picture_of(prompt: Prompt, key: str) -> Picture:
    """The picture in the file that `prompt.wants[key]` names. ValueError if it is missing."""
    return named_picture(prompt, (key,))[0]


def parse_replies(
    names: tuple[str, ...],
    answers: Sequence[Reply],
    parse: Callable[[int, Reply], ImageScores],
    size: tuple[int, int] = (1, 1),
    grid: int | None = None,
) -> Scores:
    """The scores of images of `size` (height, width) from one reply each. `parse(i, reply)` raises ValueError for a
    reply it cannot read, which becomes the failure. Raw replies are always included. With `grid`, regions are painted
    on grid x grid cells."""
    rows = [_parsed(i, answer, parse) for i, answer in enumerate(answers)]
    return Scores.collect(names, rows, size, grid)


def _parsed(i: int, answer: Reply, parse: Callable[[int, Reply], ImageScores]) -> ImageScores:
    raw = replies.printable(answer.text)
    try:
        if answer.failure:
            raise ValueError(answer.failure)
        row = parse(i, answer)
    except ValueError as error:
        cut = " (it ran out of tokens)" if answer.cut else ""
        beginning = f"; the reply{cut} begins {replies.excerpt(answer.text)}" if answer.text else ""
        return ImageScores(failure=replies.printable(f"{' '.join(str(error).split())}{beginning}"), reply=raw)
    regions = tuple(
        replace(region, label=replies.printable(region.label), reason=replies.printable(region.reason))
        for region in row.regions
    )
    critique, request = replies.printable(row.critique), replies.printable(row.request)
    return ImageScores(row.values, critique, request, raw, regions)


def card(scorer: str, judge: Judge, low: int | float, high: int | float, settings: Mapping[str, Any], **more) -> Card:
    """The card of a scorer that asks `judge`. `settings`: what else changes a score, above all the instructions."""
    return Card(
        scorer,
        model=judge.about["model"],
        licence="the model's own",
        low=low,
        high=high,
        size="resized by the model's processor",
        checkpoint=judge.about.get("checkpoint", ""),
        settings={**judge.about, **settings},
        **more,
    )
