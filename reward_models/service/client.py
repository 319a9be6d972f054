"""`remote`: a client that presents the scorers of a reward service (`reward_models.service.server`) as one scorer.

Components are called `scorer.component`; their ranges and meanings are the service's. Images are sent as PNG, which has
exactly the levels that a local scorer uses, so scores are the same. Errors of the connection or the service become NaN
with a reason: never an exception, never 0.

Regions, requests and replies come too, from a service that sends them. Of several scorers, the map and the regions are
those of the first one that scores regions, an image's revised request is the first that there is, and replies are
joined, as critiques are.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from reward_models.errors import first_problem
from reward_models.images import png, to_pil
from reward_models.regions import Region
from reward_models.scoring import each, merged
from reward_models.service import schema
from reward_models.service.http import Fault, Link
from reward_models.types import Card, Images, Prompt, Scores


class Remote:
    """The scorer. A call is split into requests of `batch` images, or fewer if the service limits the pixels, with
    `workers` simultaneous requests; if a scorer is groupwise, the images of a prompt stay in one request.

    `token`: by default the environment variable MMALIGN_TOKEN; it is removed from all answers. `scorers`: names of the
    service's scorers, by default all. `timeout`: seconds for a request and its complete answer. `retries`: when the
    service cannot be reached, is late or busy. `faults`: after so many consecutive failed requests, all fail at once
    for `rest` seconds. ValueError, in one line with the URL, if there is no reward service, it rejects the token or
    lacks a scorer, or a setting is invalid.
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
            raise ValueError("remote: batch, workers, faults and timeout must be above 0, retries and rest at least 0")
        self.link = Link(url, token or os.environ.get("MMALIGN_TOKEN", ""), timeout, retries, faults, rest)
        try:
            info = schema.Info.model_validate(self.link.get("/info"))
        except Fault as fault:
            raise ValueError(f"remote: {url}: {fault}") from None
        except ValidationError:
            raise ValueError(f"remote: {url}: this is not a reward service") from None
        chosen = list(info.scorers) if scorers is None else list(scorers)
        if not chosen or not set(chosen) <= set(info.scorers):
            requested = ", ".join(chosen) or "none"
            raise ValueError(f"remote: {url}: it has {', '.join(info.scorers)}; requested: {requested}")
        about = {name: info.scorers[name] for name in chosen}
        cards = [scorer.card for scorer in about.values()]
        self.batch, self.pixels, self.workers = min(batch, info.limits.images), info.limits.together, workers
        self.components = {name: scorer.names for name, scorer in about.items()}
        self.details = info.details
        self.placing = next((name for name, scorer in about.items() if scorer.card.has_map), None)
        self.names = tuple(f"{name}.{component}" for name, scorer in about.items() for component in scorer.names)
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
            has_map=info.details and self.placing is not None,
            settings={name: scorer.version for name, scorer in about.items()},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        groups, sent, failures, pictures = defaultdict(list), {}, {}, to_pil(images)
        for i, prompt in enumerate(prompts):
            try:
                sent[i] = schema.Prompt(text=prompt.text, wants=dict(prompt.wants), id=prompt.id)
                groups[(prompt.id, prompt.text) if self.card.groupwise else i].append(i)
            except ValidationError as error:
                failures[i] = f"the prompt has no JSON form: {first_problem(error.errors())}"
        size = min(self.batch, self.pixels // images[0, 0].numel()) if len(images) else self.batch
        parts = packed(groups.values(), max(1, size))
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(lambda rows: self._ask([pictures[i] for i in rows], [sent[i] for i in rows]), parts)
            return merged(len(images), self.names, zip(parts, answers, strict=True), failures)

    def _ask(self, pictures: Sequence[Image.Image], prompts: Sequence[schema.Prompt]) -> Scores:
        """The scores from one request."""
        ask = schema.Ask(
            images=[png(picture) for picture in pictures],
            prompts=prompts,
            scorers=list(self.components),
            details=self.details,
        )
        unknown = None if self.details else {"details"}  # an older service refuses the field
        try:
            body = ask.model_dump_json(exclude=unknown).encode()
            return self.link.post("/score", body, lambda answer: self._read(answer, len(prompts)))
        except Fault as fault:
            values = torch.full((len(prompts), len(self.names)), torch.nan)
            return Scores(self.names, values, failures=dict.fromkeys(range(len(prompts)), str(fault)))

    def _read(self, value: Any, count: int) -> Scores:
        """The scores of `count` images in an answer's JSON. Fault if it is invalid."""
        try:
            answer = schema.Answer.model_validate(value)
        except ValidationError as error:
            raise Fault(f"the answer makes no sense: {first_problem(error.errors())}") from None
        lengths = [len(answer.scores), len(answer.failures), len(answer.critiques)]
        if lengths != [count] * 3:
            raise Fault(f"the answer makes no sense: {lengths} scores, failures, critiques for {count} images")
        if len(answer.details) != count * self.details:
            raise Fault(f"the answer makes no sense: details of {len(answer.details)} of {count} images")
        if answer.names != self.components or any(row.keys() != set(self.names) for row in answer.scores):
            raise Fault(f"the answer makes no sense: its scores are not {', '.join(self.names)}")
        rows = [self._row(*both) for both in zip(answer.scores, answer.failures, strict=True)]
        values = torch.tensor(rows, dtype=torch.float32)
        if values.isinf().any():
            raise Fault("the answer makes no sense: a score is infinite")
        failures = {k: self._joined(reasons) for k, reasons in enumerate(answer.failures) if reasons}
        details = [{name: row[name] for name in self.components if name in row} for row in answer.details]
        places = [row.get(self.placing, schema.Details()) for row in details]
        try:
            boxes = tuple(
                tuple(Region(**dict(region) | {"box": tuple(region.box)}) for region in one.boxes) for one in places
            )
            maps = _maps([one.map for one in places])
        except ValueError as error:
            raise Fault(f"the answer makes no sense: {error}") from None
        requests = tuple(next((one.request for one in row.values() if one.request), "") for row in details)
        replies = tuple(self._joined({name: one.reply for name, one in row.items() if one.reply}) for row in details)
        critiques = tuple(map(self._joined, answer.critiques))
        return Scores(self.names, values, critiques, maps, failures, boxes, requests, replies)

    def _row(self, scores: Mapping[str, float | None], failures: Mapping[str, str]) -> list[float]:
        """The scores of one image. If the image or a scorer failed entirely, its numbers are ignored."""
        row = []
        for name, components in self.components.items():
            values = [scores[f"{name}.{component}"] for component in components]
            if "image" in failures or (name in failures and None not in values):
                values = [None] * len(values)
            row += [math.nan if value is None else value for value in values]
        return row

    def _joined(self, texts: Mapping[str, str]) -> str:
        return "; ".join(text if len(self.components) == 1 else f"{name}: {text}" for name, text in texts.items())


def _maps(grids: Sequence[schema.Grid | None]) -> Float[Tensor, "N a b"] | None:
    """The maps of images, all NaN for an image without one; None if there are none. ValueError if their shapes differ
    or a value is outside [-1, 1]."""
    shapes = {(len(grid), *{len(row) for row in grid}) for grid in grids if grid is not None}
    if not shapes:
        return None
    (shape, *others) = shapes
    if others or len(shape) != 2 or 0 in shape:
        raise ValueError("its maps have no common shape of rows and columns")
    rows = [
        [[math.nan if v is None else v for v in row] for row in grid or [[None] * shape[1]] * shape[0]]
        for grid in grids
    ]
    maps = torch.tensor(rows, dtype=torch.float32)
    if bool((maps.abs() > 1).any()):
        raise ValueError("a map has a value outside [-1, 1]")
    return maps


def packed(groups: Iterable[list[int]], size: int) -> list[list[int]]:
    """Pack groups of rows into lists of at most `size` rows, or of one larger group; groups are not split."""
    parts: list[list[int]] = []
    for rows in groups:
        if not parts or len(parts[-1]) + len(rows) > size:
            parts.append([])
        parts[-1].extend(rows)
    return parts
