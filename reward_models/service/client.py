"""`remote`: the scorers of a reward service (`reward_models.service.server`) as one scorer here.

Components are called `scorer.component`; their ranges and meanings are the service's. Images travel as PNG, which holds
just what a local scorer would look at, so scores are the same. What goes wrong on the way or over there is NaN with a
reason: never an exception, never 0.

Left out: region maps, which the service does not send.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError

from reward_models.errors import first_problem
from reward_models.images import png, to_pil
from reward_models.scoring import each
from reward_models.service import schema as wire
from reward_models.service.http import Fault, Link
from reward_models.types import Card, Images, Prompt, Scores


class Remote:
    """The scorer. A call becomes requests of `batch` images, or of fewer where the service takes no more pixels,
    `workers` of them under way at once; where a scorer is groupwise, the images of a prompt stay in one request.

    `token`: by default the environment variable MMALIGN_TOKEN; it is struck out of whatever comes back. `scorers`:
    which of the service's; by default all. `timeout`: seconds for a request and its whole answer. `retries`: further
    tries when the service cannot be reached, is late or busy. `faults`: failed requests in a row after which all fail
    at once for `rest` seconds. ValueError, in a line with the URL, if no reward service answers there, it refuses the
    token or has no such scorer, or a setting makes no sense.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        scorers: Sequence[str] | None = None,
        timeout: int | float = 60,
        retries: int = 4,
        batch: int = 16,
        workers: int = 4,
        faults: int = 5,
        rest: int | float = 15,
    ):
        if min(batch, workers, faults) < 1 or retries < 0 or timeout <= 0 or rest < 0:
            raise ValueError("remote: batch, workers, faults and timeout are above 0, retries and rest not below")
        self.link = Link(url, token or os.environ.get("MMALIGN_TOKEN", ""), timeout, retries, faults, rest)
        try:
            info = wire.Info.model_validate(self.link.get("/info"))
        except Fault as fault:
            raise ValueError(f"remote: {url}: {fault}") from None
        except ValidationError:
            raise ValueError(f"remote: {url}: what answers there is no reward service") from None
        asked = list(info.scorers) if scorers is None else list(scorers)
        if not asked or not set(asked) <= set(info.scorers):
            raise ValueError(f"remote: {url}: it has {', '.join(info.scorers)}; asked for {', '.join(asked) or 'none'}")
        about = {name: info.scorers[name] for name in asked}
        cards = [own.card for own in about.values()]
        self.batch, self.pixels, self.workers = min(batch, info.limits.images), info.limits.together, workers
        self.components = {name: own.names for name, own in about.items()}
        self.names = tuple(f"{name}.{component}" for name, own in about.items() for component in own.names)
        self.card = Card(
            "remote",
            model=url,
            licence=", ".join(dict.fromkeys(card.licence for card in cards)),
            low=min(-math.inf if card.low is None else card.low for card in cards),
            high=max(math.inf if card.high is None else card.high for card in cards),
            higher="more" if any(card.higher == "more" for card in cards) else "better",
            comparable_across_prompts=all(card.comparable_across_prompts for card in cards),
            sees_prompt=any(card.sees_prompt for card in cards),
            groupwise=any(card.groupwise for card in cards),
            settings={name: own.version for name, own in about.items()},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        values, critiques, failures = torch.full((len(images), len(self.names)), torch.nan), [""] * len(images), {}
        groups, sent, pictures = defaultdict(list), {}, to_pil(images)
        for i, prompt in enumerate(prompts):
            try:
                sent[i] = wire.Prompt(text=prompt.text, wants=dict(prompt.wants), id=prompt.id)
                groups[(prompt.id, prompt.text) if self.card.groupwise else i].append(i)
            except ValidationError as error:
                failures[i] = f"the prompt has no JSON form: {first_problem(error.errors())}"
        size = min(self.batch, self.pixels // images[0, 0].numel()) if len(images) else self.batch
        parts = packed(groups.values(), max(1, size))
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(lambda rows: self._ask([pictures[i] for i in rows], [sent[i] for i in rows]), parts)
            for rows, found in zip(parts, answers, strict=True):
                values[rows] = found.values
                failures |= {rows[k]: why for k, why in found.failures.items()}
                for k, critique in enumerate(found.critiques):
                    critiques[rows[k]] = critique
        return Scores(self.names, values, tuple(critiques), failures=failures)

    def _ask(self, pictures: Sequence[Image.Image], prompts: Sequence[wire.Prompt]) -> Scores:
        """What one request brings."""
        ask = wire.Ask(images=[png(picture) for picture in pictures], prompts=prompts, scorers=list(self.components))
        try:
            return self.link.post(
                "/score", ask.model_dump_json().encode(), lambda found: self._read(found, len(prompts))
            )
        except Fault as fault:
            values = torch.full((len(prompts), len(self.names)), torch.nan)
            return Scores(self.names, values, failures=dict.fromkeys(range(len(prompts)), str(fault)))

    def _read(self, found: Any, count: int) -> Scores:
        """The scores of `count` images in an answer. Fault if anything in it is not as it should be."""
        try:
            answer = wire.Answer.model_validate(found)
        except ValidationError as error:
            raise Fault(f"the answer makes no sense: {first_problem(error.errors())}") from None
        lengths = [len(answer.scores), len(answer.failures), len(answer.critiques)]
        if lengths != [count] * 3:
            raise Fault(f"the answer makes no sense: {lengths} scores, failures, critiques for {count} images")
        if answer.names != self.components or any(row.keys() != set(self.names) for row in answer.scores):
            raise Fault(f"the answer makes no sense: its scores are not {', '.join(self.names)}")
        rows = [self._row(*both) for both in zip(answer.scores, answer.failures, strict=True)]
        values = torch.tensor(rows, dtype=torch.float32)
        if values.isinf().any():
            raise Fault("the answer makes no sense: a score is infinite")
        failures = {k: self._said(own) for k, own in enumerate(answer.failures) if own}
        return Scores(self.names, values, tuple(map(self._said, answer.critiques)), failures=failures)

    def _row(self, scores: Mapping[str, float | None], failures: Mapping[str, str]) -> list[float]:
        """One image's scores. A number where all of it, or all of a scorer, is said to have failed is none."""
        row = []
        for name, components in self.components.items():
            own = [scores[f"{name}.{component}"] for component in components]
            if "image" in failures or (name in failures and None not in own):
                own = [None] * len(own)
            row += [math.nan if value is None else value for value in own]
        return row

    def _said(self, words: Mapping[str, str]) -> str:
        return "; ".join(text if len(self.components) == 1 else f"{name}: {text}" for name, text in words.items())


def packed(groups: Iterable[list[int]], size: int) -> list[list[int]]:
    """Groups of rows in lists of at most `size` rows, or of one larger group; none is cut."""
    parts: list[list[int]] = []
    for rows in groups:
        if not parts or len(parts[-1]) + len(rows) > size:
            parts.append([])
        parts[-1].extend(rows)
    return parts
